"""What the microbatches in work have on the device: a table of their tokens, what the forward keeps
of each layer, and what flows through the backward.

A microbatch is S token slots of packed sequences of one job. Every array has S rows, allocated once
for `finetune.max_tokens`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder


@dataclass(frozen=True)
class MicrobatchTable:
    """What the device knows of each token slot of the microbatch in work; int32, packed as [4, S].

    label: token to predict next, or -1 where no loss counts. position: in its sequence. kv_slot:
    page * page_size + offset of its key. sequence_start: token slot of its sequence's first token
    (S for padding, which then attends to nothing).
    """

    label: jax.Array
    position: jax.Array
    kv_slot: jax.Array
    sequence_start: jax.Array

    @classmethod
    def unpack(cls, packed: Int[Array, "4 S"]) -> "MicrobatchTable":
        """The fields of the packed array."""
        return cls(*packed)


def saved_columns(decoder: Decoder, names: tuple[str, ...]) -> dict[str, slice]:
    """Columns of a layer's saved activations: its input, and those of `decoder.taps` named."""
    taps = decoder.taps()
    widths = {"x": decoder.config.d_model} | {name: taps[name] for name in names}
    columns, at = {}, 0
    for name, width in widths.items():
        columns[name], at = slice(at, at + width), at + width
    return columns


def saved_shapes(
    config: ModelConfig, dtype: jnp.dtype, slots: int, columns: dict[str, slice]
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of what the forward keeps of each layer, in one array so that one write keeps it
    all; attention's log-sum-exp goes with its output."""
    width = max(c.stop for c in columns.values())
    shapes = {"activations": jax.ShapeDtypeStruct((slots, width), dtype)}
    if "attended" in columns:
        shapes["lse"] = jax.ShapeDtypeStruct((slots, config.num_heads), jnp.float32)
    return [shapes] * config.num_layers


def flow_shapes(
    config: ModelConfig, dtype: jnp.dtype, slots: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what flows through the backward: `stream`, which holds the last layer's outputs and
    then gradients, of each layer's output in turn; the layer's dK and dV; and each label's
    log-probability."""
    kv = jax.ShapeDtypeStruct((slots, config.num_kv_heads, config.head_dim), jnp.float32)
    return {
        "stream": jax.ShapeDtypeStruct((slots, config.d_model), dtype),
        "dk": kv,
        "dv": kv,
        "logprob": jax.ShapeDtypeStruct((slots,), jnp.float32),
    }


def without_padding(values: Float[Array, "U X"], is_token: Bool[Array, " U"]) -> jax.Array:
    """Zeros in the padding, where an earlier microbatch may have left NaN: 0 * NaN is NaN."""
    return jnp.where(is_token[:, None], values, 0)
