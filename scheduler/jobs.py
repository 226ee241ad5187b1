"""Which job's microbatch comes next: by priority, then weighted fair by tokens.

Every job has a virtual time, the tokens it was given divided by its weight; among the jobs of the
highest priority that have work, the one with the least goes first (start-time fair queueing, Goyal
et al., SIGCOMM'96). Over any long span two busy jobs of one priority therefore get tokens in the
proportion of their weights, whatever their microbatches' sizes. A job that comes starts at the
present virtual time, and one that comes back from having no work at most `credit` tokens before it:
so a job that has to wait for its graders, or for the results of a step, keeps its share, and what a
job did not use for long is not owed to it.

Requests of a job (the answers that a reinforcement job learns from) are its work, too: each of
their tokens counts, and while they run and it is their job's turn, no microbatch of another job
starts. Steps are short then, and the answers come soon.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from scheduler.request import Microbatch


@dataclass
class Share:
    """A job as the scheduler sees it: its queue, and its share of the finetuning tokens."""

    name: str
    weight: float = 1.0
    priority: int = 0
    paused: bool = False
    virtual_time: float = 0.0
    queue: deque[Microbatch] = field(default_factory=deque)
    in_work: int = 0  # microbatches


class JobTable:
    """The jobs of an engine and their queued microbatches. `credit`: see above."""

    def __init__(self, credit: int = 0) -> None:
        self._credit = credit
        self._jobs: dict[str | None, Share] = {}
        self.requests: Counter[str | None] = Counter()  # that hold a row, by job; None: no job's
        self._now = 0.0  # virtual time: the latest at which a job was chosen
        self._parked: set[int] = set()  # microbatches that had to give up their pages before

    def __len__(self) -> int:
        """Microbatches queued."""
        return sum(len(job.queue) for job in self._jobs.values())

    def __iter__(self) -> Iterator[Microbatch]:
        return (microbatch for job in self._jobs.values() for microbatch in job.queue)

    def add(self, name: str, weight: float = 1.0, priority: int = 0) -> None:
        """Know a job, or change its weight and priority. ValueError for a weight that is not a
        positive number."""
        if not 0 < weight < math.inf:
            raise ValueError(f"job {name!r}: weight={weight} must be a number above 0")
        job = self._jobs.setdefault(name, Share(name, virtual_time=self._now))
        job.weight, job.priority = weight, priority

    def remove(self, name: str) -> None:
        """Forget a job and what it has queued."""
        job = self._jobs.pop(name, None)
        for microbatch in job.queue if job else ():
            self._parked.discard(microbatch.microbatch_id)

    def pause(self, name: str, paused: bool) -> None:
        """Let a job's queue wait, or go on. KeyError if the job is unknown."""
        self._jobs[name].paused = paused

    def is_paused(self, name: str) -> bool:
        """Whether a job is paused."""
        return self._jobs[name].paused

    def queued(self, name: str) -> int:
        """Microbatches queued for a job."""
        return len(self._jobs[name].queue) if name in self._jobs else 0

    def push(self, microbatch: Microbatch) -> None:
        """Queue a microbatch with its job, which is added if it is not known."""
        if microbatch.job not in self._jobs:
            self.add(microbatch.job)
        job = self._jobs[microbatch.job]
        self._comes_back(job)
        job.queue.append(microbatch)

    def _comes_back(self, job: Share) -> None:
        """It is about to have work."""
        if not (job.queue or job.in_work or self.requests[job.name]):
            earliest = self._now - self._credit / job.weight
            job.virtual_time = max(job.virtual_time, earliest)

    def drop(self, microbatch_id: int) -> bool:
        """Take a microbatch out of its queue; False if it is in none."""
        for job in self._jobs.values():
            for microbatch in job.queue:
                if microbatch.microbatch_id == microbatch_id:
                    job.queue.remove(microbatch)
                    self._parked.discard(microbatch_id)
                    return True
        return False

    def next(self, may_start: Callable[[Microbatch], bool]) -> Microbatch | None:
        """The microbatch to start next among the heads that may; None if there is none, or if it is
        the turn of a job's requests."""
        best = None
        for job in self._jobs.values():
            startable = job.queue and may_start(job.queue[0])
            if job.paused or not (startable or self.requests[job.name]):
                continue
            if best is None or (-job.priority, job.virtual_time) < (
                -best.priority,
                best.virtual_time,
            ):
                best = job
        return best.queue[0] if best and best.queue and may_start(best.queue[0]) else None

    def was_parked(self, microbatch: Microbatch) -> bool:
        """Whether a queued microbatch had to give up its pages before."""
        return microbatch.microbatch_id in self._parked

    def start(self, microbatch: Microbatch) -> None:
        """Take the head of a job's queue into work and charge its tokens."""
        job = self._jobs[microbatch.job]
        job.queue.popleft()
        job.in_work += 1
        self._now = max(self._now, job.virtual_time)
        job.virtual_time += microbatch.tokens / job.weight

    def put_back(self, microbatch: Microbatch) -> None:
        """Return a microbatch in work to the head of its queue, its tokens uncharged."""
        job = self._jobs[microbatch.job]
        job.queue.appendleft(microbatch)
        job.in_work -= 1
        job.virtual_time -= microbatch.tokens / job.weight
        self._parked.add(microbatch.microbatch_id)

    def request_runs(self, name: str | None) -> None:
        """A request was given a row."""
        if job := self._jobs.get(name):
            self._comes_back(job)
        self.requests[name] += 1

    def request_rests(self, name: str | None) -> None:
        """It has lost its row, or ended."""
        self.requests[name] -= 1

    def charge(self, name: str | None, tokens: int) -> None:
        """Tokens of a job's requests were computed."""
        if job := self._jobs.get(name):
            job.virtual_time += tokens / job.weight

    def done(self, microbatch: Microbatch) -> None:
        """A microbatch in work is complete, or cancelled."""
        self._parked.discard(microbatch.microbatch_id)
        if job := self._jobs.get(microbatch.job):
            job.in_work -= 1
