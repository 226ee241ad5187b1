"""Replays a workload in real time: every request is queued when the trace says it arrives.

Latencies count from that moment, however late the engine took the request. A request generates
exactly the output tokens that its trace gives. One that the engine refuses counts as failed, with
the reason, and the others go on.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from flexllm_jax.config import ConfigError, WorkloadSection
from flexllm_jax.engine.loop import NewRequest, RequestFuture
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.llm import LLM
from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.messages import read_conversation
from flexllm_jax.models.text.tokenizer import encode_text
from scheduler.simulation.workload import Arrival, Lengths, load_trace, make_arrivals
from scheduler.slo import RequestTiming


@dataclass(frozen=True)
class ReplayRequest:
    """A request that arrives `arrival_s` seconds after the start."""

    arrival_s: float
    prompt: tuple[int, ...]
    output_tokens: int


def prepare_requests(
    workload: WorkloadSection, tokenizer: Any, vocab_size: int
) -> list[ReplayRequest]:
    """The requests of a workload, in order of arrival, prompts as token ids below `vocab_size`.

    Request i gets prompt i of `workload.prompts`, which starts over when it ends, through the
    tokenizer's chat template if it has one. Raises ConfigError for a trace or prompts that cannot
    be used.
    """
    arrivals = read_arrivals(workload)[: workload.max_requests]
    if not arrivals:
        raise ConfigError(
            "workload.arrivals: no request arrives; raise workload.arrivals.rate or duration_s"
        )
    if workload.prompts is None:
        return [
            ReplayRequest(arrival.arrival_s, prompt, arrival.output_tokens)
            for arrival, prompt in zip(
                arrivals,
                _random_prompts(arrivals, tokenizer, vocab_size, workload.seed),
                strict=True,
            )
        ]
    texts = read_prompts(workload.prompts, "workload.prompts")[: len(arrivals)]
    template = ChatTemplate(tokenizer)
    prompts = [tokens for text in texts if (tokens := encode_prompt(template, text))]
    if not prompts:
        raise ConfigError(f"workload.prompts: the tokenizer makes no tokens of {workload.prompts}")
    return [
        ReplayRequest(
            arrival.arrival_s,
            fit_prompt(prompts[i % len(prompts)], arrival.prompt_tokens),
            arrival.output_tokens,
        )
        for i, arrival in enumerate(arrivals)
    ]


def encode_prompt(template: ChatTemplate, text: str) -> list[int]:
    """Token ids of a user's message, through the chat template if the tokenizer has one."""
    tokenizer = template.tokenizer
    if not template.exists:
        return encode_text(tokenizer, text)
    rendered = template.render(read_conversation([{"role": "user", "content": text}]))
    return encode_text(tokenizer, rendered, add_special_tokens=False)


