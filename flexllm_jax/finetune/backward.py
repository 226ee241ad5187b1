"""Token-level backward (FlexLLM, section 6): the loss of a slice of tokens, and one layer of the
backward for one slice.

A microbatch is S token slots of packed sequences of one job. The forward leaves, for every layer,
its input and what the plan of saved activations names (`compile.remat`), and the last layer's
output in `stream`; a layer unit computes again what it needs of the rest. The microbatch is cut in
slices of `finetune.unit_tokens` tokens, and a unit works on one. A loss unit turns a slice of
`stream` from outputs into the loss's gradient; a layer unit takes a slice of `stream` from the
gradient of the layer's output to that of its input. The loss units come first, in any order. Then
come the layers, from the last to the first, and in each its slices, from the last to the first, at
any later time. Frozen weights are never differentiated, and no residual leaves a program.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from flexllm_jax.models.collectives import join_softmax, rows_of
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.peft.bypass import Bypass
from kernels_pallas.attention_backward import attention_backward, attention_of_slice
from kernels_pallas.backend import Backend

_VOCABULARY_CHUNK = 4096


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


@jax.custom_vjp
def _recall(computed: jax.Array, saved: jax.Array) -> jax.Array:
    """`saved` in the place of `computed`; the gradient goes to `computed`, whose value nothing then
    needs."""
    return saved


_recall.defvjp(lambda computed, saved: (saved, None), lambda _, gradient: (gradient, None))


def job_bypass(adapter: dict, is_token: Bool[Array, " U"], backend: Backend) -> Bypass:
    """The bypass of one job's adapter in one layer ({"weights", "scales"}, see `layer_unit`) over
    tokens of which some are padding."""
    stacked = jax.tree.map(lambda w: w[None], adapter["weights"])
    return Bypass(stacked, adapter["scales"], jnp.where(is_token, 0, -1), backend)


def _without_padding(values: Float[Array, "U X"], is_token: Bool[Array, " U"]) -> jax.Array:
    """Zeros in the padding, where an earlier microbatch may have left NaN: 0 * NaN is NaN."""
    return jnp.where(is_token[:, None], values, 0)


def loss_unit(
    decoder: Decoder,
    unit_tokens: int,
    params: dict,
    adapter: dict | None,
    flow: dict,
    pending: dict,
    table: Int[Array, "4 S"],
    start: Int[Array, ""],
) -> tuple[dict, dict]:
    """Cross-entropy of the labels of a slice of tokens, summed, and its gradient with respect to
    the last layer's output.

    The softmax runs over chunks of the vocabulary with a running maximum, and the gradient's sum of
    p_v * head_v is accumulated with it, as attention does with values: one pass over the head, and
    never [U, V] at once. LoRA on the head, h A scale, is taken as more columns of the hidden state
    and B as more columns of the head; the gradient of B needs a second pass.

    Args:
        decoder: the model's functions.
        unit_tokens: U, tokens of the slice, static.
        params: parameters; only the final norm and the head are read.
        adapter: the job's LoRA on the head, {"weights": {"head": {"a", "b"}}, "scales": {"head":
            [1]}} float32, or None.
        flow: see `flow_shapes`; stream[start:start+U] goes in as outputs and comes out as
            gradients; donated.
        pending: {"losses": {"loss_sum", "labels"}, the sum of losses and the number of labels so
            far, "gradients": like the adapter's weights, or None}; added to; donated.
        table: the microbatch (`MicrobatchTable`).
        start: first token slot of the slice.

    Returns:
        The updated flow and pending.
    """
    rows = MicrobatchTable.unpack(lax.dynamic_slice_in_dim(table, start, unit_tokens, axis=1))
    outputs = _without_padding(
        lax.dynamic_slice_in_dim(flow["stream"], start, unit_tokens),
        rows.sequence_start < table.shape[1],
    )
    hidden, pull = jax.vjp(lambda x: decoder.final_norm(params, x), outputs)
    head = decoder.head(params)
    vocab_size = head.shape[0]
    chunk = min(_VOCABULARY_CHUNK, vocab_size)

    lora = _head_lora(adapter, hidden)

    def logits_of(c):
        begin = jnp.minimum(c * chunk, vocab_size - chunk)
        part = lax.dynamic_slice_in_dim(head, begin, chunk)
        logits = jnp.einsum("ud,vd->uv", hidden, part, preferred_element_type=jnp.float32)
        parts = [part]
        if lora:
            parts.append(lax.dynamic_slice_in_dim(lora["b"], begin, chunk, axis=1).T)
            logits += lora["shrunk"] @ parts[1].T
        fresh = begin + jnp.arange(chunk) >= c * chunk  # the last chunk overlaps its neighbour
        return begin, parts, jnp.where(fresh, logits, -jnp.inf)

    def chunk_of_vocabulary(c, carry):
        maximum, total, expected = carry
        _, parts, logits = logits_of(c)
        new_maximum = jnp.maximum(maximum, logits.max(axis=-1))
        weights = jnp.exp(logits - new_maximum[:, None])
        correction = jnp.exp(maximum - new_maximum)
        expected = [
            so_far * correction[:, None]
            + jnp.einsum(
                "uv,vd->ud", weights.astype(p.dtype), p, preferred_element_type=jnp.float32
            )
            for so_far, p in zip(expected, parts, strict=True)
        ]
        return new_maximum, total * correction + weights.sum(axis=-1), expected

    inputs = [hidden, lora["shrunk"]] if lora else [hidden]
    chunks = -(-vocab_size // chunk)
    maximum, total, expected = lax.fori_loop(
        0,
        chunks,
        chunk_of_vocabulary,
        (
            jnp.full((unit_tokens,), -jnp.inf, jnp.float32),
            jnp.zeros((unit_tokens,), jnp.float32),
            [jnp.zeros(x.shape, jnp.float32) for x in inputs],
        ),
    )
    maximum, total, expected = join_softmax(maximum, total, expected, decoder.axes)
    counts, label = rows.label >= 0, jnp.maximum(rows.label, 0)
    targets = [rows_of(head, label, decoder.axes).astype(jnp.float32)]
    if lora:
        targets.append(lora["b"][:, label].T)
    target_logit = sum(
        jnp.sum(x.astype(jnp.float32) * target, axis=-1)
        for x, target in zip(inputs, targets, strict=True)
    )
    logprob = jnp.where(counts, target_logit - maximum - jnp.log(total), 0.0)
    d_hidden, *d_shrunk = (
        jnp.where(counts[:, None], mean / total[:, None] - target, 0.0)
        for mean, target in zip(expected, targets, strict=True)
    )
    gradients = pending["gradients"]
    if lora:

        def gradient_of_b(c, d_b):
            begin, _, logits = logits_of(c)
            d_logits = jnp.exp(logits - (maximum + jnp.log(total))[:, None])
            d_logits -= begin + jnp.arange(chunk) == label[:, None]
            d_logits = jnp.where(counts[:, None] & (logits > -jnp.inf), d_logits, 0.0)
            so_far = lax.dynamic_slice_in_dim(d_b, begin, chunk, axis=1)
            return lax.dynamic_update_slice_in_dim(
                d_b, so_far + lora["shrunk"].T @ d_logits, begin, axis=1
            )

        d_low = d_shrunk[0] * lora["scale"]
        d_hidden += d_low @ lora["a"].T
        own = gradients["head"]
        gradients = {
            "head": {
                "a": own["a"] + hidden.astype(jnp.float32).T @ d_low,
                "b": lax.fori_loop(0, chunks, gradient_of_b, own["b"]),
            }
        }
    (d_outputs,) = pull(d_hidden.astype(hidden.dtype))

    flow = flow | {
        "stream": lax.dynamic_update_slice_in_dim(flow["stream"], d_outputs, start, axis=0),
        "logprob": lax.dynamic_update_slice_in_dim(flow["logprob"], logprob, start, axis=0),
    }
    losses = {
        "loss_sum": pending["losses"]["loss_sum"] - jnp.sum(logprob),
        "labels": pending["losses"]["labels"] + jnp.sum(counts),
    }
    return flow, {"losses": losses, "gradients": gradients}


def _head_lora(adapter: dict | None, hidden: Float[Array, "U D"]) -> dict | None:
    """LoRA on the head for a slice of tokens: its float32 factors and scale, and h A scale."""
    if adapter is None:
        return None
    own, scale = adapter["weights"]["head"], adapter["scales"]["head"][0]
    return own | {"scale": scale, "shrunk": hidden.astype(jnp.float32) @ own["a"] * scale}


def layer_unit(
    decoder: Decoder,
    unit_tokens: int,
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
    """One layer of the backward for one slice of tokens.

    Args:
        decoder: the model's functions.
        unit_tokens: U, tokens of the slice, static.
        columns: `saved_columns`, static.
        backend: which kernels to use, static.
        layer_params: the layer's frozen parameters.
        adapter: the job's adapter in this layer: {"weights": site -> name -> float32 array,
            "scales": site -> [1]} (`peft.bypass.Bypass`).
        pages: the layer's {"k", "v"} pages.
        saved: what the forward kept of this layer (`saved_shapes`).
        flow: `flow_shapes`; stream[start:start+U] goes in as the gradient of the layer's output
            and comes out as that of its input; donated.
        gradients: like the adapter's weights, added to; donated.
        table: the microbatch (`MicrobatchTable`).
        start: first token slot of the slice.

    Returns:
        The updated flow and gradients.
    """
    layer = decoder.layer(layer_params)

    def slice_of(x: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, start, unit_tokens)

    def with_slice(x: jax.Array, rows: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, rows, start, axis=0)

    whole = MicrobatchTable.unpack(table)
    sequence_start = slice_of(whole.sequence_start)
    is_token = sequence_start < whole.label.shape[0]
    activations = _without_padding(slice_of(saved["activations"]), is_token)
    kept = {name: activations[:, where] for name, where in columns.items()}

    def tap(name: str, value: jax.Array) -> jax.Array:
        return _recall(value, kept[name]) if name in kept else value

    own = adapter["weights"]

    def bypass(own: dict) -> Bypass:
        return job_bypass(adapter | {"weights": own}, is_token, backend)

    angles = decoder.angles(slice_of(whole.position))
    x = kept["x"]
    (q, k, v), pull_inputs = jax.vjp(
        lambda x, own: layer.before_attention(x, angles, bypass(own), tap), x, own
    )
    keys_and_values = (pages["k"], pages["v"], whole.kv_slot, sequence_start, start)
    if "attended" in kept:
        attended, lse = kept["attended"].reshape(q.shape), slice_of(saved["lse"])
    else:
        attended, lse = attention_of_slice(q, *keys_and_values, backend=backend)
        attended, lse = bypass(own).attend(q, attended, lse)
    _, pull_outputs = jax.vjp(
        lambda x, attended, own: layer.after_attention(x, attended, bypass(own), tap),
        x,
        attended,
        own,
    )
    d_residual, d_attended, d_own_outputs = pull_outputs(slice_of(flow["stream"]))
    dq, dk, dv = attention_backward(
        q,
        *keys_and_values,
        attended,
        lse,
        d_attended,
        flow["dk"],
        flow["dv"],
        backend=backend,
    )
    dq, d_own_attention = bypass(own).attend_backward(dq, q, attended, lse, d_attended)
    d_keys, d_values = slice_of(dk).astype(k.dtype), slice_of(dv).astype(v.dtype)
    d_input, d_own_inputs = pull_inputs((dq, d_keys, d_values))

    cleared = jnp.zeros((unit_tokens, *dk.shape[1:]), jnp.float32)  # ready for the next layer
    flow = flow | {
        "stream": with_slice(flow["stream"], d_residual + d_input),
        "dk": with_slice(dk, cleared),
        "dv": with_slice(dv, cleared),
    }
    d_own_attention = jax.tree.map(lambda g: g[0], d_own_attention)
    gradients = jax.tree.map(
        lambda total, *parts: total + sum(parts),
        gradients,
        d_own_outputs,
        d_own_inputs | d_own_attention,
    )
    return flow, gradients
