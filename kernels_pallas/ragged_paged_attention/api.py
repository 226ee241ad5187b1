"""Picks the implementation."""

from kernels_pallas.ragged_paged_attention import base
from kernels_pallas.backend import XLA, Backend


def ragged_paged_attention(*arguments, backend: Backend = XLA):
    """See `base.ragged_paged_attention`."""
    return base.ragged_paged_attention(*arguments)
