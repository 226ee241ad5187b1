"""Picks the implementation of the window's attention backward. The XLA reference is the only one so
far."""

from kernels_pallas.window_attention_backward.base import window_attention_backward

__all__ = ["window_attention_backward"]
