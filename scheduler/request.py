"""What the scheduler is asked to do, and what it answers.

A `Request` (inference) or a `Microbatch` (finetuning) goes in; a `StepPlan` comes out, naming the
tokens of one device step and the backward units that follow it. Everything is frozen except
`Sequence`, the scheduler's own record of a request, which the engine may read but not write.

Invariant: `computed` and `in_flight` describe the steps *dispatched*, not those the host has read
back; the host learns a token's value one step later, through `Scheduler.complete`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler.latency import StepFeatures


@dataclass(frozen=True)
class Slo:
    """Latency objectives in seconds: time per output token, and queueing + time to first token."""

    tpot_s: float = math.inf
    ttft_s: float = math.inf

    def __post_init__(self) -> None:
        for name in ("tpot_s", "ttft_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"slo.{name}={getattr(self, name)} must be more than 0 seconds")


@dataclass(frozen=True)
class Request:
    """One inference request.

    `arrival` is in seconds on the clock of `Scheduler.plan(now)`. `cache_salt` (adapter name and
    version, or None for the base model) is part of every prefix-cache key: requests share KV pages
    only when their salts are equal. `slo=None` takes the scheduler's default.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    arrival: float
    cache_salt: Hashable = None
    slo: Slo | None = None


class Status(enum.Enum):
    """Where a sequence is: WAITING holds no row and no pages, RUNNING holds both."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """The scheduler's state of one request; compared by identity.

    tokens         prompt + output, the tokens whose values the host knows
    computed       positions whose KV is written by the steps dispatched so far
    in_flight      samples dispatched and not read back yet
    to_sample      samples not dispatched yet; at 0 nothing is left to plan
    prefill_end    length of the prefill, fixed at admission (after a preemption it covers output)
    pages          KV pages in order of position; page i holds positions [i*size, (i+1)*size)
    row            index in [0, max_sequences), stable while RUNNING, else None
    cached_tokens  tokens found in the prefix cache at the last admission
    """

    request: Request
    slo: Slo
    priority: tuple[float, int]
    tokens: list[int]
    to_sample: int
    output: list[int] = field(default_factory=list)
    computed: int = 0
    in_flight: int = 0
    prefill_end: int = 0
    pages: list[int] = field(default_factory=list)
    row: int | None = None
    status: Status = Status.WAITING
    finish_reason: str | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Tokens known or in flight: one more than will be computed when all is dispatched."""
        return len(self.tokens) + self.in_flight

    def append(self, token: int, now: float) -> None:
        """Take in the value of the oldest sample in flight, read back at time `now`."""
        self.in_flight -= 1
        self.tokens.append(token)
        self.output.append(token)
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now


@dataclass(frozen=True)
class Microbatch:
    """Packed finetuning sequences, by length in tokens; `microbatch_id` is the caller's.

    `backward=False`: only its loss is wanted (validation), so it has loss units and no others.
    """

    microbatch_id: int
    lengths: tuple[int, ...]
    backward: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of all packed sequences."""
        return sum(self.lengths)


class Chunk(NamedTuple):
    """Positions [start, start + length) of a sequence; `samples`: the last one yields a token."""

    sequence: Sequence
    start: int
    length: int
    samples: bool


@dataclass(frozen=True)
class FinetuneForward:
    """Tokens [start, start + length) of the current microbatch, counted over its packing."""

    start: int
    length: int


@dataclass(frozen=True)
class StepPlan:
    """One device step. Its parts run in this order: forward program, then backward units.

    decode             chunks of one token whose input is the token last sampled for the row
    prefill            chunks whose tokens the host knows
    microbatch         the microbatch worked on, or None when the step holds no finetuning
    microbatch_pages   the pages of each packed sequence, while `microbatch` is set
    microbatch_started this is the microbatch's first forward, also after it was parked: whatever
                       an earlier attempt left (saved inputs, gradients) is void
    forward            finetuning tokens of the forward program, after all inference tokens
    units              backward units to run after it: with w = ceil(tokens / backward_window),
                       units [0, w) are one loss window each and units [w, w + num_layers * w)
                       one layer x one window each (these not for `Microbatch.backward=False`)
    microbatch_done    `units` ends with the microbatch's last unit
    token_bucket       token slots of the forward program; 0 when there is no forward program
    preempted          requests that lost their pages since the plan before
    parked             the microbatch in work lost its pages since the plan before; its progress
                       is void and it will start again
    predicted_s        seconds the latency model expects of this step
    """

    step: int
    decode: tuple[Chunk, ...]
    prefill: tuple[Chunk, ...]
    microbatch: Microbatch | None
    microbatch_pages: tuple[tuple[int, ...], ...]
    microbatch_started: bool
    forward: FinetuneForward | None
    units: range
    microbatch_done: bool
    token_bucket: int
    preempted: tuple[str, ...]
    parked: bool
    features: StepFeatures
    predicted_s: float

    @property
    def num_tokens(self) -> int:
        """Tokens of every kind in the forward program; at most `token_bucket`."""
        inference = len(self.decode) + sum(chunk.length for chunk in self.prefill)
        return inference + (self.forward.length if self.forward else 0)
