"""The interface of every PEFT method: a bypass network beside a frozen projection (FlexLLM, section
4).

The decoder calls `bypass(module, x, y)` with the input x [T, d_in] and the output y [T, d_out] of
the base projection named `module` (q, k, v, o, gate, up or down) and goes on with what it returns.
A bypass is a pure function of arrays, so it runs, and is differentiated, inside the step programs.
"""

from collections.abc import Callable

import jax

Bypass = Callable[[str, jax.Array, jax.Array], jax.Array]


def no_bypass(module: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The base model alone."""
    return y
