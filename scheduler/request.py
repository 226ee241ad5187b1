"""What the scheduler is asked to do, and what it answers.

A `Request` (inference) or a `Microbatch` (finetuning) goes in; a `StepPlan` comes out, naming the
tokens of one device step and the backward units that follow it. Nothing changes once it is made
except `Sequence`, the scheduler's own record of a request, which the engine may read but not write.

Invariant: `computed` and `in_flight` describe the steps *dispatched*, not those the host has read
back; the host learns a token's value one step later, through `Scheduler.complete`.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from scheduler.drafts import PromptLookup
from scheduler.latency.model import Sampling, StepFeatures

_LONGEST_WAIT_S = 3600.0  # a request without a TTFT objective goes before one this much younger


@dataclass(frozen=True)
class Slo:
    """A class of service: latency objectives in seconds, and how much meeting them is worth.

    tpot_s   time per output token
    ttft_s   queueing + time to first token
    weight   of the class in `goodput` of the report, and of its requests when not all can be on
             time: those of twice the weight are served as if they had half the TTFT objective
    """

    tpot_s: float = math.inf
    ttft_s: float = math.inf
    weight: float = 1.0
    name: str = "standard"

    def __post_init__(self) -> None:
        for name in ("tpot_s", "ttft_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"slo.{name}={getattr(self, name)} must be more than 0 seconds")
        if not 0 < self.weight < math.inf:
            raise ValueError(f"slo.weight={self.weight} must be a number above 0")

    @property
    def patience_s(self) -> float:
        """How long after its arrival a request is due to be served: orders requests of several
        classes. It is finite, so every request is the most urgent one at some time."""
        return min(self.ttft_s, _LONGEST_WAIT_S) / self.weight


@dataclass(frozen=True)
class Request:
    """One inference request.

    `arrival` is in seconds on the clock of `Scheduler.plan(now)`. `cache_salt` (adapter name and
    version, or None for the base model) is part of every prefix-cache key: requests share KV pages
    only when their salts are equal. `slo=None` takes the scheduler's default. `sampling` and
    `logprobs` are what its tokens cost beside the forward. `job`: whose share they count in.
    `reusable`: another request may begin with the same tokens under the same salt.
    `drafts`: most tokens that are tried beside its next one.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    arrival: float
    cache_salt: Hashable = None
    slo: Slo | None = None
    sampling: int = Sampling.GREEDY
    logprobs: bool = False
    job: str | None = None
    reusable: bool = True
    drafts: int = 0


