"""Token-level backward (FlexLLM, section 6): the loss of a window, and one layer of the backward
for one window.

A microbatch is S token slots of packed sequences of one job. The forward leaves, for every layer,
its input and what the plan of saved activations names, and the last layer's output in `dx`. A loss
unit turns a window of `dx` into the loss's gradient; a layer unit takes a window of `dx` from the
gradient of the layer's output to that of its input. Units run window after window from the last to
the first, layer after layer from the last to the first, at any later time. Frozen weights are never
differentiated, and no residual leaves a program.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flexllm_jax.models.collectives import join_softmax, rows_of
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder, optional_activations
from flexllm_jax.peft.bypass import Bypass
from kernels_pallas.backend import Backend
from kernels_pallas.window_attention_backward import window_attention_backward

_VOCABULARY_CHUNK = 4096


@dataclass(frozen=True)
class MicrobatchTable:
    """What the device knows of each token slot of the microbatch in work; int32, packed as [4, S].

    label: token to predict next, or -1 where no loss counts. position: in its sequence. kv_slot:
    page * page_size + offset of its key. sequence_start: slot of its sequence's first token (S for
    padding, which then attends to nothing).
    """

    label: jax.Array
    position: jax.Array
    kv_slot: jax.Array
    sequence_start: jax.Array

    @classmethod
    def unpack(cls, packed: Int[Array, "4 S"]) -> "MicrobatchTable":
        """The fields of the packed array."""
        return cls(*packed)


def saved_columns(config: ModelConfig, names: tuple[str, ...]) -> dict[str, slice]:
    """Columns of a layer's saved activations: its input, attention's output, and those named."""
    widths = {"x": config.d_model, "attended": config.num_heads * config.head_dim}
    widths |= {name: optional_activations(config)[name] for name in names}
    columns, at = {}, 0
    for name, width in widths.items():
        columns[name], at = slice(at, at + width), at + width
    return columns


def saved_shapes(
    config: ModelConfig, dtype: jnp.dtype, slots: int, columns: dict[str, slice]
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Shapes of what the forward keeps of each layer, in one array so that one write keeps it
    all."""
    width = max(c.stop for c in columns.values())
    shapes = {
        "activations": jax.ShapeDtypeStruct((slots, width), dtype),
        "lse": jax.ShapeDtypeStruct((slots, config.num_heads), jnp.float32),
    }
    return [shapes] * config.num_layers


