"""Attention of one slice of a microbatch's queries to all keys before them: its backward, and its
forward again."""

from kernels_pallas.attention_backward.api import (
    attention_backward,
    attention_of_slice,
)

__all__ = ["attention_backward", "attention_of_slice"]
