"""How a step's tokens are mixed in a layer: what reads and writes that which the layer keeps of its
sequences, and what it keeps of finetuning tokens beside activations."""

from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flexllm_jax.engine.memory.step_inputs import StepInputs
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.mixers.attention import sinks_of
from flexllm_jax.models.mixers.gated_delta import rule_inputs
from flexllm_jax.models.rope import Angles
from flexllm_jax.models.spec import AttentionSpec, GatedDeltaSpec, MixerSpec
from flexllm_jax.peft.bypass import Bypass
from kernels_pallas.backend import Backend, are_merged
from kernels_pallas.gated_delta import causal_conv, delta_rule, inputs_before
from kernels_pallas.layer_passes import rotate, rotate_and_write
from kernels_pallas.ragged_paged_attention import ragged_paged_attention
from kernels_pallas.rows import as_array, set_rows


class Mixed(NamedTuple):
    """What mixing returns.

    output: [T, N, H]. cache: what the layer keeps of sequences. rows: by name, what is kept of each
    finetuning token, [T, ...]. saved: what is kept of them otherwise, already written.
    """

    output: Float[Array, "T N H"]
    cache: dict[str, jax.Array]
    rows: dict[str, jax.Array]
    saved: dict[str, jax.Array]


class StepMixing:
    """The mixing of one step, in layers of any kind; what layers share is made once.

    rows: of requests. backend: which kernels to use. passes: which for what goes once over the
    tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        inputs: StepInputs,
        page_tables: Int[Array, "S M"],
        rows: int,
        backend: Backend,
        passes: Backend,
    ):
        self._inputs, self._page_tables = inputs, page_tables
        self._sequences = _sequences(inputs, rows)
        self._backend, self._passes = backend, passes
        self._d_model = decoder.config.d_model
        ropes = {(a.rope, a.head_dim): a for a in decoder.config.attention}
        self._angles = {
            key: decoder.angles(inputs.position, attention) for key, attention in ropes.items()
        }

    def query_factor(self, spec: MixerSpec) -> Float[Array, "T 1 1"] | None:
        """What a layer's queries are multiplied by."""
        return self._angles_of(spec).query_factor if isinstance(spec, AttentionSpec) else None

    def __call__(
        self,
        layer: Any,
        projected: tuple[jax.Array, ...],
        cache: dict[str, jax.Array],
        saved: dict[str, jax.Array] | None,
        adapters: Bypass | None,
    ) -> Mixed:
        """Mix what `DecoderLayer.project` gave, with what the layer keeps in `cache` (donated), and
        keep what the backward needs in `saved` (donated)."""
        if isinstance(layer.spec.mixer, GatedDeltaSpec):
            return self._remember(layer, projected, cache, saved)
        return self._attend(layer, projected, cache, adapters)

    def _angles_of(self, spec: AttentionSpec) -> Angles:
        return self._angles[spec.rope, spec.head_dim]

    def _attend(
        self,
        layer: Any,
        projected: tuple[jax.Array, ...],
        cache: dict[str, jax.Array],
        adapters: Bypass | None,
    ) -> Mixed:
        """Write keys and values to their pages, and attend to those of the tokens before."""
        spec: AttentionSpec = layer.spec.mixer
        inputs, rotation = self._inputs, self._angles_of(spec).rotation
        pages = [cache["k"], cache["v"]]
        if spec.own_keys:
            q, *pages = rotate_and_write(
                *(*projected, rotation, inputs.kv_slot),
                *pages,
                backend=self._passes,
                merged=self._are_merged(spec, projected),
            )
        else:
            q = rotate(as_array(projected[0]), rotation)
        attended, lse = ragged_paged_attention(
            q,
            *pages,
            inputs.query_starts,
            inputs.kv_lengths,
            self._page_tables,
            inputs.num_decode,
            inputs.num_sequences,
            sinks=sinks_of(layer),
            options=spec.options,
            backend=self._backend,
        )
        if adapters:
            attended, lse = adapters.attend(q, attended, lse, spec.options)
        rows: dict[str, Any] = {"attended": attended.reshape(attended.shape[0], -1), "lse": lse}
        return Mixed(attended, dict(zip(("k", "v"), pages, strict=True)), rows, {})

    def _are_merged(self, spec: AttentionSpec, projected: tuple[jax.Array, ...]) -> bool:
        """Whether queries, keys and values are columns of one array, as they were projected."""
        changed = spec.qk_norm or spec.v_norm or spec.gate or spec.values == "keys"
        if changed or self.query_factor(spec) is not None:
            return False
        tokens, dtype = projected[0].shape[0], projected[0].dtype
        read = jax.ShapeDtypeStruct((tokens, self._d_model), dtype)
        return are_merged(read, [prod(heads.shape[1:]) for heads in projected])

    def _remember(
        self,
        layer: Any,
        projected: tuple[jax.Array, ...],
        cache: dict[str, jax.Array],
        saved: dict[str, jax.Array] | None,
    ) -> Mixed:
        """Move the states of the sequences over their tokens."""
        inputs, own, (u, b, a) = self._inputs, self._sequences, projected
        slots, kept = (own.fresh, own.read, own.write), {}
        windows, unit_tokens = None, u.shape[0]
        if saved is not None:
            windows = saved["state"]
            unit_tokens = saved["activations"].shape[0] // windows.shape[0]
        convolved, tails, before = causal_conv(
            *(u, layer.conv.weight[...], cache["conv"], inputs.query_starts, *slots),
            inputs.num_sequences,
            backend=self._backend,
        )
        out, state, windows = delta_rule(
            *rule_inputs(layer, convolved, b, a),
            *(cache["state"], inputs.query_starts, *slots),
            *(inputs.num_decode, inputs.num_sequences, inputs.saved_row, windows),
            unit_tokens=unit_tokens,
            backend=self._backend,
        )
        if saved is not None:
            kept = {"state": windows, "tail": self._tails(u, before, saved["tail"], unit_tokens)}
        return Mixed(out, {"state": state, "conv": tails}, {}, kept)

    def _tails(
        self,
        u: Float[Array, "T C"],
        before: Float[Array, "S W_minus_1 C"],
        saved: Float[Array, "V W_minus_1_C"],
        unit_tokens: int,
    ) -> Float[Array, "V W_minus_1_C"]:
        """The last inputs of the convolution before each slice of a unit that begins in this step;
        before: those before the step, by sequence."""
        inputs, (slices, _) = self._inputs, saved.shape
        tokens, row = u.shape[0], inputs.saved_row
        begins = (row % unit_tokens == 0) & (row < slices * unit_tokens)
        which = jnp.where(begins, row // unit_tokens, slices + jnp.arange(tokens))
        token = (
            jnp.full(slices, tokens)
            .at[which]
            .set(jnp.arange(tokens), mode="drop", unique_indices=True)
        )
        ends = inputs.query_starts[1:]
        sequence = jnp.searchsorted(ends, token, side="right", method="compare_all")
        sequence = jnp.minimum(sequence, len(before) - 1)
        starts = inputs.query_starts[sequence]
        values = inputs_before(u, before[sequence], starts, token).reshape(slices, -1)
        number = jnp.arange(slices)
        return set_rows(saved, jnp.where(token < tokens, number, slices + number), values)


class _Sequences(NamedTuple):
    """Where the states of a step's sequences are. fresh: one begins here. read, write: the slots of
    its state before and after; it is not written past all slots."""

    fresh: Bool[Array, " S"]
    read: Int[Array, " S"]
    write: Int[Array, " S"]


def _sequences(inputs: StepInputs, rows: int) -> _Sequences:
    """Requests have the slot of their row; of finetuning sequences only the first may go on from an
    earlier step, and only the last be unfinished."""
    lengths = inputs.query_starts[1:] - inputs.query_starts[:-1]
    number = jnp.arange(lengths.shape[0])
    trains = inputs.table >= rows
    read, write = (rows + inputs.unfinished[i] for i in range(2))
    last = number == inputs.num_sequences - 1
    nowhere = jnp.iinfo(jnp.int32).max
    lives = number < inputs.num_sequences
    return _Sequences(
        inputs.kv_lengths == lengths,
        jnp.where(trains, read, inputs.table),
        jnp.where(lives & (last | ~trains), jnp.where(trains, write, inputs.table), nowhere),
    )
