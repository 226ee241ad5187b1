"""The engine's record of a request: what was asked, what came out, and how far the host has read.

The scheduler knows tokens and pages; this knows sampling, stop conditions and log-probabilities.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from flexllm_jax.engine.sampling.constraints import Constraint
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.models.text.detokenizer import Detokenizer, OutputText
from flexllm_jax.peft.directory import Published
from scheduler.latency.model import Sampling
from scheduler.request import Slo
from scheduler.slo import RequestTiming

# token -> log-probability: the token itself and the most likely ones
TokenLogprobs = dict[int, float]


@dataclass
class RequestState:
    """One output sequence from arrival to finish.

    `row`, `preemptions` and `copied_pages` say which part of the scheduler's page list the engine
    has in its page table. `constraint` has taken in the tokens of `output`.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int  # of 64 bits
    arrival: float
    stop_ids: frozenset[int]
    adapter: Published | None = None
    slo: Slo | None = None  # None: the engine's default
    constraint: Constraint | None = None  # what may come
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    started_at: float | None = None  # when the first step that computes it was dispatched
    cached_tokens: int = 0  # of the prompt, found in the prefix cache then
    first_token_at: float | None = None
    last_token_at: float | None = None
    on_finish: Callable[["RequestState"], None] | None = None  # called in the engine's thread
    row: int = -1
    preemptions: int = -1
    copied_pages: int = 0
    _text: OutputText | None = None  # of a request with stop strings

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    @property
    def timing(self) -> RequestTiming:
        """Its part of a report."""
        return RequestTiming(
            arrival=self.arrival,
            prompt_tokens=len(self.prompt),
            output_tokens=len(self.output),
            first_token_at=self.first_token_at,
            last_token_at=self.last_token_at,
            failed=self.error is not None or self.finish_reason in (None, "cancelled"),
            slo=self.slo,
        )

    @cached_property  # read in every step
    def seed_words(self) -> tuple[np.int32, np.int32]:
        """The lower and the upper half of its seed."""
        low, high = np.array([self.seed], np.uint64).view(np.int32)
        return low, high

    @property
    def bank_row(self) -> int:
        """Row of the bank of its adapter, or -1."""
        return self.adapter.bank_slot - 1 if self.adapter else -1

    @property
    def prefix_tokens(self) -> int:
        """Positions that its adapter takes before its first token."""
        return self.adapter.config.prefix_tokens if self.adapter else 0

    def sampling(self, index: int) -> Sampling:
        """What output token `index` needs; the first needs the most."""
        p = self.params
        if p.temperature > 0:
            filtered = p.top_k > 0 or p.top_p < 1 or p.min_p > 0
            return Sampling.FILTERED if filtered else Sampling.DRAWN
        adjusted = p.has_row_state or index < p.held_back or self.constraint is not None
        return Sampling.ADJUSTED if adjusted else Sampling.GREEDY

    def take_logprobs(self, token: int, report: dict, row: int) -> None:
        """Take in what `sampler.logprobs` tells of a sampled token, in a row of its report."""
        count, own = self.params.logprobs or 0, report["logprobs"][row]
        tokens, values = report["top_tokens"][row], report["top_logprobs"][row]
        if wanted := self.params.logprob_token_ids:
            tokens, values, count = np.array(wanted), report["wanted"][row], len(wanted)
        self.logprobs.append(top_logprobs(token, own, tokens, values, count))

    def append(self, token: int, detokenizer: Detokenizer) -> str | None:
        """Take in a sampled token; returns "stop" when it is the last one.

        The request's own stop tokens and strings are looked at here; the scheduler knows about
        max_tokens. A stop token stays in `output` (as in vLLM's token_ids).
        """
        now = time.monotonic()
        self.first_token_at = self.first_token_at or now
        self.last_token_at = now
        self.output.append(token)
        if self.constraint:
            self.constraint.consume(token)
        if self._ended_by_token:
            return "stop"
        if not self.params.stop:
            return None
        if self._text is None:
            self._text = self._begin_text(detokenizer)
        return "stop" if self._text.push(token) else None

    def _begin_text(self, detokenizer: Detokenizer, keep: Collection[str] = ()) -> OutputText:
        return OutputText(
            detokenizer,
            self.prompt,
            self.params.stop,
            self.params.min_tokens,
            include_stop=self.params.include_stop_str_in_output,
            keep=keep,
        )

    @property
    def _ended_by_token(self) -> bool:
        """Whether its last token is a stop token where one ends it."""
        last = self.output[-1:]
        return self.stop_ids.issuperset(last) and len(self.output) > self.params.held_back

    def text(self, detokenizer: Detokenizer, keep: Collection[str] = ()) -> str:
        """The output as text, without special tokens but those that `keep` names; the stop token or
        string that ended it is left out unless it was asked for."""
        if self._text is not None and self._text.stopped:
            text = self._begin_text(detokenizer, keep) if keep else self._text
            for token in self.output if keep else ():
                text.push(token)
            return text.text
        left_out = self._ended_by_token and not self.params.include_stop_str_in_output
        tokens = self.output[:-1] if left_out else self.output
        return detokenizer.output_text(self.prompt, tokens, keep)


def top_logprobs(
    token: int, logprob: float, tokens: np.ndarray, logprobs: np.ndarray, count: int
) -> TokenLogprobs:
    """The token's log-probability and those of the first `count` of `tokens`."""
    pairs = zip(tokens[:count].tolist(), logprobs[:count].tolist(), strict=True)
    return dict(pairs) | {token: float(logprob)}
