"""Engines on a virtual clock: the engine's own scheduler, and a latency model in place of a device.

What the simulation keeps of an engine: the order of a step's parts, that tokens are read when the
forward is done and units run on, that the host plans one step ahead, and that the scheduler learns
from the times it measures. Steps may take longer or shorter than the model says, at random from a
seed; nothing else is random, so a run can be repeated.

With `leaps`, steps that are all alike (`Scheduler.repeats`) are taken in one go, and the host does
not plan ahead, so a request that arrives is seen a step earlier than by the engine. That makes a
fleet for an hour affordable; tests hold both modes together.
"""

from __future__ import annotations

import gc
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scheduler.coserving import Scheduler
from scheduler.latency.model import LatencyModel, StepFeatures
from scheduler.request import Request, Slo, StepPlan
from scheduler.request import Sequence as RequestState
from scheduler.simulation.supply import Supply
from scheduler.simulation.workload import Arrival
from scheduler.slo import RequestTiming, summarize

_NO_TOKENS: tuple[int, ...] = (0,) * (1 << 17)  # prompts are lengths; nobody reads their tokens
_AHEAD = 2  # microbatches queued beside the one that goes backward


class PerfectModel(LatencyModel):
    """Knows the device, and how long the step being planned will take beside what is usual."""

    pace = 1.0  # and `unit_correction`, which scales units

    @property
    def margin(self) -> float:
        """No prediction is wrong."""
        return 1.0

    def forward_s(self, features: StepFeatures) -> float:
        """Seconds of the forward program."""
        return self.pace * super().forward_s(features)

    def observe(self, features: StepFeatures, seconds: float) -> None:
        """Nothing to learn."""


@dataclass
class _InFlight:
    """A dispatched step: when its tokens can be read and its units are done."""

    plan: StepPlan
    seconds: float
    tokens_at: float
    done_at: float


@dataclass
class _Leap:
    """Steps like `plan` that may follow it: the first begins at `start`, each takes `seconds`,
    `forward_s` of it until its tokens are read."""

    plan: StepPlan
    count: int
    start: float
    seconds: float
    forward_s: float