class Status(enum.Enum):
    """Where a sequence is: WAITING holds no row and no pages, RUNNING holds both."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """The scheduler's state of one request; compared by identity.

    priority       (arrival + patience, order of arrival): the least goes first
    tokens         prompt + output, the tokens whose values the host knows
    computed       positions whose KV is written by the steps dispatched so far
    in_flight      samples dispatched and not read back yet
    end            positions to compute in all: those of all tokens but the last, which is sampled
                   from the one before; with as many computed nothing is left to plan
    prefill_end    length of the prefill, fixed at admission (after a preemption it covers output)
    pages          KV pages in order of position; page i holds positions [i*size, (i+1)*size)
    row            index in [0, max_sequences), stable while RUNNING, else None
    cached_tokens  tokens found in the prefix cache at the last admission
    stops          positions where the prefill ends a chunk, so that the state there can be kept
    due            when the token after all dispatched ones is due, in seconds on the clock of
                   `arrival`: the first at arrival + ttft_s, the n-th after it at its time +
                   n x tpot_s; inf while the first is in flight, as its time is not known yet
    tpot_s, has_adapter, sampling, logprobs   of `slo` and `request`, at hand
    lookup         proposes drafts, where the request has any
    drafted        tokens of a draft in flight: their positions are in `computed` until it is known
                   how many of them came
    """

    request: Request
    slo: Slo
    priority: tuple[float, int]
    tokens: list[int]
    end: int
    due: float
    tpot_s: float
    has_adapter: bool
    sampling: int
    logprobs: bool
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
    stops: list[int] = field(default_factory=list)
    preemptions: int = 0
    lookup: PromptLookup | None = None
    drafted: int = 0

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        """Tokens known or in flight: one more than will be computed when all is dispatched."""
        return len(self.tokens) + self.in_flight

    def dispatch_prefill(self, length: int, samples: bool) -> None:
        """Count `length` more positions as computed; the last one yields a token if `samples`."""
        self.computed += length
        if samples:
            self.in_flight += 1
            self.due = math.inf if self.first_token_at is None else self.due + self.tpot_s

    def verify(self, accepted: int) -> None:
        """Of the draft in flight the first `accepted` tokens came, and are appended now."""
        if self.computed:  # else it was preempted meanwhile
            self.computed -= self.drafted - accepted
        self.in_flight += accepted
        self.due += accepted * self.tpot_s
        if self.lookup is not None:
            self.lookup.learn(len(self.tokens) + accepted + 1, self.drafted, accepted)
        self.drafted = 0

    def append(self, token: int, now: float) -> None:
        """Take in the value of the oldest sample in flight, read back at time `now`."""
        self.in_flight -= 1
        self.tokens.append(token)
        self.output.append(token)
        self.last_token_at = now
        if self.first_token_at is None:
            self.first_token_at = now
            self.due = now + (len(self.output) + self.in_flight) * self.tpot_s


@dataclass(frozen=True)
class Microbatch:
    """Packed finetuning sequences, by length in tokens; `microbatch_id` is the caller's.

    job            whose it is
    weights_version   of the job's weights that it needs: they change with every optimizer step, so
                   only microbatches of one version may overlap
    backward       False: only its log-probabilities are wanted (validation): it has scoring units
                   and no others
    scoring        its log-probabilities are wanted before any loss: it begins with scoring units
    dropout        its forward and its layer units draw masks, which costs time
    before         tokens that come before each sequence and are another of them: whole pages, which
                   several may share; empty: none
    """

    microbatch_id: int
    lengths: tuple[int, ...]
    backward: bool = True
    job: str = ""
    weights_version: int = 0
    scoring: bool = False
    dropout: bool = False
    before: tuple[int, ...] = ()

    @property
    def scored(self) -> bool:
        """Whether it has scoring units."""
        return self.scoring or not self.backward

    @property
    def tokens(self) -> int:
        """Tokens of all packed sequences."""
        return sum(self.lengths)

    @property
    def keys(self) -> tuple[int, ...]:
        """Keys that the last token of each sequence sees."""
        if not self.before:
            return self.lengths
        return tuple(map(sum, zip(self.lengths, self.before, strict=True)))


class Chunk(NamedTuple):
    """Positions [start, start + length) of a sequence; `samples`: the last one yields a token.

    drafts: its last tokens are a draft, and each but the first of the chunk counts only if it is
    what the position before yields: all positions are sampled.
    """

    sequence: Sequence
    start: int
    length: int
    samples: bool
    drafts: tuple[int, ...] = ()


# Parts of plans are not `frozen`, though nobody changes them: making them would take twice as long.


@dataclass(slots=True)
class Decode:
    """The decode tokens of a step, and what is known of all of them; iterates as chunks.

    Columns, because a step may have thousands: one token each of `sequences`, at `positions`.

    keys       KV entries they read
    due        when the first of the next tokens is due
    tpot_s     their smallest TPOT objective
    adapters   whether any has an adapter
    sampling, logprobs   the most that any needs
    """

    sequences: list[Sequence] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    keys: float = 0
    due: float = math.inf
    tpot_s: float = math.inf
    adapters: bool = False
    sampling: int = Sampling.GREEDY
    logprobs: bool = False

    def __len__(self) -> int:
        """How many."""
        return len(self.sequences)

    def __iter__(self) -> Iterator[Chunk]:
        """Each as a chunk of one token."""
        for sequence, position in zip(self.sequences, self.positions, strict=True):
            yield Chunk(sequence, position, 1, samples=True)


@dataclass(slots=True)
class FinetuneForward:
    """Tokens [start, start + length) of a microbatch, counted over its packing.

    pages     the KV pages of each packed sequence
    first_token_slot   first of the finetuning slots it holds, a multiple of `unit_tokens`
    started   this is its first forward, also after it was parked: whatever an earlier attempt
              left is void
    """

    microbatch: Microbatch
    pages: tuple[tuple[int, ...], ...]
    first_token_slot: int
    started: bool
    start: int
    length: int


@dataclass(slots=True)
class BackwardUnits:
    """Backward units of a microbatch whose forward is complete.

    units   with n = ceil(tokens / unit_tokens) slices, first n units that score one slice each,
            from the first on, if the microbatch is `scored`; then, if it goes `backward`, n units
            of the loss of one slice each, likewise, and num_layers * n of one layer x one slice
            each, layers from the last to the first and slices too
    done    `units` ends with its last one
    """

    microbatch: Microbatch
    units: range
    done: bool


@dataclass(slots=True)
class StepPlan:
    """One device step. Its parts run in this order: copies of recurrent state, forward program,
    backward units.

    decode         tokens whose input is the token last sampled for the row
    prefill        chunks whose tokens the host knows: drafts, then prompts
    forward        finetuning tokens of the forward program, after all inference tokens
    backward       units to run after the forward program; often of the microbatch before
    token_bucket   token slots of the forward program; 0 when there is no forward program
    preempted      requests that lost their pages since the plan before
    parked         microbatches that lost their pages since the plan before: their progress is
                   void and they will start again
    predicted_s    seconds the latency model expects of this step
    state_copies   slots of recurrent state to copy from and to, one copy after the other: slot i is
                   that of row i, and snapshots follow
    """

    step: int
    decode: Decode
    prefill: tuple[Chunk, ...]
    forward: FinetuneForward | None
    backward: BackwardUnits | None
    token_bucket: int
    preempted: tuple[str, ...]
    parked: tuple[int, ...]
    features: StepFeatures
    predicted_s: float
    state_copies: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of every kind in the forward program; at most `token_bucket`."""
        inference = len(self.decode) + sum(chunk.length for chunk in self.prefill)
        return inference + (self.forward.length if self.forward else 0)