def fit_prompt(tokens: list[int], length: int) -> tuple[int, ...]:
    """Exactly `length` tokens: the prompt's last ones, after as many repetitions as it takes.

    The end stays as it is, for that is where a chat template hands over to the model.
    """
    repeated = tokens * -(-length // len(tokens))
    return tuple(repeated[len(repeated) - length :])


class Replay:
    """The requests of a workload on their way through an engine.

    `start` begins; `advance`, called often, queues what has arrived and notes what is done.
    """

    def __init__(self, llm: LLM, requests: list[ReplayRequest], workload: WorkloadSection):
        self._llm, self._requests, self._workload = llm, requests, workload
        self._started = 0.0
        self._active: list[RequestFuture] = []
        self.timings: list[RequestTiming] = []  # of requests that are done or failed
        self.failures: Counter[str] = Counter()  # reason -> requests

    @property
    def total(self) -> int:
        """Requests in all, arrived or not."""
        return len(self._requests)

    @property
    def submitted(self) -> int:
        """Requests that have arrived."""
        return len(self._active) + len(self.timings)

    @property
    def failed(self) -> int:
        """Requests that failed."""
        return sum(self.failures.values())

    @property
    def running(self) -> int:
        """Requests that have got their first token and not their last."""
        return sum(future.state.first_token_at is not None for future in self._active)

    @property
    def waiting(self) -> int:
        """Requests that have arrived and got no token yet."""
        return len(self._active) - self.running

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        done = sum(timing.output_tokens for timing in self.timings)
        return done + sum(len(future.state.output) for future in self._active)

    @property
    def finished(self) -> bool:
        """Whether every request has arrived and is answered, or failed."""
        return len(self.timings) == len(self._requests)

    def start(self) -> None:
        """The trace begins now."""
        self._started = time.monotonic()

    def advance(self) -> float:
        """Queue what has arrived, note what is done; returns the seconds to the next arrival."""
        self.collect()
        now, first = time.monotonic() - self._started, self.submitted
        last = first
        while last < len(self._requests) and self._requests[last].arrival_s <= now:
            last += 1
        if last > first:
            new = [self._new_request(i) for i in range(first, last)]
            for request, future in zip(new, self._llm.submit_all(new), strict=True):
                if future.done() and (error := future.exception()):
                    self._fail(
                        RequestTiming(request.arrival, len(request.prompt), 0, None, None, True),
                        str(error),
                    )
                else:
                    self._active.append(future)
        if last == len(self._requests):
            return float("inf")
        return max(0.0, self._started + self._requests[last].arrival_s - time.monotonic())

    def _new_request(self, index: int) -> NewRequest:
        request, workload = self._requests[index], self._workload
        params = SamplingParams(
            max_tokens=request.output_tokens,
            ignore_eos=True,
            temperature=workload.temperature,
            seed=workload.seed + index,
        )
        arrival = self._started + request.arrival_s
        return NewRequest(
            request.prompt, params, workload.adapter, arrival, slo_class=workload.slo_class
        )

    def stop(self) -> int:
        """Drop the requests that are being answered, noted with the tokens that they have, and send
        no more; returns how many were dropped."""
        self.collect()
        dropped, self._active = self._active, []
        self._requests = self._requests[: len(self.timings) + len(dropped)]
        for future in dropped:
            timing = future.state.timing
            self.timings.append(replace(timing, failed=timing.first_token_at is None))
            future.cancel()
        return len(dropped)

    def collect(self) -> None:
        """Note the requests that are done."""
        active, self._active = self._active, []
        for future in active:
            if not future.done():
                self._active.append(future)
                continue
            state, error = future.state, future.exception()
            if error or state.error:
                self._fail(state.timing, str(error or state.error))
            else:
                self.timings.append(state.timing)

    def _fail(self, timing: RequestTiming, reason: str) -> None:
        self.timings.append(timing)
        self.failures[re.sub(r"^request '\d+': ", "", reason)] += 1


def read_arrivals(workload: WorkloadSection) -> list[Arrival]:
    """The arrivals of a trace, or made-up ones. ConfigError for a trace that cannot be used."""
    if workload.trace is not None:
        try:
            return load_trace(workload.trace, workload.time_scale)
        except UnicodeDecodeError:
            raise ConfigError(f"workload.trace: {workload.trace} is not a CSV text file") from None
        except OSError as error:
            raise ConfigError(f"workload.trace: {workload.trace}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"workload.trace: {error}") from None
    made = workload.arrivals
    assert made is not None  # WorkloadSection has one of the two
    arrivals = make_arrivals(
        made.process,
        made.rate / workload.time_scale,
        made.duration_s * workload.time_scale,
        workload.seed,
        made.cv,
        Lengths(made.prompt_tokens),
        Lengths(made.output_tokens),
    )
    return arrivals


def _random_prompts(
    arrivals: list[Arrival], tokenizer: Any, vocab_size: int, seed: int
) -> Iterator[tuple[int, ...]]:
    special = set(tokenizer.all_special_ids)
    ordinary = np.array([i for i in range(min(len(tokenizer), vocab_size)) if i not in special])
    generator = np.random.default_rng([seed, 3])
    for arrival in arrivals:
        yield tuple(generator.choice(ordinary, arrival.prompt_tokens).tolist())


def read_prompts(path: Path, field: str) -> list[str]:
    """The texts in a JSONL file's field `prompt`; ConfigError, naming `field`, when it has none."""
    prompts = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ConfigError(f"{field}: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{field}: {path} is not a JSONL text file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(
                f'{field}: {path}:{number}: must be a JSON object with a text "prompt"'
            )
        prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{field}: {path} has no prompts")
    return prompts