@dataclass
class SimulatedEngine:
    """An engine whose steps take what `device` says.

    scheduler   the engine's; its own latency model is what it believes of the device
    device      the truth
    supply      the job it finetunes, or None
    noise       standard deviation of the logarithm of a step's time
    host_s      seconds the host needs to plan a step
    leaps       see the module's text
    sample_s    how often progress is noted, or None
    """

    scheduler: Scheduler
    device: LatencyModel
    supply: Supply | None = None
    noise: float = 0.0
    host_s: float = 0.0
    seed: int = 0
    leaps: bool = False
    sample_s: float | None = 1.0
    now: float = 0.0  # when the host makes its next plan
    timings: list[RequestTiming] = field(default_factory=list)
    output_tokens: int = 0
    answered_tokens: int = 0  # output of the job's own requests, which is not counted above
    finetune_tokens: int = 0  # of microbatches that are done
    forwarded_tokens: int = 0  # of all microbatches
    steps: int = 0
    busy_s: float = 0.0
    preemptions: int = 0
    parked: int = 0
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = np.random.default_rng(self.seed)
        self._paces = iter(())
        self._pace = self._draw_pace()
        self._in_flight: deque[_InFlight] = deque()
        self._device_free = 0.0
        self._leap: _Leap | None = None
        self._waits = False  # nothing to do until something is added
        self._supplied = 0  # microbatches that are queued or in work
        self._answering = 0  # requests of the job
        if self.supply:
            self.scheduler.add_job(self.supply.job)

    @property
    def unfinished(self) -> int:
        """Requests that wait or run, but for those of the job."""
        return len(self.scheduler.inference.sequences) - self._answering

    @property
    def next_event(self) -> float:
        """Until when nothing happens but more of the same; inf with nothing to do."""
        if self._leap:
            return self._leap.start + (self._leap.count - 1) * self._leap.seconds
        return math.inf if self._waits else self.now

    def add(self, request: Request) -> None:
        """A request arrives at its arrival, up to which `advance` has been called."""
        self.scheduler.add(request)
        if self._waits:
            self._waits, self.now = False, max(self.now, request.arrival)

    def advance(self, until: float) -> None:
        """Take all steps that are planned before `until`, seconds."""
        self._land(until)
        while self.now < until and not self._waits:
            self._step()
            self._land(until)

    def pass_event(self) -> None:
        """Take the steps up to and with the next event."""
        self.advance(math.nextafter(self.next_event, math.inf))

    def finish(self, deadline: float = math.inf) -> None:
        """Go on until every request is answered, or until `deadline`."""
        while self.unfinished and self.now < deadline:
            self.advance(min(deadline, math.nextafter(max(self.now, self.next_event), math.inf)))

    # ---- one step ----

    def _step(self) -> None:
        """Plan and dispatch a step, then read the one before (with leaps: the same)."""
        scheduler, supply = self.scheduler, self.supply
        if supply:
            for request in supply.requests(scheduler, self.now):
                scheduler.add(request)
                self._answering += 1
            while self._supplied <= _AHEAD and (microbatch := supply.next()):
                scheduler.add(microbatch)
                self._supplied += 1
        if isinstance(scheduler.latency, PerfectModel):
            scheduler.latency.pace = scheduler.latency.unit_correction = self._pace
        plan = scheduler.plan(self.now)
        if plan:
            self._dispatch(plan, self._pace)
            self._pace = self._draw_pace()
        elif not self._in_flight:
            self._waits = True
            return
        self.now += self.host_s
        if not plan or self.leaps or len(self._in_flight) > 1:
            step = self._in_flight.popleft()
            self._complete(step)
            if self.leaps:
                self._plan_leap(step)

    def _dispatch(self, plan: StepPlan, pace: float) -> None:
        forward_s = self.device.forward_s(plan.features) * pace
        seconds = forward_s + self.device.unit_s(plan.features) * pace
        start = max(self._device_free, self.now + self.host_s)
        self._device_free = start + seconds
        self._in_flight.append(_InFlight(plan, seconds, start + forward_s, start + seconds))
        self.steps += 1
        self.busy_s += seconds
        self.preemptions += len(plan.preempted)
        self.parked += len(plan.parked)
        if plan.forward:
            self.forwarded_tokens += plan.forward.length
        if plan.backward and plan.backward.done:
            self._supplied -= 1

    def _complete(self, step: _InFlight) -> None:
        plan = step.plan
        samples = plan.decode.sequences + [c.sequence for c in plan.prefill if c.samples]
        # Without tokens to read, the engine waits for the units.
        self.now = max(self.now, step.tokens_at if samples else step.done_at)
        sampled = dict.fromkeys([sequence.request.request_id for sequence in samples], 0)
        self._count(samples)
        if plan.backward and plan.backward.done:
            self.finetune_tokens += plan.backward.microbatch.tokens
            if self.supply:
                self.supply.finished(plan.backward.microbatch)
        self._finish(self.scheduler.complete(plan, sampled, (), self.now, step.seconds))
        self._sample()

    def _count(self, sequences: Sequence[RequestState], times: int = 1) -> None:
        """Each has `times` tokens more."""
        answers = sum(sequence.request.job is not None for sequence in sequences)
        self.answered_tokens += times * answers
        self.output_tokens += times * (len(sequences) - answers)

    def _finish(self, sequences: Iterable[RequestState]) -> None:
        for sequence in sequences:
            if sequence.request.job is None:
                self.timings.append(_timing(sequence))
            elif self.supply:
                self._answering -= 1
                self.supply.answered(sequence)

    def _draw_pace(self) -> float:
        """How much longer than usual the next step takes."""
        if not self.noise:
            return 1.0
        for pace in self._paces:
            return pace
        mean = -(self.noise**2) / 2  # of the logarithm, so that the mean is 1
        self._paces = iter(self._random.lognormal(mean, self.noise, 1024).tolist())
        return next(self._paces)

    def _sample(self) -> None:
        if self.sample_s and (not self.samples or self.now >= self.samples[-1][0] + self.sample_s):
            self.samples.append((self.now, self.output_tokens, self.forwarded_tokens))

    # ---- many steps ----

    def _plan_leap(self, step: _InFlight) -> None:
        """See how many steps like the one just completed may follow."""
        count = self.scheduler.repeats(step.plan)
        if count < 2:
            return
        features = self.scheduler.repeated(step.plan, (count + 1) / 2)
        forward_s = self.device.forward_s(features)
        seconds = forward_s + self.device.unit_s(features)
        self._leap = _Leap(step.plan, count, max(self._device_free, self.now), seconds, forward_s)

    def _land(self, until: float) -> None:
        """Take the steps of the leap that are planned before `until`."""
        leap = self._leap
        if not leap or self.now >= until:
            return
        # The first is planned at `now`, step i when the tokens of step i - 1 are read.
        later = (until - leap.start - leap.forward_s) / leap.seconds
        count = min(leap.count, 1 + max(0, math.ceil(later)))
        plan, self._leap = leap.plan, None
        self._device_free = leap.start + count * leap.seconds
        reads = bool(plan.decode)
        self.now = self._device_free - (leap.seconds - leap.forward_s if reads else 0.0)
        if self.sample_s and self.samples:
            self.samples.append((leap.start, self.output_tokens, self.forwarded_tokens))
        self._finish(self.scheduler.repeat(plan, count, self.now))
        self.steps += count
        self.busy_s += count * leap.seconds
        self._count(plan.decode.sequences, count)
        if plan.forward:
            self.forwarded_tokens += count * plan.forward.length
        self._sample()


