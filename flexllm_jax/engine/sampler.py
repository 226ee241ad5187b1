"""Sampling on the device, and the log-probabilities that requests ask for.

Two programs share the contract: `sample_greedy` takes the largest logit and nothing else;
`sample_full` applies, in vLLM's order, penalties, banned tokens and those that a structured output
does not allow, temperature, min-p, top-k and top-p, draws with the request's own key, and reports
log-probabilities. The host picks the full one only when a request of the step needs it. A draw
depends on the request's seed and the index of its token alone, so neither batching nor preemption
changes it. Log-probabilities are those of the raw logits, as in training.
"""

from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from flexllm_jax.engine.sampling_params import BANNED, TOP_LOGPROBS
from flexllm_jax.engine.structured_outputs import BITS
from flexllm_jax.models.bypass import BypassFunction, no_bypass
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.peft.bypass import Bypass

_ROWS_AT_ONCE = 64


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
    seed: np.ndarray
    top_k: np.ndarray
    banned: np.ndarray  # [R, BANNED], -1 where empty
    temperature: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray

    @classmethod
    def neutral(cls, rows: int, no_row: int) -> "SamplingRows":
        """Greedy sampling in no row."""
        ints = {"row": no_row, "adapter": -1, "index": 0, "seed": 0, "top_k": 0}
        floats = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0}
        floats |= {"presence": 0.0, "frequency": 0.0}
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


_FLOATS = {"temperature", "top_p", "min_p", "repetition", "presence", "frequency"}
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
    read. Arguments as in `sample_full`."""
    tokens = decoder.most_likely(params, hidden, _head_bypass(bank, packed[1]))
    return tokens, last_tokens.at[packed[0]].set(tokens, mode="drop")


def sample_full(
    decoder: Decoder,
    params: dict,
    bank: dict | None,
    hidden: Float[Array, "R D"],
    last_tokens: Int[Array, " Q"],
    history: dict,
    packed: Int[Array, "C R"],
    allowed: Int[Array, "R W"],
) -> tuple[dict, Int[Array, " Q"], dict]:
    """Draw a token for each row with everything a request can ask for.

    Args:
        decoder: the model's functions.
        params: parameters; the final norm and the head are read.
        bank: the output head's {"weights", "scales"} of the adapter bank, or None if it has none.
        hidden: last-layer outputs of the rows.
        last_tokens: newest token of each request row; donated.
        history: {"counts": [Q, V] int32 output tokens so far, "prompt": [Q, V] bool}; donated.
        packed: `SamplingRows`.
        allowed: the tokens that may be drawn, as the bits of `TokenMatchers.allowed`.

    Returns:
        {"tokens", "logprobs", "top_tokens", "top_logprobs"}, last_tokens, history.
    """
    rows = SamplingRows.unpack(packed)
    logits = decoder.logits(params, hidden, _head_bypass(bank, rows.adapter))
    report = _logprobs(logits)
    counts = history["counts"].at[rows.row].get(mode="fill", fill_value=0)
    seen = history["prompt"].at[rows.row].get(mode="fill", fill_value=False) | (counts > 0)

    repetition = rows.repetition[:, None]
    penalized = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(seen, penalized, logits)
    logits -= rows.frequency[:, None] * counts + rows.presence[:, None] * (counts > 0)
    row = jnp.arange(logits.shape[0])[:, None]
    banned = jnp.where(rows.banned < 0, logits.shape[1], rows.banned)
    logits = logits.at[row, banned].set(-jnp.inf, mode="drop")
    bits = (allowed[:, :, None] >> jnp.arange(BITS)) & 1
    bits = bits.reshape(allowed.shape[0], -1)[:, : logits.shape[1]]
    logits = jnp.where(bits == 1, logits, -jnp.inf)

    tokens = jnp.where(rows.temperature > 0, _draw(logits, rows), jnp.argmax(logits, axis=-1))
    tokens = tokens.astype(jnp.int32)
    counts = history["counts"].at[rows.row, tokens].add(1, mode="drop")
    report |= {"tokens": tokens, "logprobs": _of(report.pop("all"), tokens)}
    last_tokens = last_tokens.at[rows.row].set(tokens, mode="drop")
    return report, last_tokens, history | {"counts": counts}


def _draw(logits: Float[Array, "R V"], rows: SamplingRows) -> Int[Array, " R"]:
    """A token from the distribution that temperature, min-p, top-k and top-p leave."""
    logits = logits / jnp.maximum(rows.temperature, 1e-6)[:, None]
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[1])
    likely = jax.nn.softmax(ordered, axis=-1)
    top_k = jnp.where(rows.top_k > 0, rows.top_k, logits.shape[1])
    kept = (likely >= rows.min_p[:, None] * likely[:, :1]) & (rank < top_k[:, None])
    likely = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(likely, axis=-1) - likely
    kept &= (before < rows.top_p[:, None]) | (rank == 0)
    smallest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    noise = jax.vmap(
        lambda seed, index: jax.random.gumbel(
            jax.random.fold_in(jax.random.key(seed), index), logits.shape[1:]
        )
    )(rows.seed, rows.index)
    return jnp.argmax(jnp.where(logits >= smallest, logits + noise, -jnp.inf), axis=-1)


def _logprobs(logits: Float[Array, "R V"]) -> dict:
    all_of_them = jax.nn.log_softmax(logits, axis=-1)
    top, tokens = lax.top_k(all_of_them, min(TOP_LOGPROBS, logits.shape[1]))
    return {"all": all_of_them, "top_tokens": tokens, "top_logprobs": top}


def _of(logprobs: Float[Array, "R V"], tokens: Int[Array, " R"]) -> Float[Array, " R"]:
    return jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


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
    rows = min(_ROWS_AT_ONCE, num_tokens)
    padding = -num_tokens % rows
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(-1, rows, hidden.shape[1])
    targets, adapter = jnp.pad(targets, ((0, 0), (0, padding))).reshape(2, -1, rows)

    def some(chunk):
        bypass = _head_bypass(bank, chunk[2])
        report = _logprobs(decoder.logits(params, chunk[0], bypass))
        return report | {"logprobs": _of(report.pop("all"), chunk[1])}

    report = lax.map(some, (hidden, targets, adapter))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_tokens], report)


def write_history(history: dict, row: jax.Array, counts: jax.Array, prompt: jax.Array) -> dict:
    """Start a request's row of the history (donated): output counts [V] and prompt tokens [V]
    bool."""
    return {
        "counts": history["counts"].at[row].set(counts),
        "prompt": history["prompt"].at[row].set(prompt),
    }
