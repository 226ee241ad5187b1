"""The mixing of a layer in a backward unit: computed again where it was not saved, and its
backward, with what it carries from one slice of tokens to the one before."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Int

from flexllm_jax.finetune.buffers import MicrobatchTable
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.spec import AttentionSpec
from flexllm_jax.peft.bypass import Bypass
from kernels_pallas.attention_backward import attention_backward, attention_of_slice
from kernels_pallas.backend import Backend
from kernels_pallas.layer_passes import rotate, rotate_back_and_clear
from kernels_pallas.rows import Rows, as_array


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
        spec: AttentionSpec,
        tokens: Slice,
        cache: dict,
        saved: dict,
        kept: dict[str, Rows],
        bypass: Bypass,
        backend: Backend,
    ):
        self._spec, self._tokens, self._bypass, self._backend = spec, tokens, bypass, backend
        self._cache, self._saved, self._kept = cache, saved, kept
        self._angles = decoder.angles(tokens.of(tokens.table.position), spec)
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


_KINDS: dict[type, Any] = {AttentionSpec: UnitAttention}


def unit_mixing(decoder: Decoder, spec: Any, *arguments: Any) -> Any:
    """The mixing of a layer with this mixer in a unit; the other arguments are its class's."""
    return _KINDS[type(spec)](decoder, spec, *arguments)