def request_of(arrival: Arrival, request_id: str, slo: Slo | None = None) -> Request:
    """A request of an arrival's lengths."""
    prompt = _NO_TOKENS[: arrival.prompt_tokens]
    return Request(request_id, prompt, arrival.output_tokens, arrival.arrival_s, slo=slo)


def _timing(sequence: RequestState, failed: bool = False) -> RequestTiming:
    return RequestTiming(
        sequence.request.arrival,
        len(sequence.request.prompt),
        len(sequence.output),
        sequence.first_token_at,
        sequence.last_token_at,
        failed=failed,
        slo=sequence.request.slo,
    )


def replay(
    engine: SimulatedEngine, arrivals: Iterable[Arrival], deadline_s: float = math.inf
) -> None:
    """Send arrivals through an engine, and go on until all are answered or time is up."""
    for index, arrival in enumerate(arrivals):
        engine.advance(arrival.arrival_s)
        engine.add(request_of(arrival, str(index)))
    engine.finish(deadline_s)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Look for cyclic garbage a hundred times less often: a simulation makes many objects and no
    cycles, and JAX, where it is imported, has something to do at each collection."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def report(engines: Sequence[SimulatedEngine], slo: Slo, wall_s: float) -> dict[str, Any]:
    """What the engine's report.json says of a run, of one simulated engine or of a fleet.

    `wall_s`: the span that finetuning throughput is counted over, seconds. Requests that are not
    finished count as failed.
    """
    timings = [timing for engine in engines for timing in engine.timings]
    for engine in engines:
        for sequence in engine.scheduler.inference.sequences.values():
            if sequence.request.job is None:
                timings.append(_timing(sequence, failed=True))
    tokens = sum(engine.finetune_tokens for engine in engines)
    answered = sum(engine.answered_tokens for engine in engines)
    alone = engines[0] if len(engines) == 1 else None
    return {
        "inference": summarize(timings, slo),
        "finetune": {
            "finetune": {
                "tokens": tokens,
                "tokens_per_s": tokens / wall_s,
                "sampled_tokens": answered,
                "sampled_tokens_per_s": answered / wall_s,
            }
        },
        "engine": {
            "device": "simulated",
            "engines": len(engines),
            "wall_s": wall_s,
            "steps": sum(engine.steps for engine in engines),
            "busy": sum(engine.busy_s for engine in engines) / wall_s / len(engines),
            "preemptions": sum(engine.preemptions for engine in engines),
            "parked_microbatches": sum(engine.parked for engine in engines),
            "latency_model": alone.scheduler.latency.errors() if alone else None,
        },
    }
