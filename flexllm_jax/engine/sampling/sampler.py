"""Sampling on the device, and the log-probabilities that requests ask for.

`sample_greedy` takes the largest logit and nothing else; `sample` applies, in vLLM's order, biases
and banned tokens, penalties, the tokens that a request's constraints allow, temperature, min-p,
top-k and top-p, and draws with the request's own key. The host picks the program that does least of
those that do what the step's requests need (`Sampling`): the rest costs nothing. A draw depends on
the request's seed and the index of its token alone, so neither batching nor preemption changes it.
Log-probabilities are those of the raw logits, as in training, or if asked for of those over the
temperature; a program of their own reports them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from flexllm_jax.engine.sampling.cutoffs import kept
from flexllm_jax.engine.sampling.params import BANNED, BIASES, TOP_LOGPROBS
from flexllm_jax.engine.sampling.structured_outputs import BITS
from flexllm_jax.models.bypass import BypassFunction, no_bypass
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.peft.bypass import Bypass
from scheduler.latency.model import Sampling

ROWS_AT_ONCE = 64
_TOP_AT_ONCE = 16  # the most that XLA has a kernel for on a GPU; it sorts all for one more


@dataclass
class SamplingRows:
    """One step's sampling parameters on the host: a row for each sampled token, packed for the
    device as int32.

    `row` is the request's row in the device state (past its end: nothing is sampled); `adapter` its
    row of the bank, or -1. Floats travel as their bits.
    """

    row: np.ndarray
    adapter: np.ndarray
    index: np.ndarray  # of the token in the request's output
    seed: np.ndarray  # its lower half
    seed_high: np.ndarray
    biased: np.ndarray  # whether its row of the state has biases of its own
    top_k: np.ndarray
    banned: np.ndarray  # [R, BANNED], -1 where empty
    temperature: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray
    scale: np.ndarray  # that log-probabilities are told at: a temperature

    @classmethod
    def neutral(cls, rows: int, no_row: int) -> "SamplingRows":
        """Greedy sampling in no row."""
        ints = {"row": no_row, "adapter": -1, "index": 0, "seed": 0, "seed_high": 0, "top_k": 0}
        ints["biased"] = 0
        floats = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0}
        floats |= {"presence": 0.0, "frequency": 0.0, "scale": 1.0}
        return cls(
            **{name: np.full(rows, value, np.int32) for name, value in ints.items()},
            banned=np.full((rows, BANNED), -1, np.int32),
            **{name: np.full(rows, value, np.float32) for name, value in floats.items()},
        )

    def packed(self) -> Int[np.ndarray, "C R"]:
        """All fields as rows of one int32 array."""
        columns = []
        for f in fields(self):
            value = getattr(self, f.name)
            columns.append(value.T if value.ndim == 2 else value.view(np.int32)[None])
        return np.concatenate(columns)

    @classmethod
    def unpack(cls, packed: Int[Array, "C R"]) -> "SamplingRows":
        """The fields on the device."""
        values, at = {}, 0
        for f in fields(cls):
            if f.name == "banned":
                values[f.name], at = packed[at : at + BANNED].T, at + BANNED
                continue
            column = packed[at]
            if f.name in _FLOATS:
                column = lax.bitcast_convert_type(column, jnp.float32)
            values[f.name], at = column, at + 1
        return cls(**values)


_FLOATS = {"temperature", "top_p", "min_p", "repetition", "presence", "frequency", "scale"}
PACKED_ROWS = len(fields(SamplingRows)) - 1 + BANNED


def _head_bypass(bank: dict | None, adapter: Any) -> BypassFunction:
    """LoRA on the output head; `bank`: its {"weights", "scales"}, or None without; adapter: rows of
    it [R]."""
    return no_bypass if bank is None else Bypass(bank["weights"], bank["scales"], adapter)


def sample_greedy(
    decoder: Decoder,
    params: dict,
    bank: dict | None,
    hidden: Float[Array, "R D"],
    last_tokens: Int[Array, " Q"],
    packed: Int[Array, "C R"],
) -> tuple[Int[Array, " R"], Int[Array, " Q"]]:
    """The most likely token of each row, also put in `last_tokens` (donated) for the next step to
    read. Arguments as in `sample`."""
    tokens = decoder.most_likely(params, hidden, _head_bypass(bank, packed[1]))
    return tokens, last_tokens.at[packed[0]].set(tokens, mode="drop")


def sample(
    kind: Sampling,
    decoder: Decoder,
    params: dict,
    bank: dict | None,
    hidden: Float[Array, "R D"],
    last_tokens: Int[Array, " Q"],
    history: dict,
    packed: Int[Array, "C R"],
    allowed: Int[Array, "R W"],
) -> tuple[Int[Array, " R"], Int[Array, " Q"], dict]:
    """A token for each row, with what requests can ask for up to `kind`.

    Args:
        kind: ADJUSTED: penalties and masks; DRAWN: draws, too, where the temperature is not 0;
            FILTERED: from what min-p, top-k and top-p leave. Rows that need less get what the
            programs that do less would give them.
        decoder: the model's functions.
        params: parameters; the final norm and the head are read.
        bank: the output head's {"weights", "scales"} of the adapter bank, or None if it has none.
        hidden: last-layer outputs of the rows.
        last_tokens: newest token of each request row; donated.
        history: {"counts": [Q, V] int32 output tokens so far, "prompt": [Q, V] bool, "biases":
            [2, Q, BIASES] as of `row_biases`}; donated.
        packed: `SamplingRows`.
        allowed: the tokens that may be drawn, as the bits of `Constraints.allowed`.

    Returns:
        tokens, last_tokens, history.
    """
    rows = SamplingRows.unpack(packed)
    logits = decoder.logits(params, hidden, _head_bypass(bank, rows.adapter))
    counts = history["counts"].at[rows.row].get(mode="fill", fill_value=0)
    seen = history["prompt"].at[rows.row].get(mode="fill", fill_value=False) | (counts > 0)

    logits = _biased(logits, rows, history["biases"])
    repetition = rows.repetition[:, None]
    penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, penalized, logits)
    logits -= rows.frequency[:, None] * counts + rows.presence[:, None] * (counts > 0)
    bits = (allowed[:, :, None] >> jnp.arange(BITS)) & 1
    bits = bits.reshape(allowed.shape[0], -1)[:, : logits.shape[1]]
    logits = jnp.where(bits == 1, logits, -jnp.inf)

    if kind >= Sampling.DRAWN:
        drawn = _perturbed(logits, rows, filtered=kind == Sampling.FILTERED)
        logits = jnp.where(rows.temperature[:, None] > 0, drawn, logits)
    if decoder.backend.implementation == "xla":
        # Else a CPU would make each of these numbers as it compares it, alone: thrice as slow.
        logits = logits == logits.max(axis=-1, keepdims=True)
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    counts = history["counts"].at[rows.row, tokens].add(1, mode="drop")
    last_tokens = last_tokens.at[rows.row].set(tokens, mode="drop")
    return tokens, last_tokens, history | {"counts": counts}


def _biased(
    logits: Float[Array, "R V"], rows: SamplingRows, biases: Int[Array, "2 Q B"]
) -> Float[Array, "R V"]:
    """The logits with what is added to those of some tokens: -inf to those that are banned, and the
    requests' biases. A GPU adds all of it at once, and waits for no branch; a CPU branches."""
    row = jnp.arange(logits.shape[0])[:, None]

    def add(logits: jax.Array, tokens: jax.Array, values: jax.Array) -> jax.Array:
        return logits.at[row, tokens].add(values, mode="drop")

    banned = jnp.where(rows.banned < 0, logits.shape[1], rows.banned)
    bans = (banned, jnp.full(banned.shape, -jnp.inf, logits.dtype))

    def add_all(logits: jax.Array) -> jax.Array:
        tokens, values = biases.at[:, rows.row].get(mode="fill", fill_value=0)
        tokens = jnp.where(rows.biased[:, None] > 0, tokens, logits.shape[1])
        own = (tokens, lax.bitcast_convert_type(values, jnp.float32))
        return add(
            logits, *(jnp.concatenate(both, axis=-1) for both in zip(bans, own, strict=True))
        )

    def branch(logits: jax.Array) -> jax.Array:
        return lax.cond(jnp.any(rows.biased > 0), add_all, lambda x: add(x, *bans), logits)

    return lax.platform_dependent(logits, cpu=branch, default=add_all)


