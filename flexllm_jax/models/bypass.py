"""The interface through which an adapter joins the decoder: a bypass beside frozen projections,
Y = f_B(X) + f_A(X) (FlexLLM, section 4).

The decoder calls `bypass(x, outputs, join)` once for all projections that read the same input: x
[T, d_in], and by name (q, k, v, o, gate, up or down) each projection's output [T, d_out]. It goes
on with the outputs that it gets back. Of a projection that is split over devices the output is a
summand, and `join` the all-reduce that makes it whole: LoRA adds to the summand, and so joins the
base model's all-reduce; a bottleneck reads the whole.
"""

from collections.abc import Callable

import jax

Outputs = dict[str, jax.Array]  # projection (q, k, v, o, gate, up or down) -> its output [T, d_out]
Join = Callable[[jax.Array], jax.Array]
BypassFunction = Callable[..., Outputs]


def whole_already(output: jax.Array) -> jax.Array:
    """Nothing to join."""
    return output


def no_bypass(x: jax.Array, outputs: Outputs, join: Join = whole_already) -> Outputs:
    """The base model alone."""
    return {name: join(output) for name, output in outputs.items()}
