"""The mixing of a layer in a backward unit: computed again where it was not saved, and its
backward, with what it carries from one slice of tokens to the one before."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from flexllm_jax.finetune.buffers import MicrobatchTable
from flexllm_jax.models.decoder import Decoder, DecoderLayer
from flexllm_jax.models.mixers.gated_delta import rule_inputs
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


class UnitAttention:
    """Attention of a unit's queries to the keys of their sequences, which are in pages.

    cache: the layer's pages. saved: what the forward kept of the layer. kept: what it kept of the
    unit's activations. bypass: of attention.
    """

    def __init__(
        self,
        decoder: Decoder,
        layer: Any,
        tokens: Slice,
        cache: dict,
        saved: dict,
        kept: dict[str, Rows],
        bypass: Bypass,
        backend: Backend,
    ):
        self._tokens, self._bypass, self._backend = tokens, bypass, backend
        self._cache, self._saved, self._kept = cache, saved, kept
        self._spec: AttentionSpec = layer.spec.mixer
        self._angles = decoder.angles(tokens.of(tokens.table.position), self._spec)
        self.query_factor = self._angles.query_factor

    def forward(
        self, projected: tuple[jax.Array, ...]
    ) -> tuple[jax.Array | Rows, Callable[[jax.Array, dict], Pulled]]:
        """What attention returned, and its backward: of the gradient of that and of what is
        carried from the slice behind."""
        options, bypass = self._spec.options, self._bypass
        table, start = self._tokens.table, self._tokens.start
        q = rotate(projected[0], self._angles.rotation)
        where = (self._cache["k"], self._cache["v"], table.kv_slot)
        where += (self._tokens.of(table.sequence_start), start)
        if "attended" in self._kept:
            attended = self._kept["attended"]
            lse = Rows(self._saved["lse"], start, self._tokens.is_token, (0, q.shape[1]))
        else:
            attended, lse = attention_of_slice(q, *where, options=options, backend=self._backend)
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
                backend=self._backend,
            )
            known = as_array(attended).reshape(q.shape), as_array(lse)
            dq, adapter = bypass.attend_backward(dq, q, *known, d_attended, options)
            if not self._spec.own_keys:  # dK and dV stay, for the layer whose keys they are of
                cos, sin = self._angles.rotation
                return Pulled((rotate(dq, (cos, -sin)),), adapter, {"dk": dk, "dv": dv})
            *projected, dk, dv = rotate_back_and_clear(
                dq, dk, dv, self._angles.rotation, start, backend=self._backend
            )
            return Pulled(tuple(projected), adapter, {"dk": dk, "dv": dv})

        return attended, pull


class UnitDelta:
    """The gated delta rule over a unit's tokens, from the state that the forward kept before them.

    The arguments are those of `UnitAttention`.
    """

    query_factor = None

    def __init__(
        self,
        decoder: Decoder,
        layer: Any,
        tokens: Slice,
        cache: dict,
        saved: dict,
        kept: dict[str, jax.Array],
        bypass: Bypass,
        backend: Backend,
    ):
        self._layer, self._tokens, self._saved, self._backend = layer, tokens, saved, backend

    def forward(
        self, projected: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, Callable[[jax.Array, dict], Pulled]]:
        """What the rule returned, and its backward, as of `UnitAttention`."""
        layer, tokens, backend = self._layer, self._tokens, self._backend
        units, begins = projected[0].shape[0], tokens.of(tokens.table.sequence_start)
        which, kept = tokens.start // units, layer.spec.mixer.width - 1
        first = begins == tokens.start + jnp.arange(units)
        state = self._saved["state"][which]
        # Inputs before the slice, as far as they are of the sequence that it begins with.
        tail = from_stored(self._saved["tail"][which]).reshape(kept, -1)
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


_KINDS: dict[type, Any] = {AttentionSpec: UnitAttention, GatedDeltaSpec: UnitDelta}


def unit_mixing(decoder: Decoder, layer: DecoderLayer, *arguments: Any) -> Any:
    """The mixing of a layer in a unit; the other arguments are its class's."""
    return _KINDS[type(layer.spec.mixer)](decoder, layer, *arguments)
