"""The loss of a slice of tokens and its gradient, in one pass over the output head.

This is where a loss enters: with c = dL/dlogprob of a label (`losses`), the gradient of the hidden
state is -c (mean of the head's rows under the softmax - the label's row).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from flexllm_jax.finetune.buffers import MicrobatchTable, without_padding
from flexllm_jax.finetune.losses import LossTokens, coefficients, reads_sequences
from flexllm_jax.models.collectives import join_softmax, rows_of
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.peft.dropout import JobDropout
from flexllm_jax.peft.stacks import of_layer
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.grouped_lora.base import product
from kernels_pallas.rows import from_stored, to_stored

# Of a GPU's loss units: logits at once, float32.
_MOST_LOGITS = 2**26
_VOCABULARY_CHUNK = 4096  # of a CPU's


def logits_at_once(backend: Backend, tokens: int, vocabulary: int) -> tuple[int, int]:
    """Tokens of a loss unit, and rows of the head, whose logits it has at once.

    XLA copies a part of the head before a product reads it, and the softmax's mean is read and
    written for each part. On a GPU, where that takes time, a unit reads the whole head for some of
    its tokens; on a CPU logits of a part of the head, for all tokens, stay in the caches.
    """
    if backend.implementation == "xla":
        return tokens, min(_VOCABULARY_CHUNK, vocabulary)
    fit = [n for n in range(1, tokens + 1) if tokens % n == 0 and n * vocabulary <= _MOST_LOGITS]
    return max(fit, default=1), vocabulary


def score_unit(
    decoder: Decoder,
    unit_tokens: int,
    params: dict,
    adapter: dict | None,
    flow: dict,
    table: Int[Array, "10 S"],
    start: Int[Array, ""],
    dropout: JobDropout | None = None,
) -> dict:
    """Log-probabilities of the labels of a slice of tokens, without a gradient.

    Args: as of `loss_unit`; `flow["stream"]` stays as it is.

    Returns:
        The updated flow.
    """
    head = _Head.of(decoder, unit_tokens, params, adapter, flow, table, start, dropout)
    logprob, _ = head.logprobs(expect=False)
    return flow | {"logprob": _with_slice(flow["logprob"], logprob, start)}


def loss_unit(
    decoder: Decoder,
    unit_tokens: int,
    params: dict,
    adapter: dict | None,
    flow: dict,
    gradients: dict | None,
    table: Int[Array, "10 S"],
    loss: Float[Array, " L"],
    start: Int[Array, ""],
    dropout: JobDropout | None = None,
) -> tuple[dict, dict | None]:
    """Log-probabilities of the labels of a slice of tokens, and the gradient of their loss with
    respect to the last layer's output.

    The softmax runs over chunks of the vocabulary with a running maximum, and the gradient's sum of
    p_v * head_v is accumulated with it, as attention does with values: one pass over the head for
    each piece of the slice, and never [U, V] at once (`logits_at_once`). Where logits are capped,
    each row counts with the cap's slope. LoRA on the head, h A scale, is taken as more columns of
    the hidden state and B as more columns of the head;
    the gradient of B needs a second pass.

    Args:
        decoder: the model's functions.
        unit_tokens: U, tokens of the slice, static.
        params: parameters; only the final norm and the head are read.
        adapter: the job's LoRA on the head, a stack of one layer: {"weights": {"head": {"a", "b"}},
            "scales": {"head": [1]}} float32, or None.
        flow: see `flow_shapes`; stream[start:start+U] goes in as outputs and comes out as
            gradients; logprob holds those of all slices if the loss is one of sequences, from
            `score_unit`; donated.
        gradients: like the adapter's weights, or None; added to; donated.
        table: the microbatch (`MicrobatchTable`).
        loss: `Loss.packed`.
        start: first token slot of the slice.
        dropout: of the microbatch; only the output head's LoRA reads it. None: of nothing.

    Returns:
        The updated flow and gradients.
    """
    head = _Head.of(decoder, unit_tokens, params, adapter, flow, table, start, dropout)
    logprob, softmax = head.logprobs(expect=True)
    all_logprobs = _with_slice(flow["logprob"], logprob, start)
    whole, backend = MicrobatchTable.unpack(table), decoder.backend
    c = _coefficients(loss, whole, all_logprobs, start, unit_tokens, backend)
    # A token without a log-probability has no gradient: the optimizer refuses the step.
    c = jnp.where(head.counts, jnp.where(jnp.isfinite(logprob), c, jnp.nan), 0.0)
    targets = [decoder.config.head.uncap(x, softmax.target[:, None]) for x in head.targets]
    d_hidden, *d_shrunk = (
        jnp.where(head.counts[:, None], -c[:, None] * (mean - target), 0.0)
        for mean, target in zip(softmax.expected, targets, strict=True)
    )
    if head.lora and gradients:
        d_low = d_shrunk[0] * head.lora["scale"]
        d_read = d_low @ head.lora["a"].astype(jnp.float32).T
        d_hidden += d_read if head.lora["factors"] is None else d_read * head.lora["factors"]
        own = of_layer(gradients["head"], 0)
        own = {
            "a": own["a"] + head.lora["read"].astype(jnp.float32).T @ d_low,
            "b": head.add_gradient_of_b(own["b"], softmax.normalizer, c),
        }
        gradients = {"head": jax.tree.map(lambda g: g[None], own)}
    (d_outputs,) = head.pull(d_hidden.astype(head.hidden.dtype))
    d_outputs = to_stored(d_outputs, flow["stream"].dtype)
    stream = lax.dynamic_update_slice_in_dim(flow["stream"], d_outputs, start, axis=0)
    return flow | {"stream": stream, "logprob": all_logprobs}, gradients


def _with_slice(logprobs: jax.Array, own: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(logprobs, own, start, axis=0)


def _coefficients(
    loss: Float[Array, " L"],
    table: MicrobatchTable,
    logprob: Float[Array, " S"],
    start: Int[Array, ""],
    unit_tokens: int,
    backend: Backend = XLA,
) -> Float[Array, " U"]:
    """dL/dlogprob of a slice's labels."""
    rows = MicrobatchTable(*(lax.dynamic_slice_in_dim(x, start, unit_tokens) for x in table))
    gap = jnp.where(table.weight == 0, 0.0, table.weight * (logprob - table.reference))

    def of_sequence(starts: jax.Array, values: jax.Array) -> jax.Array:
        # Compared with all slots: sums in a fixed order, unlike those of a scatter.
        return jnp.sum(jnp.where(starts[:, None] == table.sequence_start, values, 0.0), axis=1)

    def of_sequences() -> tuple[jax.Array, ...]:
        owners = (rows.sequence_start, rows.pair_start)
        return tuple(of_sequence(own, x) for own in owners for x in (gap, table.weight))

    if backend.implementation == "xla":  # a CPU takes as long for them as for the head's products
        nothing = (jnp.zeros(unit_tokens, jnp.float32),) * 4
        own_gap, own_length, pair_gap, pair_length = lax.cond(
            reads_sequences(loss), of_sequences, lambda: nothing
        )
    else:
        own_gap, own_length, pair_gap, pair_length = of_sequences()
    tokens = LossTokens(
        lax.dynamic_slice_in_dim(logprob, start, unit_tokens),
        rows.reference,
        rows.advantage,
        rows.weight,
        own_gap,
        own_length,
        pair_gap,
        pair_length,
        start + jnp.arange(unit_tokens) == rows.sequence_start,
    )
    return coefficients(loss, tokens)


