"""The finetuning side of a step: jobs' microbatches, of which up to two are in work.

One goes backward while the next goes forward, so that padding has tokens to hold and slack has
units to run. A microbatch starts beside another only if its weights will not change meanwhile:
both belong to the same optimizer batch, or to different jobs. It holds KV pages and finetuning
slots from its first forward to its last unit. Parking gives them up and forgets its progress: its
keys and values are what later tokens and the backward read.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from scheduler.cache.pages import PagePool
from scheduler.choice import Allowance, choose
from scheduler.config import SchedulerConfig
from scheduler.jobs import JobTable
from scheduler.latency.model import LatencyModel, StepFeatures
from scheduler.progress import Progress
from scheduler.request import BackwardUnits, FinetuneForward, Microbatch, StepPlan

_CREDIT = 8  # buffers full of tokens that a job may be behind when it comes back


class FinetuneWork(NamedTuple):
    """The finetuning part of a step plan; its fields are those of `StepPlan`."""

    forward: FinetuneForward | None
    backward: BackwardUnits | None
    features: StepFeatures


class FinetuneQueue:
    """The microbatches of all jobs: those queued (`jobs`) and those in work, oldest first.

    `overlap=False`: a microbatch starts when the one before is done.
    """

    def __init__(
        self, config: SchedulerConfig, pool: PagePool, latency: LatencyModel, overlap: bool
    ) -> None:
        self.config, self.pool, self.latency = config, pool, latency
        self.jobs = JobTable(_CREDIT * config.finetune_slots)
        self.in_work: list[Progress] = []
        self._most_in_work = 2 if overlap else 1
        self._candidate: Progress | None = None  # looked at last; kept, as it may be again
        self.pages_held = 0  # that parking would give back

    def __len__(self) -> int:
        """Microbatches queued or in work."""
        return len(self.jobs) + len(self.in_work)

    def add(self, microbatch: Microbatch) -> None:
        """Queue a microbatch that fits when it is alone; its id must be new."""
        known = itertools.chain(self.jobs, (progress.microbatch for progress in self.in_work))
        if any(microbatch.microbatch_id == other.microbatch_id for other in known):
            raise ValueError(
                f"microbatch {microbatch.microbatch_id} is already queued: use a new id"
            )
        self.jobs.push(microbatch)

    def of_job(self, job: str) -> int:
        """Microbatches of a job, queued or in work."""
        count = self.jobs.queued(job)
        for progress in self.in_work:
            count += progress.microbatch.job == job
        return count

    def cancel(self, microbatch_id: int) -> bool:
        """Drop a microbatch, its pages and its slots; False if it is unknown."""
        for progress in self.in_work:
            if progress.microbatch.microbatch_id == microbatch_id:
                self._release(progress)
                self.jobs.done(progress.microbatch)
                return True
        return self.jobs.drop(microbatch_id)

    def remove_job(self, job: str) -> None:
        """Drop a job and all its microbatches."""
        for progress in tuple(self.in_work):
            if progress.microbatch.job == job:
                self._release(progress)
        self.jobs.remove(job)

    def pause_job(self, job: str) -> list[int]:
        """Let a job wait; returns its microbatches that are parked for it."""
        self.jobs.pause(job, True)
        mine = [p for p in reversed(self.in_work) if p.microbatch.job == job]
        return [self._park(progress) for progress in mine]

    def park(self) -> int:
        """Give up the pages and the progress of the newest microbatch in work; returns its id."""
        return self._park(self.in_work[-1])

    def plan(
        self, features: StepFeatures, allowance: Allowance, headroom: int
    ) -> FinetuneWork | None:
        """Finetuning to add to a step of `features` within `allowance`, or None.

        A microbatch starts only if `headroom` pages stay free. The work returned counts as
        dispatched.
        """
        backward = forward = None
        for progress in reversed(self.in_work):  # the oldest of each is looked at last
            if progress.forward_done:
                backward = progress
            else:
                forward = progress
        if forward is None and allowance.tokens and len(self.in_work) < self._most_in_work:
            forward = self._next(headroom)
        if forward is None and backward is None:
            return None
        choice = choose(features, forward, backward, allowance, self.config, self.latency)
        dispatched = self._forward(forward, choice.tokens) if forward and choice.tokens else None
        units = self._backward(backward or forward, choice.units) if choice.units else None
        if not dispatched and not units:
            return None
        return FinetuneWork(dispatched, units, choice.features)

    def _forward(self, progress: Progress, tokens: int) -> FinetuneForward:
        started = progress not in self.in_work
        if started:
            self._start(progress)
        start = progress.forwarded
        progress.forwarded += tokens
        return FinetuneForward(
            progress.microbatch, progress.pages, progress.first_token_slot, started, start, tokens
        )

    def _backward(self, progress: Progress | None, count: int) -> BackwardUnits:
        if progress is None:
            raise RuntimeError(f"{count} units are chosen, and no microbatch goes backward")
        units = range(progress.units_done, progress.units_done + count)
        progress.units_done += count
        if progress.done:
            self._release(progress)
            self.jobs.done(progress.microbatch)
        return BackwardUnits(progress.microbatch, units, progress.done)

    # ---- many steps at once, for the simulator ----

    def repeats(self, plan: StepPlan) -> int:
        """How many more steps can hold as many tokens and units as `plan`, and end neither part."""
        loss_units, count = plan.features.loss_units, 1 << 30
        for work, progress in self._worked_on(plan):
            if progress is None:
                return 0
            if isinstance(work, FinetuneForward):
                count = min(count, (progress.left_after(0) - 1) // work.length)
            else:
                # Units of one kind cost the same, nearly.
                end = progress.head_units if loss_units else progress.total_units
                left = end - progress.units_done if loss_units in (0, len(work.units)) else 0
                count = min(count, (left - 1) // len(work.units))
        return max(0, count)

    def repeat(self, plan: StepPlan, count: int) -> None:
        """Dispatch `count` times more what `plan` holds."""
        for work, progress in self._worked_on(plan):
            if progress is None:
                raise RuntimeError("a step is repeated whose microbatch is not in work")
            if isinstance(work, FinetuneForward):
                progress.forwarded += count * work.length
            else:
                progress.units_done += count * len(work.units)

    def _worked_on(
        self, plan: StepPlan
    ) -> list[tuple[FinetuneForward | BackwardUnits, Progress | None]]:
        """The finetuning of a plan, with the microbatch in work it belongs to."""
        found = []
        for work in (plan.forward, plan.backward):
            if work:
                own = (p for p in self.in_work if p.microbatch is work.microbatch)
                found.append((work, next(own, None)))
        return found

    # ---- starting and parking ----

    def _next(self, headroom: int) -> Progress | None:
        """The microbatch to start next, if there are pages and slots for it now."""
        microbatch = self.jobs.next(self._may_start_beside_others)
        if microbatch is None:
            return None
        progress = self._candidate
        if progress is None or progress.microbatch is not microbatch:
            progress = self._candidate = Progress(microbatch, self.config, self.latency)
        needed = sum(map(self.pool.pages_for, microbatch.lengths))
        if self.jobs.was_parked(microbatch) and headroom:
            # Inference must moreover leave half of what the microbatch does not need: the same
            # burst would otherwise park it again and again.
            headroom = max(headroom, (self.pool.num_pages - needed) // 2)
        if self.pool.num_free < needed + headroom or self._find_slots(progress) is None:
            return None
        return progress

    def _may_start_beside_others(self, microbatch: Microbatch) -> bool:
        return all(
            other.microbatch.job != microbatch.job
            or other.microbatch.weights_version == microbatch.weights_version
            for other in self.in_work
        )

    def _find_slots(self, progress: Progress) -> int | None:
        """The first of enough free finetuning slots, or None."""
        start = 0
        for other in sorted(self.in_work, key=lambda other: other.first_token_slot):
            if start + progress.slots_held <= other.first_token_slot:
                return start
            start = other.first_token_slot + other.slots_held
        return start if start + progress.slots_held <= self.config.finetune_slots else None

    def _start(self, progress: Progress) -> None:
        lengths = progress.microbatch.lengths
        progress.first_token_slot = self._find_slots(progress) or 0
        pages = iter(self.pool.allocate(sum(map(self.pool.pages_for, lengths))) or ())
        progress.pages = tuple(
            tuple(itertools.islice(pages, self.pool.pages_for(length))) for length in lengths
        )
        self._candidate = None
        self.pages_held += sum(map(len, progress.pages))
        self.in_work.append(progress)
        self.jobs.start(progress.microbatch)

    def _park(self, progress: Progress) -> int:
        self._release(progress)
        self.jobs.put_back(progress.microbatch)
        return progress.microbatch.microbatch_id

    def _release(self, progress: Progress) -> None:
        released = [page for pages in progress.pages for page in pages]
        self.pages_held -= len(released)
        self.pool.release(released)
        self.in_work.remove(progress)
