"""The interface through which an adapter joins the decoder: a bypass beside frozen projections,
Y = f_B(X) + f_A(X) (FlexLLM, section 4).

The decoder calls `bypass(x, outputs, join)` once for all projections that read the same input: x
[T, d_in], and by name (q, k, v, o, gate, up or down) each projection's output [T, d_out]. It goes
on with the outputs that it gets back. Of a projection that is split over devices the output is a
summand, and `join` the all-reduce that makes it whole: LoRA adds to the summand, and so joins the
base model's all-reduce; a bottleneck reads the whole.
"""

from collections.abc import Callable, Collection
from typing import Any, Protocol

import jax

from kernels_pallas.grouped_lora import Ahead

Outputs = dict[str, Any]  # projection (q, k, v, o, gate, up or down) -> its output [T, d_out]
Join = Callable[[jax.Array], jax.Array]


def whole_already(output: jax.Array) -> jax.Array:
    """Nothing to join."""
    return output


class BypassFunction(Protocol):
    """What the decoder calls."""

    def __call__(self, x: Any, outputs: Outputs, join: Join = ...) -> Outputs:
        """The outputs with what adapters make of them."""
        ...

    def ahead(self, names: Collection[str]) -> Ahead | None:
        """What the bypass of these projections does first with what they read: a pass that makes
        that may begin with it, and give it to the call as `x`. None: nothing that it may."""
        ...


class NoBypass:
    """The base model alone."""

    def __call__(self, x: Any, outputs: Outputs, join: Join = whole_already) -> Outputs:
        """The outputs, whole."""
        return {name: join(output) for name, output in outputs.items()}

    def ahead(self, names: Collection[str]) -> None:
        """Nothing."""


no_bypass = NoBypass()