def flow_shapes(
    config: ModelConfig, dtype: jnp.dtype, slots: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what flows through the backward: dx, the layer's dK and dV, and each label's
    log-probability."""
    kv = jax.ShapeDtypeStruct((slots, config.num_kv_heads, config.head_dim), jnp.float32)
    return {
        "dx": jax.ShapeDtypeStruct((slots, config.d_model), dtype),
        "dk": kv,
        "dv": kv,
        "logprob": jax.ShapeDtypeStruct((slots,), jnp.float32),
    }


@jax.custom_vjp
def _recall(computed: jax.Array, saved: jax.Array) -> jax.Array:
    """`saved` in the place of `computed`; the gradient goes to `computed`, whose value nothing then
    needs."""
    return saved


_recall.defvjp(lambda computed, saved: (saved, None), lambda _, gradient: (gradient, None))


def _without_padding(values: Float[Array, "W X"], is_token: Bool[Array, " W"]) -> jax.Array:
    """Zeros in the padding, where an earlier microbatch may have left NaN: 0 * NaN is NaN."""
    return jnp.where(is_token[:, None], values, 0)


def loss_unit(
    decoder: Decoder,
    window: int,
    params: dict,
    flow: dict,
    totals: Float[Array, " 2"],
    table: Int[Array, "4 S"],
    start: Int[Array, ""],
) -> tuple[dict, Float[Array, " 2"]]:
    """Cross-entropy of a window's labels, summed, and its gradient with respect to the last layer's
    output.

    The softmax runs over chunks of the vocabulary with a running maximum, and the gradient's sum of
    p_v * head_v is accumulated with it, as attention does with values: one pass over the head, and
    never [W, V] at once.

    Args:
        decoder: the model's functions.
        window: W, static.
        params: parameters; only the final norm and the head are read.
        flow: see `flow_shapes`; dx[start:start+W] goes in as outputs and comes out as gradients;
            donated.
        totals: the sum of losses and the number of labels so far; donated.
        table: the microbatch (`MicrobatchTable`).
        start: first slot of the window.

    Returns:
        The updated flow and totals.
    """
    rows = MicrobatchTable.unpack(lax.dynamic_slice_in_dim(table, start, window, axis=1))
    outputs = _without_padding(
        lax.dynamic_slice_in_dim(flow["dx"], start, window), rows.sequence_start < table.shape[1]
    )
    hidden, pull = jax.vjp(lambda x: decoder.final_norm(params, x), outputs)
    head = decoder.head(params)
    vocab_size, d_model = head.shape
    chunk = min(_VOCABULARY_CHUNK, vocab_size)

    def chunk_of_vocabulary(c, carry):
        maximum, total, expected = carry
        begin = jnp.minimum(c * chunk, vocab_size - chunk)
        part = lax.dynamic_slice_in_dim(head, begin, chunk)
        logits = jnp.einsum("wd,vd->wv", hidden, part, preferred_element_type=jnp.float32)
        fresh = begin + jnp.arange(chunk) >= c * chunk  # the last chunk overlaps its neighbour
        logits = jnp.where(fresh, logits, -jnp.inf)
        new_maximum = jnp.maximum(maximum, logits.max(axis=-1))
        weights = jnp.exp(logits - new_maximum[:, None])
        correction = jnp.exp(maximum - new_maximum)
        expected = expected * correction[:, None] + jnp.einsum(
            "wv,vd->wd", weights.astype(head.dtype), part, preferred_element_type=jnp.float32
        )
        return new_maximum, total * correction + weights.sum(axis=-1), expected

    maximum, total, expected = lax.fori_loop(
        0,
        -(-vocab_size // chunk),
        chunk_of_vocabulary,
        (
            jnp.full((window,), -jnp.inf, jnp.float32),
            jnp.zeros((window,), jnp.float32),
            jnp.zeros((window, d_model), jnp.float32),
        ),
    )
    maximum, total, expected = join_softmax(maximum, total, expected, decoder.axes)
    counts = rows.label >= 0
    target = rows_of(head, jnp.maximum(rows.label, 0), decoder.axes).astype(jnp.float32)
    target_logit = jnp.sum(hidden.astype(jnp.float32) * target, axis=-1)
    logprob = jnp.where(counts, target_logit - maximum - jnp.log(total), 0.0)
    d_hidden = jnp.where(counts[:, None], expected / total[:, None] - target, 0.0)
    (dx,) = pull(d_hidden.astype(hidden.dtype))

    flow = flow | {
        "dx": lax.dynamic_update_slice_in_dim(flow["dx"], dx, start, axis=0),
        "logprob": lax.dynamic_update_slice_in_dim(flow["logprob"], logprob, start, axis=0),
    }
    return flow, totals + jnp.stack([-jnp.sum(logprob), jnp.sum(counts)])


def layer_unit(
    decoder: Decoder,
    window: int,
    columns: dict[str, slice],
    backend: Backend,
    layer_params: dict,
    adapter: dict,
    pages: dict,
    saved: dict,
    flow: dict,
    gradients: dict,
    table: Int[Array, "4 S"],
    start: Int[Array, ""],
) -> tuple[dict, dict]:
    """One layer of the backward for one window of tokens.

    Args:
        decoder: the model's functions.
        window: W, static.
        columns: `saved_columns`, static.
        backend: which kernels to use, static.
        layer_params: the layer's frozen parameters.
        adapter: the job's adapter in this layer: {"weights": site -> name -> float32 array,
            "scales": site -> [1]} (`peft.bypass.Bypass`).
        pages: the layer's {"k", "v"} pages.
        saved: what the forward kept of this layer (`saved_shapes`).
        flow: `flow_shapes`; dx[start:start+W] goes in as the gradient of the layer's output;
            donated.
        gradients: like the adapter's weights, added to; donated.
        table: the microbatch (`MicrobatchTable`).
        start: first slot of the window.

    Returns:
        The updated flow and gradients.
    """
    layer = decoder.layer(layer_params)

    def window_of(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, start, window)

    def with_window(x: jax.Array, rows: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, rows, start, axis=0)

    whole = MicrobatchTable.unpack(table)
    sequence_start = window_of(whole.sequence_start)
    is_token = sequence_start < whole.label.shape[0]
    activations = _without_padding(window_of(saved["activations"]), is_token)
    kept = {name: activations[:, where] for name, where in columns.items()}

    def tap(name: str, value: jax.Array) -> jax.Array:
        return _recall(value, kept[name]) if name in kept else value

    own_row = jnp.where(is_token, 0, -1)
    own = adapter["weights"]

    def bypass(own: dict) -> Bypass:
        stacked = jax.tree.map(lambda w: w[None], own)
        return Bypass(stacked, adapter["scales"], own_row, backend)

    angles = decoder.angles(window_of(whole.position))
    x, attended = kept["x"], kept["attended"].reshape(window, decoder.config.num_heads, -1)

    _, pull_outputs = jax.vjp(
        lambda x, attended, own: layer.attention_outputs(x, attended, bypass(own), tap),
        x,
        attended,
        own,
    )
    d_residual, d_attended, d_own_outputs = pull_outputs(window_of(flow["dx"]))
    (q, k, v), pull_inputs = jax.vjp(
        lambda x, own: layer.attention_inputs(x, angles, bypass(own), tap), x, own
    )
    dq, dk, dv = window_attention_backward(
        q,
        pages["k"],
        pages["v"],
        whole.kv_slot,
        sequence_start,
        start,
        attended,
        window_of(saved["lse"]),
        d_attended,
        flow["dk"],
        flow["dv"],
        backend=backend,
    )
    dq, d_own_attention = bypass(own).attend_backward(
        dq, q, attended, window_of(saved["lse"]), d_attended
    )
    d_keys, d_values = window_of(dk).astype(k.dtype), window_of(dv).astype(v.dtype)
    d_input, d_own_inputs = pull_inputs((dq, d_keys, d_values))

    cleared = jnp.zeros((window, *dk.shape[1:]), jnp.float32)  # ready for the next layer
    flow = flow | {
        "dx": with_window(flow["dx"], d_residual + d_input),
        "dk": with_window(dk, cleared),
        "dv": with_window(dv, cleared),
    }
    d_own_attention = jax.tree.map(lambda g: g[0], d_own_attention)
    gradients = jax.tree.map(
        lambda total, *parts: total + sum(parts),
        gradients,
        d_own_outputs,
        d_own_inputs | d_own_attention,
    )
    return flow, gradients
