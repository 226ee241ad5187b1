"""The mixing of a layer in a backward unit: computed again where it was not saved, and its
backward, with what it carries from one slice of tokens to the one before."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from flexllm_jax.finetune.buffers import MicrobatchTable
from flexllm_jax.models.decoder import Decoder, DecoderLayer
from flexllm_jax.models.mixers.attention import sinks_of
from flexllm_jax.models.mixers.gated_delta import rule_inputs
from flexllm_jax.models.rope import Angles
from flexllm_jax.models.spec import AttentionSpec, GatedDeltaSpec
from flexllm_jax.peft.bypass import Bypass
from kernels_pallas.attention_backward import attention_backward, attention_of_slice
from kernels_pallas.backend import Backend
from kernels_pallas.gated_delta import conv_window, delta_window, delta_window_backward
from kernels_pallas.layer_passes import rotate, rotate_back_and_clear
from kernels_pallas.rows import Rows, as_array, from_stored


class Slice(NamedTuple):
    """The tokens of a unit.

    table: of the whole microbatch. start: first token slot. of: the slice's rows of an array of all
    token slots. is_token: which slots hold one.
    """

    table: MicrobatchTable
    start: Int[Array, ""]
    of: Callable[[jax.Array], jax.Array]
    is_token: Bool[Array, " U"]


class Pulled(NamedTuple):
    """Gradients: of what is mixed, of the adapter's part in it, and what is carried on."""

    projected: tuple[jax.Array, ...]
    adapter: dict
    carried: dict[str, jax.Array]


@dataclass(frozen=True)
class UnitMixing(ABC):
    """A layer's mixing in a unit.

    layer: a `DecoderLayer`. cache: what it keeps of sequences. saved: what the forward kept of it.
    kept: what it kept of the unit's activations. bypass: of the mixing.
    """

    decoder: Decoder
    layer: Any
    tokens: Slice
    cache: dict[str, jax.Array]
    saved: dict[str, jax.Array]
    kept: dict[str, Rows]
    bypass: Bypass
    backend: Backend

    @property
    def query_factor(self) -> jax.Array | None:
        """What queries are multiplied by."""
        return None

    @abstractmethod
    def forward(
        self, projected: tuple[jax.Array, ...]
    ) -> tuple[jax.Array | Rows, Callable[[jax.Array, dict], Pulled]]:
        """What is mixed of the projections, and the backward: of the gradient of that and of what
        is carried from the slice behind."""


class UnitAttention(UnitMixing):
    """Attention of a unit's queries to the keys of their sequences, which are in pages."""

    @cached_property
    def _angles(self) -> Angles:
        positions = self.tokens.of(self.tokens.table.position)
        return self.decoder.angles(positions, self.layer.spec.mixer)

    @property
    def query_factor(self) -> jax.Array | None:
        """See `UnitMixing`."""
        return self._angles.query_factor

    def forward(
        self, projected: tuple[jax.Array, ...]
    ) -> tuple[jax.Array | Rows, Callable[[jax.Array, dict], Pulled]]:
        """See `UnitMixing`."""
        spec: AttentionSpec = self.layer.spec.mixer
        options, bypass = spec.options, self.bypass
        table, start = self.tokens.table, self.tokens.start
        q = rotate(projected[0], self._angles.rotation)
        where = (self.cache["k"], self.cache["v"], table.kv_slot)
        shared = jnp.stack([table.shared_start, table.shared_end], axis=1)
        where += (self.tokens.of(table.sequence_start), self.tokens.of(shared).T, start)
        if "attended" in self.kept:
            attended = self.kept["attended"]
            lse = Rows(self.saved["lse"], start, self.tokens.is_token, (0, q.shape[1]))
        else:
            own = {"sinks": sinks_of(self.layer), "options": options}
            attended, lse = attention_of_slice(q, *where, **own, backend=self.backend)
            attended, lse = bypass.attend(q, attended, lse, options)

        def pull(d_attended: jax.Array, carried: dict) -> Pulled:
            d_attended = d_attended.reshape(q.shape)
            dq, dk, dv = attention_backward(
                q,
                *where,
                attended,
                lse,
                d_attended,
                carried["dk"],
                carried["dv"],
                options=options,
                backend=self.backend,
            )
            known = as_array(attended).reshape(q.shape), as_array(lse)
            dq, adapter = bypass.attend_backward(dq, q, *known, d_attended, options)
            if not spec.own_keys:  # dK and dV stay, for the layer whose keys they are of
                cos, sin = self._angles.rotation
                return Pulled((rotate(dq, (cos, -sin)),), adapter, {"dk": dk, "dv": dv})
            *projected, dk, dv = rotate_back_and_clear(
                dq, dk, dv, self._angles.rotation, start, backend=self.backend
            )
            return Pulled(tuple(projected), adapter, {"dk": dk, "dv": dv})

        return attended, pull


class UnitDelta(UnitMixing):
    """The gated delta rule over a unit's tokens, from the state that the forward kept before
    them."""

    def forward(
        self, projected: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, Callable[[jax.Array, dict], Pulled]]:
        """See `UnitMixing`."""
        layer, tokens, backend = self.layer, self.tokens, self.backend
        units, begins = projected[0].shape[0], tokens.of(tokens.table.sequence_start)
        which, kept = tokens.start // units, layer.spec.mixer.width - 1
        first = begins == tokens.start + jnp.arange(units)
        state = self.saved["state"][which]
        # Inputs before the slice, as far as they are of the sequence that it begins with.
        tail = from_stored(self.saved["tail"][which]).reshape(kept, -1)
        of_sequence = (tokens.start + jnp.arange(-kept, 0) >= begins[0])[:, None]

        def inputs(u, b, a, tail):
            tail = jnp.where(of_sequence, tail, 0)
            convolved = conv_window(u, layer.conv.weight[...], tail, first)
            return rule_inputs(layer, convolved, b, a)

        given, pull_inputs = jax.vjp(inputs, *projected, tail.astype(projected[0].dtype))
        rest = (first, tokens.is_token, state)
        out, _ = delta_window(*given, *rest, backend=backend)

        def pull(d_out: jax.Array, carried: dict) -> Pulled:
            *d_given, d_state = delta_window_backward(
                *(*given, *rest, d_out, carried["state"][0]), backend=backend
            )
            du, db, da, d_tail = pull_inputs(tuple(d_given))
            # What the slice behind passes on is of the last inputs here, or of those before.
            both = jnp.concatenate([d_tail, du]).astype(jnp.float32)
            passed = carried["tail"].reshape(kept, -1)
            both = both.at[units:].add(passed)
            carried = {"state": d_state[None], "tail": both[:kept].reshape(1, -1)}
            return Pulled((both[kept:].astype(du.dtype), db, da), {}, carried)

        return out, pull


_KINDS: dict[type, type[UnitMixing]] = {AttentionSpec: UnitAttention, GatedDeltaSpec: UnitDelta}


def unit_mixing(decoder: Decoder, layer: DecoderLayer, *arguments: Any) -> UnitMixing:
    """The mixing of a layer in a unit; the other arguments are those of `UnitMixing`."""
    return _KINDS[type(layer.spec.mixer)](decoder, layer, *arguments)
