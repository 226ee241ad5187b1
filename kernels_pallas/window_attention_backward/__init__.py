"""Attention of one window of queries and all earlier keys: its backward, and its forward again."""

from kernels_pallas.window_attention_backward.api import (
    window_attention,
    window_attention_backward,
)

__all__ = ["window_attention", "window_attention_backward"]