def row_biases(biases: Mapping[int, float]) -> Int[np.ndarray, "2 B"]:
    """A request's biases as the device keeps them: tokens, and the bits of what is added to their
    logits; padding adds nothing to token 0."""
    packed = np.zeros((2, BIASES), np.int32)
    packed[0, : len(biases)] = list(biases)
    packed[1, : len(biases)] = np.array(list(biases.values()), np.float32).view(np.int32)
    return packed


def _perturbed(
    logits: Float[Array, "R V"], rows: SamplingRows, *, filtered: bool
) -> Float[Array, "R V"]:
    """Scores of which the largest is a draw from the distribution that temperature and, when
    `filtered`, min-p, top-k and top-p leave."""
    logits = logits / jnp.maximum(rows.temperature, 1e-6)[:, None]
    # What `jax.random.key` makes of 64 bits, which it takes only where all of JAX has them.
    seeds = jnp.stack([rows.seed_high, rows.seed], axis=-1)
    seeds = lax.bitcast_convert_type(seeds, jnp.uint32)
    noise = jax.vmap(
        lambda seed, index: jax.random.gumbel(
            jax.random.fold_in(jax.random.wrap_key_data(seed), index), logits.shape[1:]
        )
    )(seeds, rows.index)
    if not filtered:
        return logits + noise
    filters = (jnp.asarray(x) for x in (rows.top_k, rows.top_p, rows.min_p))
    left = kept(logits, *filters)
    return jnp.where(left, logits + noise, -jnp.inf)


