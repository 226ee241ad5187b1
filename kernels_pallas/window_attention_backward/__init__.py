"""Backward of attention for one window of queries against all earlier keys."""

from kernels_pallas.window_attention_backward.api import window_attention_backward

__all__ = ["window_attention_backward"]
