"""What the microbatches in work have on the device: a table of their tokens, what the forward keeps
of each layer, and what flows through the backward.

A microbatch is S token slots of packed sequences of one job. Every array has S rows, allocated once
for `finetune.max_tokens`.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.spec import GatedDeltaSpec, LayerSpec, MixerSpec


class MicrobatchTable(NamedTuple):
    """What the device knows of each token slot of the microbatches in work; packed as int32
    [TABLE_ROWS, S], floats as their bits.

    label: token to predict next, or -1 where no loss counts. position: in its sequence. kv_slot:
    page * page_size + offset of its key. sequence_start: token slot of its sequence's first token
    (S for padding, which then attends to nothing). pair_start: that of the other sequence of its
    pair. shared_start, shared_end: token slots of the tokens that come before its sequence and
    others', too; both sequence_start where there are none. weight, reference, advantage: float32,
    what the loss takes (`losses.LossTokens`).
    """

    label: Any
    position: Any
    kv_slot: Any
    sequence_start: Any
    pair_start: Any
    shared_start: Any
    shared_end: Any
    weight: Any
    reference: Any
    advantage: Any

    @classmethod
    def empty(cls, slots: int) -> tuple["MicrobatchTable", np.ndarray]:
        """A table of padding alone on the host, and the packed array whose rows are its fields."""
        packed = np.zeros((TABLE_ROWS, slots), np.int32)
        table = cls(*packed[:_INT_ROWS], *packed[_INT_ROWS:].view(np.float32))
        table.label[:] = -1
        for starts in (
            table.sequence_start,
            table.pair_start,
            table.shared_start,
            table.shared_end,
        ):
            starts[:] = slots
        return table, packed

    @classmethod
    def unpack(cls, packed: Int[Array, "10 S"]) -> "MicrobatchTable":
        """The fields of the packed array, on the device."""
        floats = lax.bitcast_convert_type(packed[_INT_ROWS:], jnp.float32)
        return cls(*packed[:_INT_ROWS], *floats)


TABLE_ROWS, _INT_ROWS = len(MicrobatchTable._fields), 7


# Where an activation lies in the row that a layer saves of a token: by kind of layer, by name.
Columns = tuple[dict[str, slice], ...]


def saved_columns(decoder: Decoder, names: Collection[str]) -> Columns:
    """Of each kind of layer: its input, what tokens have for it alone, and those of its
    `decoder.taps` that are named."""
    return tuple(columns_of_kind(decoder, spec, names) for spec in decoder.config.kinds)


def columns_of_kind(decoder: Decoder, spec: LayerSpec, names: Collection[str]) -> dict[str, slice]:
    """Those of one kind."""
    taps = decoder.taps(spec)
    given = {"x": decoder.config.d_model, "token": spec.token_width}
    widths = {name: width for name, width in given.items() if width is not None}
    widths |= {name: taps[name] for name in taps if name in names}
    columns, at = {}, 0
    for name, width in widths.items():
        columns[name], at = slice(at, at + width), at + width
    return columns


def saved_shapes(
    config: ModelConfig, dtype: jnp.dtype, slots: int, unit_tokens: int, columns: Columns
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of what the forward keeps of each layer, in one array so that one write keeps it
    all; attention's log-sum-exp goes with its output. Of a gated delta net the state before each
    slice of a unit, and the last inputs of its convolution there, side by side."""
    slices = slots // unit_tokens

    def shapes(spec: LayerSpec, own: dict[str, slice]) -> dict[str, jax.ShapeDtypeStruct]:
        width = max(c.stop for c in own.values())
        kept = {"activations": jax.ShapeDtypeStruct((slots, width), dtype)}
        mixer = spec.mixer
        if isinstance(mixer, GatedDeltaSpec):
            tail = (slices, (mixer.width - 1) * mixer.channels)
            kept["state"] = jax.ShapeDtypeStruct((slices, *mixer.state), jnp.float32)
            kept["tail"] = jax.ShapeDtypeStruct(tail, dtype)
        elif "attended" in own:
            kept["lse"] = jax.ShapeDtypeStruct((slots, mixer.heads), jnp.float32)
        return kept

    kinds = [shapes(spec, own) for spec, own in zip(config.kinds, columns, strict=True)]
    return [kinds[kind] for kind in config.kind_of]


def flow_shapes(config: ModelConfig, dtype: jnp.dtype, slots: int) -> dict[str, Any]:
    """Shapes of what flows through the backward: `stream`, which holds the last layer's outputs and
    then gradients, of each layer's output in turn; each label's log-probability, 0 where there is
    none; and what a layer's mixer carries from one unit to the next, zeros between layers: dK and
    dV of attention; of a gated delta net the gradients of the state and of the last inputs of its
    convolution, before the unit. `carried` is by `ModelConfig.mixers`."""

    def carried(mixer: MixerSpec) -> dict[str, jax.ShapeDtypeStruct]:
        if isinstance(mixer, GatedDeltaSpec):
            tail = (1, (mixer.width - 1) * mixer.channels)
            shapes = {"state": (1, *mixer.state), "tail": tail}
            return {n: jax.ShapeDtypeStruct(shape, jnp.float32) for n, shape in shapes.items()}
        shape = (slots, mixer.kv_heads, mixer.head_dim)
        return dict.fromkeys(("dk", "dv"), jax.ShapeDtypeStruct(shape, jnp.float32))

    return {
        "stream": jax.ShapeDtypeStruct((slots, config.d_model), dtype),
        "carried": [carried(mixer) for mixer in config.mixers],
        "logprob": jax.ShapeDtypeStruct((slots,), jnp.float32),
    }


def without_padding(values: Float[Array, "U X"], is_token: Bool[Array, " U"]) -> jax.Array:
    """Zeros in the padding, where an earlier microbatch may have left NaN: 0 * NaN is NaN."""
    return jnp.where(is_token[:, None], values, 0)