class _Softmax(NamedTuple):
    """Over the vocabulary: its normalizer in log space [U], the labels' logits [U], and the mean
    rows of the head (and of B) under it [U, ...]."""

    normalizer: jax.Array
    target: jax.Array
    expected: list[jax.Array]


class _Head(NamedTuple):
    """The output head over a slice of tokens: `inputs` times `targets` are the labels' logits."""

    decoder: Decoder
    weight: jax.Array  # [V, D]
    hidden: jax.Array  # [U, D]
    pull: Callable  # from the gradient of `hidden` to that of the last layer's output
    counts: jax.Array
    label: jax.Array
    lora: dict | None
    inputs: list[jax.Array]
    targets: list[jax.Array]

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        unit_tokens: int,
        params: dict,
        adapter: dict | None,
        flow: dict,
        table: jax.Array,
        start: jax.Array,
        dropout: JobDropout | None,
    ) -> "_Head":
        rows = MicrobatchTable.unpack(lax.dynamic_slice_in_dim(table, start, unit_tokens, axis=1))
        outputs = without_padding(
            from_stored(lax.dynamic_slice_in_dim(flow["stream"], start, unit_tokens)),
            rows.sequence_start < table.shape[1],
        )
        hidden, pull = jax.vjp(lambda x: decoder.final_norm(params, x), outputs)
        factors = None
        if dropout is not None:
            slots = start + jnp.arange(unit_tokens)
            dropped = dropout.of_layer(slots, decoder.config.num_layers, decoder.axes)
            factors = dropped.factors("head", hidden.shape[1])
        weight, lora = decoder.head(params), _head_lora(adapter, hidden, factors)
        counts, label = rows.label >= 0, jnp.maximum(rows.label, 0)
        inputs, targets = [hidden], [rows_of(weight, label, decoder.axes).astype(jnp.float32)]
        if lora:
            inputs.append(lora["shrunk"])
            targets.append(lora["b"][:, label].T.astype(jnp.float32))
        return cls(decoder, weight, hidden, pull, counts, label, lora, inputs, targets)

    @property
    def _at_once(self) -> tuple[int, int]:
        return logits_at_once(self.decoder.backend, len(self.hidden), self.weight.shape[0])

    def _over_vocabulary(self, add_chunk: Callable, carry):
        """carry = add_chunk(c, carry) for every chunk of the vocabulary."""
        chunks = -(-self.weight.shape[0] // self._at_once[1])
        return add_chunk(0, carry) if chunks == 1 else lax.fori_loop(0, chunks, add_chunk, carry)

    def _by_pieces(self, *arrays: jax.Array) -> list[jax.Array]:
        """Arrays of the slice's tokens, cut in pieces whose logits are there at once."""
        return [x.reshape(-1, self._at_once[0], *x.shape[1:]) for x in arrays]

    def _logits(
        self, inputs: list[jax.Array], c: jax.Array | int
    ) -> tuple[jax.Array, list[jax.Array], jax.Array, jax.Array]:
        """Of a piece's inputs and chunk `c` of the vocabulary: where the chunk begins, the rows of
        the head (and of B), the logits, and those that no other chunk has: -inf in place of the
        others."""
        _, chunk = self._at_once
        begin = jnp.minimum(c * chunk, self.weight.shape[0] - chunk)
        part = lax.dynamic_slice_in_dim(self.weight, begin, chunk)
        logits = jnp.einsum("ud,vd->uv", inputs[0], part, preferred_element_type=jnp.float32)
        parts = [part]
        if self.lora:
            parts.append(lax.dynamic_slice_in_dim(self.lora["b"], begin, chunk, axis=1).T)
            logits += product("ur,vr->uv", inputs[1], parts[1])
        fresh = begin + jnp.arange(chunk) >= c * chunk  # the last chunk overlaps its neighbour
        logits = self.decoder.config.head.cap(logits)
        return begin, parts, logits, jnp.where(fresh, logits, -jnp.inf)

    def _softmax_of(
        self, inputs: list[jax.Array], *, expect: bool
    ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        """Of a piece: the largest logits, the sums of exp(logit - the largest), and of that times
        the rows of the head (and of B)."""

        def add_chunk(c, carry):
            _, parts, logits, fresh = self._logits(inputs, c)
            maximum = fresh.max(axis=-1)
            if carry is not None:
                maximum = jnp.maximum(carry[0], maximum)
            weights = jnp.exp(fresh - maximum[:, None])
            sloped = self.decoder.config.head.uncap(weights, logits)
            total, expected = weights.sum(axis=-1), []
            if expect:
                expected = [
                    jnp.einsum(
                        "uv,vd->ud", sloped.astype(p.dtype), p, preferred_element_type=jnp.float32
                    )
                    for p in parts
                ]
            if carry is None:
                return maximum, total, expected
            correction = jnp.exp(carry[0] - maximum)
            expected = [
                so_far * correction[:, None] + own
                for so_far, own in zip(carry[2], expected, strict=True)
            ]
            return maximum, carry[1] * correction + total, expected

        if self._at_once[1] == self.weight.shape[0]:
            return add_chunk(0, None)
        units = inputs[0].shape[:1]
        nothing = (
            jnp.full(units, -jnp.inf, jnp.float32),
            jnp.zeros(units, jnp.float32),
            [jnp.zeros(x.shape, jnp.float32) for x in inputs] if expect else [],
        )
        return self._over_vocabulary(add_chunk, nothing)

    def logprobs(self, *, expect: bool) -> tuple[Float[Array, " U"], _Softmax]:
        """Log-probabilities of the labels, 0 where there is none; without `expect` the softmax has
        no mean rows."""
        of_piece = partial(self._softmax_of, expect=expect)
        if self._at_once[0] == len(self.hidden):
            maximum, total, expected = of_piece(self.inputs)
        else:
            pieces = lax.map(of_piece, self._by_pieces(*self.inputs))
            maximum, total, expected = jax.tree.map(lambda x: lax.collapse(x, 0, 2), pieces)
        maximum, total, expected = join_softmax(maximum, total, expected, self.decoder.axes)
        first, *others = (
            jnp.sum(x.astype(jnp.float32) * target, axis=-1)
            for x, target in zip(self.inputs, self.targets, strict=True)
        )
        target_logit = self.decoder.config.head.cap(sum(others, first))
        normalizer = maximum + jnp.log(total)
        logprob = jnp.where(self.counts, target_logit - maximum - jnp.log(total), 0.0)
        return logprob, _Softmax(
            normalizer, target_logit, [mean / total[:, None] for mean in expected]
        )

    def add_gradient_of_b(
        self, so_far: jax.Array, normalizer: jax.Array, c: Float[Array, " U"]
    ) -> jax.Array:
        """`so_far`, and the gradient of the B of LoRA on the head."""
        assert self.lora is not None
        shrunk = self.lora["shrunk"].astype(jnp.float32)

        def add_piece(d_b, piece):
            inputs, (normalizer, c, label, counts, shrunk) = piece

            def add_chunk(i, d_b):
                begin, _, logits, fresh = self._logits(inputs, i)
                d_logits = jnp.exp(fresh - normalizer[:, None])
                rows = begin + jnp.arange(logits.shape[1])
                d_logits -= rows == label[:, None]
                d_logits = self.decoder.config.head.uncap(d_logits, logits)
                d_logits = jnp.where(
                    counts[:, None] & (fresh > -jnp.inf), -c[:, None] * d_logits, 0.0
                )
                before = lax.dynamic_slice_in_dim(d_b, begin, len(rows), axis=1)
                after = before + shrunk.T @ d_logits
                return lax.dynamic_update_slice_in_dim(d_b, after, begin, axis=1)

            return self._over_vocabulary(add_chunk, d_b), None

        own = self._by_pieces(normalizer, c, self.label, self.counts, shrunk)
        return lax.scan(add_piece, so_far, (self._by_pieces(*self.inputs), own))[0]


def _head_lora(
    adapter: dict | None, hidden: Float[Array, "U D"], factors: Float[Array, "U D"] | None
) -> dict | None:
    """LoRA on the head for a slice of tokens: its factors and scale, what it reads (`hidden` times
    dropout's `factors`, if there are any), and that times A scale; rounded where serving rounds
    them (`grouped_lora`), so that it trains the log-probabilities it samples with.
    """
    if adapter is None:
        return None
    own, scale = of_layer((adapter["weights"]["head"], adapter["scales"]["head"]), 0)
    own = {name: factor.astype(hidden.dtype) for name, factor in own.items()}
    read = hidden
    if factors is not None:
        read = (hidden.astype(jnp.float32) * factors).astype(hidden.dtype)
    shrunk = (product("ud,dr->ur", read, own["a"]) * scale).astype(hidden.dtype)
    return own | {"scale": scale, "read": read, "factors": factors, "shrunk": shrunk}
