"""Picks the implementation."""

from kernels_pallas.window_attention_backward import base
from kernels_pallas.backend import XLA, Backend


def window_attention_backward(*arguments, backend: Backend = XLA):
    """See `base.window_attention_backward`."""
    return base.window_attention_backward(*arguments)
