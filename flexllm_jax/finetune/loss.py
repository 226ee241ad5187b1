"""The loss of a slice of tokens and its gradient, in one pass over the output head.

This is where a loss enters: with c = dL/dlogprob of a label, the gradient of the hidden state is
-c (mean of the head's rows under the softmax - the label's row). Cross-entropy has c = -1.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flexllm_jax.finetune.buffers import MicrobatchTable, without_padding
from flexllm_jax.models.collectives import join_softmax, rows_of
from flexllm_jax.models.decoder import Decoder
from kernels_pallas.rows import from_stored, to_stored

_VOCABULARY_CHUNK = 4096


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
    outputs = without_padding(
        from_stored(lax.dynamic_slice_in_dim(flow["stream"], start, unit_tokens)),
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

    d_outputs = to_stored(d_outputs, flow["stream"].dtype)
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
