"""What a decoder layer does between its products, each in one pass over its arrays."""

from kernels_pallas.layer_passes.api import (
    add_norm,
    gated,
    rotate_and_write,
    rotate_back_and_clear,
    write_rows,
)
from kernels_pallas.layer_passes.base import normed, rotate

__all__ = [
    "add_norm",
    "gated",
    "normed",
    "rotate",
    "rotate_and_write",
    "rotate_back_and_clear",
    "write_rows",
]
