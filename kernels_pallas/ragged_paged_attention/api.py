"""Picks the implementation of ragged paged attention. The XLA reference is the only one so far."""

from kernels_pallas.ragged_paged_attention.base import ragged_paged_attention

__all__ = ["ragged_paged_attention"]