def logprobs(
    decoder: Decoder,
    params: dict,
    bank: dict | None,
    hidden: Float[Array, "R D"],
    tokens: Int[Array, " R"],
    adapter: Int[Array, " R"],
    scale: Float[Array, " R"] | None = None,
    wanted: Int[Array, "R K"] | None = None,
) -> dict:
    """{"logprobs" of the tokens, "top_tokens", "top_logprobs"}, and "wanted": those of `wanted`.
    adapter: rows of the bank, or -1. scale: the temperature that they are told at, 1 if None."""
    logits = decoder.logits(params, hidden, _head_bypass(bank, adapter))
    if scale is not None:
        logits = logits / scale[:, None]
    every = jax.nn.log_softmax(logits, axis=-1)
    more = {} if wanted is None else {"wanted": jnp.take_along_axis(every, wanted, axis=-1)}
    own = jnp.take_along_axis(every, tokens[:, None], axis=-1)[:, 0]
    top, top_tokens = _top(every, min(TOP_LOGPROBS, logits.shape[1]))
    return {"logprobs": own, "top_tokens": top_tokens, "top_logprobs": top, **more}


def _top(values: Float[Array, "R V"], count: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k`, a few at a time."""
    row, found = jnp.arange(values.shape[0])[:, None], []
    while count > 0:
        found.append(lax.top_k(values, min(count, _TOP_AT_ONCE)))
        values = values.at[row, found[-1][1]].set(-jnp.inf)
        count -= _TOP_AT_ONCE
    top, columns = zip(*found, strict=True)
    return jnp.concatenate(top, axis=-1), jnp.concatenate(columns, axis=-1)


def prompt_logprobs(
    decoder: Decoder,
    params: dict,
    bank: dict | None,
    hidden: Float[Array, "T D"],
    targets: Int[Array, "2 T"],
) -> dict:
    """Log-probability of each row's target and the most likely tokens, a few rows of logits at a
    time. targets: the tokens, and the rows of the bank (or -1)."""
    num_tokens = hidden.shape[0]
    rows = min(ROWS_AT_ONCE, num_tokens)
    padding = -num_tokens % rows
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, rows, hidden.shape[1])
    targets, adapter = jnp.pad(targets, ((0, 0), (0, padding))).reshape(2, -1, rows)

    report = lax.map(
        lambda chunk: logprobs(decoder, params, bank, *chunk), (hidden, targets, adapter)
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_tokens], report)


def write_history(
    history: dict, row: jax.Array, counts: jax.Array, prompt: jax.Array, biases: jax.Array
) -> dict:
    """Start a request's row of the history (donated): output counts [V], prompt tokens [V] bool and
    `row_biases`."""
    return {
        "counts": history["counts"].at[row].set(counts),
        "prompt": history["prompt"].at[row].set(prompt),
        "biases": history["biases"].at[:, row].set(biases),
    }
