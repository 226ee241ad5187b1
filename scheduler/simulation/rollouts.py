"""A job that learns from rewards as load of a simulated engine: its answers are requests, and what
they say is trained.

As in the engine: batch m is answered with the weights that m - `steps_ahead` batches have trained,
new batches begin while nothing is trained, of a group one answer goes ahead of the others, and the
job leaves rows to others. Graders take no time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from scheduler.coserving import Scheduler
from scheduler.latency.model import Sampling
from scheduler.request import Microbatch, Request, Slo
from scheduler.request import Sequence as RequestState

ROWS_LEFT = 4  # a quarter of the rows is left to others


@dataclass(frozen=True)
class RolloutBatch:
    """groups: of each prompt its tokens, and those of each answer. microbatches: what is trained of
    them, whoever's; none where there is nothing to learn."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]
    microbatches: tuple[Microbatch, ...]

    @classmethod
    def of(
        cls,
        groups: Sequence[tuple[int, Sequence[int]]],
        microbatch_tokens: int,
        page_size: int,
    ) -> RolloutBatch:
        """All that is said is trained, packed in microbatches of so many tokens: nothing behind the
        last token before it, and the whole pages of a prompt once a microbatch."""
        packed: list[list[tuple[int, int]]] = []  # of each sequence: tokens, and those before it
        room = 0
        for prompt, answers in groups:
            shared, begun = (prompt - 1) // page_size * page_size, False
            for answer in answers:
                own = prompt + answer - 1 - shared
                needed = own if begun else own + shared
                if not packed or needed > room:
                    packed.append([])
                    room, begun, needed = microbatch_tokens, False, own + shared
                if shared and not begun:
                    packed[-1].append((shared, 0))
                packed[-1].append((own, shared))
                room, begun = room - needed, True
        return cls(
            tuple((p, tuple(own)) for p, own in groups),
            tuple(
                Microbatch(0, lengths, before=before)
                for lengths, before in (zip(*own, strict=True) for own in packed)
            ),
        )


@dataclass
class RolloutSupply:
    """Such a job (`supply.Supply`): `batches` over and over.

    most: answers at once. slo: of their class. page_size: shorter prompts are not shared.
    """

    batches: Sequence[RolloutBatch]
    most: int
    slo: Slo
    steps_ahead: int = 0
    page_size: int = 16
    job: str = "rollouts"
    last: int | None = None  # batches in all; None: without end
    trained: int = 0  # batches
    _opened: int = 0
    _unanswered: dict[int, int] = field(default_factory=dict)  # by batch: answers to come
    _waiting: deque[tuple[int, Request]] = field(default_factory=deque)
    _behind: dict[str, list[tuple[int, Request]]] = field(default_factory=dict)  # by who is ahead
    _running: dict[str, int] = field(default_factory=dict)  # batch by request
    _ready: deque[Microbatch] = field(default_factory=deque)
    _in_work: int = 0
    _number: int = 0

    def __post_init__(self) -> None:
        if not self.batches or not all(own.groups for own in self.batches):
            raise ValueError(f"job {self.job!r} has a batch without prompts, or none")
        if not any(own.microbatches for own in self.batches):
            raise ValueError(f"job {self.job!r} has nothing to train")

    def requests(self, scheduler: Scheduler, now: float) -> list[Request]:
        """Answers that begin now."""
        while not (self._ready or self._in_work or self.trained == self.last):
            while self._opened <= self.trained + self.steps_ahead and self._opened != self.last:
                self._open(now)
            if self._unanswered[self.trained]:
                break
            del self._unanswered[self.trained]
            for own in self._batch(self.trained).microbatches:
                self._number += 1
                mine = {"microbatch_id": self._number, "job": self.job}
                self._ready.append(replace(own, **mine, weights_version=self.trained))
            if not self._ready:
                self.trained += 1
        for leader in list(self._behind):
            state = scheduler.inference.sequences.get(leader)
            if state is not None and state.first_token_at is not None:
                self._follow(leader)
        begin = []
        while self._waiting and len(self._running) < self.most:
            batch, request = self._waiting.popleft()
            self._running[request.request_id] = batch
            begin.append(request)
        return begin

    def _batch(self, number: int) -> RolloutBatch:
        return self.batches[number % len(self.batches)]

    def _open(self, now: float) -> None:
        number, self._opened = self._opened, self._opened + 1
        self._unanswered[number] = sum(len(own) for _, own in self._batch(number).groups)
        for at, (prompt, answers) in enumerate(self._batch(number).groups):
            turns = [
                (
                    number,
                    Request(
                        f"{self.job}/{number}/{at}/{i}",
                        (at,) * prompt,
                        length,
                        now,
                        (self.job, self.trained),
                        self.slo,
                        Sampling.DRAWN,
                        logprobs=True,
                        job=self.job,
                    ),
                )
                for i, length in enumerate(answers)
            ]
            if prompt > self.page_size and len(turns) > 1:
                self._behind[turns[0][1].request_id] = turns[1:]
                turns = turns[:1]
            self._waiting += turns

    def _follow(self, leader: str) -> None:
        """The prompt of a request is there for the others of its group."""
        self._waiting.extendleft(reversed(self._behind.pop(leader, [])))

    def answered(self, sequence: RequestState) -> None:
        """A request has ended."""
        request_id = sequence.request.request_id
        self._unanswered[self._running.pop(request_id)] -= 1
        self._follow(request_id)

    def next(self) -> Microbatch | None:
        """The next microbatch, once its batch is answered."""
        if not self._ready:
            return None
        self._in_work += 1
        return self._ready.popleft()

    def finished(self, microbatch: Microbatch) -> None:
        """A microbatch has gone forward and backward."""
        self._in_work -= 1
        self.trained += not (self._ready or self._in_work)
