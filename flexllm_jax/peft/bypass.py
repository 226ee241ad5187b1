"""The interface of every PEFT method: a bypass network beside frozen projections (FlexLLM, section
4).

The decoder calls `bypass(x, outputs)` once for all projections that read the same input: x [T,
d_in], and by name (q, k, v, o, gate, up or down) each projection's output [T, d_out]. It goes on
with the outputs that it gets back. A bypass is a pure function of arrays, so it runs, and is
differentiated, inside the step programs.
"""

from collections.abc import Callable

import jax

Outputs = dict[str, jax.Array]
Bypass = Callable[[jax.Array, Outputs], Outputs]


def no_bypass(x: jax.Array, outputs: Outputs) -> Outputs:
    """The base model alone."""
    return outputs
