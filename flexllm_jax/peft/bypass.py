"""The bypass of a layer whose tokens carry adapters: those of all kinds, one after the other.

It implements the decoder's interface (`models/bypass.py`). Attention has a bypass too, `attend`, as
it is no part of the decoder's layers. Everything is a pure function of arrays, so it runs, and is
differentiated, inside the step programs.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from flexllm_jax.models.bypass import Join, Outputs, whole_already
from flexllm_jax.peft import prefix
from flexllm_jax.peft.bottleneck import bottleneck
from flexllm_jax.peft.dropout import Dropout
from flexllm_jax.peft.ia3 import SCALED, ia3
from flexllm_jax.peft.lora import lora, lora_ahead
from flexllm_jax.peft.stacks import of_layer
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.grouped_lora import Ahead
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.rows import Recalled, as_array


@dataclass(frozen=True)
class Bypass:
    """The bypass of one layer: those of all kinds that `weights` has sites of.

    An adapter is of one kind; its rows of the others' sites are zero and change nothing.

    weights: site -> name -> [L, A, ...]. scales: site -> [L, A] float32. adapter: row of both for
    each token, or -1 for the base model alone. dropout: of what LoRA reads, in a job's training.
    sums: of the gradients of LoRA's weights, see `lora`. layer: which of the L it is; a stack of
    one is of whatever layer.
    """

    weights: dict
    scales: dict
    adapter: Int[Array, " T"]
    backend: Backend = XLA
    dropout: Dropout | None = None
    sums: dict | None = None
    layer: Int[Array, ""] | int = 0

    def _of_layer(self, sites: Iterable[str]) -> tuple[dict, dict]:
        """Weights and scales of sites in this layer alone."""
        own: Any = [
            {site: of_layer(tree[site], self.layer) for site in sites if site in tree}
            for tree in (self.weights, self.scales)
        ]
        return tuple(own)

    def __call__(
        self, x: jax.Array | Recalled, outputs: Outputs, join: Join = whole_already
    ) -> Outputs:
        """The projections' outputs with what the adapters make of them."""
        split = join is not whole_already  # then x, too, is split over devices
        stacked = (self.weights, self.scales, self.adapter)
        outputs = lora(
            *(*stacked, x, outputs, self.layer, self.backend, self.dropout, self.sums),
            split=split,
        )
        outputs = ia3(*self._of_layer(SCALED), self.adapter, outputs)
        if split:
            outputs = {name: join(as_array(output)) for name, output in outputs.items()}
        return bottleneck(*stacked, outputs, self.layer, self.backend)

    def ahead(self, names: Collection[str]) -> Ahead | None:
        """See `models.bypass.BypassFunction`."""
        if self.dropout is not None or self.sums is not None:
            return None
        stacked = (self.weights, self.scales, self.adapter)
        return lora_ahead(*stacked, names, self.layer, self.backend)

    def attend(
        self,
        query: Float[Array, "T N H"],
        attended: Float[Array, "T N H"],
        lse: Float[Array, "T N"],
        options: AttentionOptions = FULL,
    ) -> tuple[Float[Array, "T N H"], Float[Array, "T N"]]:
        """Attention's output and the logarithm of its denominator, with prefixes."""
        if prefix.SITE not in self.weights:
            return attended, lse
        own, lengths = self._prefix
        return prefix.join_prefix(own, lengths, self.adapter, query, attended, lse, options)

    @property
    def _prefix(self) -> tuple[dict, jax.Array]:
        weights, scales = self._of_layer([prefix.SITE])
        return weights[prefix.SITE], scales[prefix.SITE]

    def attend_backward(
        self,
        d_query: Float[Array, "T N H"],
        query: Float[Array, "T N H"],
        attended: Float[Array, "T N H"],
        lse: Float[Array, "T N"],
        d_attended: Float[Array, "T N H"],
        options: AttentionOptions = FULL,
    ) -> tuple[Float[Array, "T N H"], dict]:
        """`d_query` with what `attend` adds to it, and the layer's gradients by site [A, ...];
        attended and lse are what it returned."""
        if prefix.SITE not in self.weights:
            return d_query, {}
        own, lengths = self._prefix
        added, gradients = prefix.join_prefix_backward(
            own, lengths, self.adapter, query, attended, lse, d_attended, options
        )
        return d_query + added, {prefix.SITE: gradients}
