"""The engine's record of a request: what was asked, what came out, and how far the host has read.

The scheduler knows tokens and pages; this knows sampling, stop conditions and log-probabilities.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llguidance import LLMatcher
from tokenizers.decoders import DecodeStream

from flexllm_jax.engine.sampling_params import SamplingParams
from flexllm_jax.peft.bank import Published
from scheduler.request import Slo
from scheduler.slo import RequestTiming

# token -> log-probability: the token itself and the most likely ones
TokenLogprobs = dict[int, float]


@dataclass
class RequestState:
    """One output sequence from arrival to finish.

    `row`, `preemptions` and `copied_pages` say which part of the scheduler's page list the engine
    has in its page table. `matcher` has taken in the tokens of `output`.
    """

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    arrival: float
    stop_ids: frozenset[int]
    adapter: Published | None = None
    slo: Slo | None = None  # None: the engine's default
    matcher: LLMatcher | None = None  # of a structured output
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    started_at: float | None = None  # when the first step that computes it was dispatched
    cached_tokens: int = 0  # of the prompt, found in the prefix cache then
    first_token_at: float | None = None
    last_token_at: float | None = None
    row: int = -1
    preemptions: int = -1
    copied_pages: int = 0
    stop_text: str | None = None  # the output before the stop string that ended it
    _text: str = ""
    _stream: DecodeStream | None = None

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

    @property
    def bank_row(self) -> int:
        """Row of the bank of its adapter, or -1."""
        return self.adapter.bank_slot - 1 if self.adapter else -1

    @property
    def prefix_tokens(self) -> int:
        """Positions that its adapter takes before its first token."""
        return self.adapter.config.prefix_tokens if self.adapter else 0

    def needs_full_sampling(self, index: int) -> bool:
        """Whether output token `index` needs more than the largest logit."""
        p = self.params
        return (
            p.temperature > 0
            or p.logprobs is not None
            or p.needs_history
            or index < p.min_tokens
            or self.matcher is not None
        )

    def append(self, token: int, tokenizer: Any) -> str | None:
        """Take in a sampled token; returns "stop" when it is the last one.

        The request's own stop tokens and strings are looked at here; the scheduler knows about
        max_tokens. A stop token stays in `output` (as in vLLM's token_ids); text leaves it out.
        """
        now = time.monotonic()
        self.first_token_at = self.first_token_at or now
        self.last_token_at = now
        self.output.append(token)
        if self.matcher:
            self.matcher.consume_token(token)
        if token in self.stop_ids and len(self.output) > self.params.min_tokens:
            return "stop"
        if self.params.stop and self._stop_string(token, tokenizer):
            return "stop"
        return None

    def _stop_string(self, token: int, tokenizer: Any) -> bool:
        if self._stream is None:
            self._stream = DecodeStream(skip_special_tokens=True)
        piece = self._stream.step(tokenizer._tokenizer, token)
        if not piece:
            return False
        longest = max(map(len, self.params.stop))
        searched = max(0, len(self._text) - longest + 1)
        self._text += piece
        if len(self.output) <= self.params.min_tokens:
            return False
        found = [at for s in self.params.stop if (at := self._text.find(s, searched)) >= 0]
        if found:
            self.stop_text = self._text[: min(found)]
        return bool(found)

    def text(self, tokenizer: Any) -> str:
        """The output as text, without special tokens and without the stop string."""
        if self.stop_text is not None:
            return self.stop_text
        return tokenizer.decode(self.output, skip_special_tokens=True)


def top_logprobs(
    token: int, logprob: float, tokens: np.ndarray, logprobs: np.ndarray, count: int
) -> TokenLogprobs:
    """The token's log-probability and those of the `count` most likely ones."""
    pairs = zip(tokens[:count].tolist(), logprobs[:count].tolist(), strict=True)
    return dict(pairs) | {token: float(logprob)}
