"""Jobs as load of a simulated engine: what they train, and what they ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scheduler.coserving import Scheduler
from scheduler.request import Microbatch, Request
from scheduler.request import Sequence as RequestState


class Supply(Protocol):
    """A job without end."""

    job: str

    def requests(self, scheduler: Scheduler, now: float) -> Sequence[Request]:
        """Requests of its own (`Request.job`) that begin now."""
        ...

    def answered(self, sequence: RequestState) -> None:
        """One of them has ended."""
        ...

    def next(self) -> Microbatch | None:
        """The next microbatch, if there is one yet."""
        ...

    def finished(self, microbatch: Microbatch) -> None:
        """A microbatch has gone forward and backward."""
        ...


class TrainingSupply:
    """A `Supply` that asks nothing: what comes next does not depend on what was before."""

    def requests(self, scheduler: Scheduler, now: float) -> Sequence[Request]:
        """None."""
        return ()

    def answered(self, sequence: RequestState) -> None:
        """Never called."""

    def finished(self, microbatch: Microbatch) -> None:
        """Nothing waits for it."""


class FinetuneSupply(TrainingSupply):
    """A job without end: sequences of `lengths`, over and over, `accumulation` of them a batch.

    Consecutive sequences of a batch are packed in microbatches of at most `microbatch_tokens`; a
    longer one is a microbatch of its own.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        microbatch_tokens: int,
        accumulation: int = 8,
        job: str = "finetune",
    ) -> None:
        if not lengths:
            raise ValueError(f"job {job!r} has no sequences")
        self.job = job
        self._lengths, self._microbatch_tokens = list(lengths), microbatch_tokens
        self._accumulation = accumulation
        self._used = self._microbatches = 0

    def next(self) -> Microbatch:
        """The next microbatch."""
        batch, packed = self._used // self._accumulation, []
        while self._used // self._accumulation == batch:
            length = self._lengths[self._used % len(self._lengths)]
            if packed and sum(packed) + length > self._microbatch_tokens:
                break
            packed.append(length)
            self._used += 1
        self._microbatches += 1
        return Microbatch(self._microbatches, tuple(packed), job=self.job, weights_version=batch)
