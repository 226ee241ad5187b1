"""The gated delta rule, a recurrence whose state is a matrix for each head, and the short causal
convolution before it: over a step's ragged batch, and over a window of training."""

from kernels_pallas.gated_delta.api import (
    causal_conv,
    conv_window,
    delta_rule,
    delta_window,
    delta_window_backward,
    inputs_before,
)
from kernels_pallas.gated_delta.base import CHUNK

__all__ = [
    "CHUNK",
    "causal_conv",
    "conv_window",
    "delta_rule",
    "delta_window",
    "delta_window_backward",
    "inputs_before",
]
