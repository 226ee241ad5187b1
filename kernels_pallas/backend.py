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

Kernels = Literal["auto", "xla", "pallas", "mosaic"]  # the config's field


@dataclass(frozen=True)
class Backend:
    """A choice of kernels, static in every program that uses them.

    implementation: "xla" (the references, which run anywhere) or "pallas" (Triton, for NVIDIA
    GPUs). chip: whose tuning table gives the tiles (`chip_name`). interpret: run Pallas kernels in
    its interpreter, which needs no GPU and is slow. mosaic: where an operator has a kernel in
    Pallas' Mosaic, for Hopper GPUs, that takes the shapes at hand, it goes before Triton's.
    """

    implementation: Literal["xla", "pallas"]
    chip: str = "h200"
    interpret: bool = False
    mosaic: bool = False


XLA = Backend("xla")
# The first JAX whose interpreter knows what Mosaic's kernels are made of.
MOSAIC_INTERPRETER = (0, 11, 0)


def chip_name(device_kind: str) -> str:
    """The tuning tables' name of a device kind: "NVIDIA H200" is h200, "NVIDIA A100-SXM4-80GB" is
    a100; a GPU without a table of its own goes by the nearest generation's."""
    kind = device_kind.lower()
    return "a100" if any(name in kind for name in ("a100", "a40", "a10", "a30", "rtx")) else "h200"


def is_hopper(device_kind: str) -> bool:
    """Whether a device has what Mosaic's kernels are made of: "NVIDIA H100 80GB HBM3" has."""
    return any(name in device_kind.lower() for name in ("h100", "h20", "h800"))


def select_backend(kernels: Kernels, device: Any) -> Backend:
    """The backend that the config's `kernels` means on a device: auto is Pallas on a GPU and XLA
    elsewhere; Pallas elsewhere is interpreted. ValueError where Mosaic's kernels cannot run."""
    on_gpu = device.platform in ("gpu", "cuda")
    if kernels == "xla" or (kernels == "auto" and not on_gpu):
        return XLA
    mosaic = kernels == "mosaic"
    if mosaic and on_gpu and not is_hopper(device.device_kind):
        raise ValueError(
            f"kernels=mosaic is for Hopper GPUs (H100, H200), not for {device.device_kind}: "
            "use auto"
        )
    if mosaic and not on_gpu and jax.__version_info__ < MOSAIC_INTERPRETER:
        raise ValueError(
            "kernels=mosaic without a GPU is interpreted, which JAX can from version "
            f"{'.'.join(map(str, MOSAIC_INTERPRETER))} on, not {jax.__version__}: use pallas"
        )
    return Backend("pallas", chip_name(device.device_kind), interpret=not on_gpu, mosaic=mosaic)


def are_merged(x: jax.Array | jax.ShapeDtypeStruct, widths: Sequence[int]) -> bool:
    """Whether XLA makes one product of those of x that have so many columns."""
    if any(width % MERGED_COLUMNS for width in widths):
        return False
    sizes = sorted(sum(x.shape) * width + x.size for width in widths)
    return len(sizes) > 1 and sizes[-2] * x.dtype.itemsize <= _MERGED_BYTES
