"""Which implementation of the kernels a program is built with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

# XLA makes one product of those that read the same when all but one have no more bytes than this
# (`xla_gpu_dot_merger_threshold_mb`). Each output alone would then be a copy.
_MERGED_BYTES = 32 * 2**20
# It reads the weights of such a product where they are if each has whole tiles of columns. If not,
# it copies all of them first, so those of other widths are kept apart (`models.layers.Linear`).
MERGED_COLUMNS = 64


@dataclass(frozen=True)
class Backend:
    """A choice of kernels, static in every program that uses them.

    implementation: "xla" (the references, which run anywhere) or "pallas" (Triton, for NVIDIA
    GPUs). chip: whose tuning table gives the tiles (`chip_name`). interpret: run Pallas kernels in
    its interpreter, which needs no GPU and is slow.
    """

    implementation: Literal["xla", "pallas"]
    chip: str = "h200"
    interpret: bool = False


XLA = Backend("xla")


def chip_name(device_kind: str) -> str:
    """The tuning tables' name of a device kind: "NVIDIA H200" is h200, "NVIDIA A100-SXM4-80GB" is
    a100; a GPU without a table of its own goes by the nearest generation's."""
    kind = device_kind.lower()
    return "a100" if any(name in kind for name in ("a100", "a40", "a10", "a30", "rtx")) else "h200"


def select_backend(kernels: Literal["auto", "xla", "pallas"], device: Any) -> Backend:
    """The backend that the config's `kernels` means on a device: auto is Pallas on a GPU and XLA
    elsewhere; Pallas elsewhere is interpreted."""
    on_gpu = device.platform in ("gpu", "cuda")
    if kernels == "xla" or (kernels == "auto" and not on_gpu):
        return XLA
    return Backend("pallas", chip_name(device.device_kind), interpret=not on_gpu)


def are_merged(x: jax.Array | jax.ShapeDtypeStruct, widths: Sequence[int]) -> bool:
    """Whether XLA makes one product of those of x that have so many columns."""
    if any(width % MERGED_COLUMNS for width in widths):
        return False
    sizes = sorted(sum(x.shape) * width + x.size for width in widths)
    return len(sizes) > 1 and sizes[-2] * x.dtype.itemsize <= _MERGED_BYTES
