"""The calls of the kernels that matter: what is compiled without a GPU, checked, timed and tuned.

Each kernel's `arg_specs.py` lists its cases at the shapes of real models.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Literal

import jax

KERNELS = (
    "ragged_paged_attention",
    "attention_backward",
    "gated_delta",
    "grouped_lora",
    "layer_passes",
)
TENSOR_PARALLEL = (1, 2, 4)


def arg_specs(kernel: str) -> ModuleType:
    """The module with the cases of one of `KERNELS`: CASES, DRY_RUN_CASES, tuning_keys, ..."""
    return import_module(f"kernels_pallas.{kernel}.arg_specs")


@dataclass(frozen=True)
class ModelShape:
    """What the kernels see of a model, or of its shard on one of several devices."""

    name: str
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int

    def shard(self, devices: int) -> "ModelShape":
        """The shape that one of `devices` sees under tensor parallelism."""
        return replace(
            self,
            name=f"{self.name}/tp{devices}",
            num_heads=self.num_heads // devices,
            num_kv_heads=self.num_kv_heads // devices,
            d_ff=self.d_ff // devices,
        )


MODELS = (
    ModelShape("llama-3.1-8b", 4096, 32, 8, 128, 14336),
    ModelShape("qwen2.5-14b", 5120, 40, 8, 128, 13824),
    ModelShape("qwen2.5-32b", 5120, 40, 8, 128, 27648),
    ModelShape("llama-70b", 8192, 64, 8, 128, 28672),
)


def model_shards() -> Iterator[ModelShape]:
    """Every model at every degree of tensor parallelism."""
    for model in MODELS:
        for devices in TENSOR_PARALLEL:
            yield model.shard(devices)


@dataclass(frozen=True)
class Case:
    """One call of a kernel.

    name: model, tensor parallelism and batch, e.g. "llama-3.1-8b/tp1/decode-64x2048".
    function: the kernel's api function, called as function(*arguments, backend=...).
    make: arguments from a PRNG key, in pure JAX, so that `jax.eval_shape` gives their shapes
        without memory. What the contract allows to hold anything, holds NaN.
    donated: indices of the arguments that the engine donates.
    flops, bytes: the least work the call can do: multiplications and additions of its products, and
        bytes it must read and write.
    bound: which of the two decides the roofline.
    target: fraction of the roofline to reach on an H200; 0 when none is set.
    tolerance: largest error allowed, relative to the reference's largest value, in bfloat16.
    chips: those that can do it.
    """

    name: str
    function: Callable
    make: Callable[[jax.Array], tuple]
    flops: float
    bytes: float
    bound: Literal["bandwidth", "products"]
    donated: tuple[int, ...] = ()
    target: float = 0.0
    tolerance: float = 2e-2
    chips: tuple[str, ...] = ("h200", "a100")
