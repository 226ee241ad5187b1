"""Many simulated engines behind a router, on one virtual clock.

Engines do not know of each other; only arrivals couple them. So each runs on its own until the next
arrival could concern it, and the clock is a heap of the engines' next events. Replicas may come,
after a start-up time, and go: one that goes gets no more requests, hands those that wait to others,
and stops when its running ones are answered.
"""

from __future__ import annotations

import heapq
import math
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from scheduler.request import Request
from scheduler.simulation.engine import SimulatedEngine


class Router(Protocol):
    """Chooses an engine for a request."""

    def choose(self, request: Request, load: np.ndarray) -> int:
        """The index of an engine. load: unfinished requests of each, inf where none may go."""
        ...


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, request: Request, load: np.ndarray) -> int:
        """The next engine that is open."""
        for _ in range(len(load)):
            self._last = (self._last + 1) % len(load)
            if load[self._last] < math.inf:
                break
        return self._last


class LeastLoaded:
    """The engine with the fewest unfinished requests."""

    def choose(self, request: Request, load: np.ndarray) -> int:
        """The first of the least loaded."""
        return int(load.argmin())


class AdapterAffinity:
    """Requests for one adapter go to the same engines, so that few engines hold each adapter.

    Consistent hashing with bounded loads (Mirrokni et al., SODA'18): an adapter's engine is the
    first on a ring, from the adapter's hash on, that has at most `bound` times the mean load.
    Requests without an adapter go to the least loaded.
    """

    def __init__(self, bound: float = 1.25, points: int = 40) -> None:
        self._bound, self._points = bound, points
        self._ring: list[tuple[int, int]] = []
        self._size = 0

    def choose(self, request: Request, load: np.ndarray) -> int:
        """See the class."""
        if request.cache_salt is None:
            return int(load.argmin())
        if len(load) != self._size:
            self._size = len(load)
            points = ((i, p) for i in range(self._size) for p in range(self._points))
            self._ring = sorted((_hash(f"engine {i} point {p}"), i) for i, p in points)
        is_open = load < math.inf
        limit = math.ceil(self._bound * (load[is_open].sum() + 1) / is_open.sum())
        start = bisect_left(self._ring, (_hash(str(request.cache_salt)), 0))
        for step in range(len(self._ring)):
            engine = self._ring[(start + step) % len(self._ring)][1]
            if load[engine] < limit:
                return engine
        return int(load.argmin())


ROUTERS: dict[str, Callable[[], Router]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "adapter_affinity": AdapterAffinity,
}


def _hash(text: str) -> int:
    return zlib.crc32(text.encode())


@dataclass(frozen=True)
class ReplicaChange:
    """At `at_s` seconds `change` engines are started (above 0) or told to go (below 0)."""

    at_s: float
    change: int


class Events:
    """The next event of each engine, soonest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []  # those not in `_of` are void
        self._of: dict[int, float] = {}

    @property
    def soonest(self) -> float:
        """When the next one is; inf for none."""
        heap, of = self._heap, self._of
        while heap and of.get(heap[0][1]) != heap[0][0]:
            heapq.heappop(heap)
        return heap[0][0] if heap else math.inf

    def put(self, index: int, at_s: float) -> None:
        """An engine's next event is at `at_s`; inf: it has none."""
        if at_s == math.inf:
            self._of.pop(index, None)
        elif self._of.get(index) != at_s:
            self._of[index] = at_s
            heapq.heappush(self._heap, (at_s, index))

    def take(self, until: float) -> int | None:
        """The engine whose event is the next one before `until`; it has none until it is put."""
        heap, of = self._heap, self._of
        while heap and heap[0][0] < until:
            at_s, index = heapq.heappop(heap)
            if of.get(index) == at_s:
                del of[index]
                return index
        return None


class Fleet:
    """`engines` engines made by `make_engine(index)`, and what the schedule adds.

    serves(index)   whether an engine takes requests; others only finetune
    startup_s       from the start of a replica until it takes requests
    """

    def __init__(
        self,
        make_engine: Callable[[int], SimulatedEngine],
        engines: int,
        router: Router,
        *,
        serves: Callable[[int], bool] = lambda index: True,
        changes: Iterable[ReplicaChange] = (),
        startup_s: float = 60.0,
    ) -> None:
        self.engines: list[SimulatedEngine] = []
        self.router = router
        self._make_engine, self._serves, self._startup_s = make_engine, serves, startup_s
        self._load = np.zeros(0)
        self._events = Events()
        self._draining: set[int] = set()
        self.stopped: dict[int, float] = {}  # engine -> when it was gone
        # (time, order, what to do then)
        self._changes = [(c.at_s, i, c.change) for i, c in enumerate(changes)]
        heapq.heapify(self._changes)
        for _ in range(engines):
            self._open(self._start(0.0))
        if not (self._load < math.inf).any():
            raise ValueError(f"none of {engines} engines takes requests")

    @property
    def finished(self) -> bool:
        """Whether every request that arrived is answered."""
        return not any(engine.unfinished for engine in self.engines)

    def submit(self, request: Request) -> int:
        """A request arrives, no earlier than the one before; returns the engine it goes to."""
        now = request.arrival
        self.advance(now)
        index = self.router.choose(request, self._load)
        engine = self.engines[index]
        engine.advance(now)
        engine.add(request)
        self._load[index] = engine.unfinished
        self._schedule(index)
        return index

    def advance(self, until: float) -> None:
        """Let everything happen that does before `until`, seconds."""
        while self._changes and self._changes[0][0] < until:
            at_s, order, change = heapq.heappop(self._changes)
            self._run(at_s)
            self._change(at_s, order, change)
        self._run(until)

    def finish(self, deadline: float = math.inf) -> None:
        """Go on until every request is answered, or until `deadline`."""
        busy = [engine for engine in self.engines if engine.unfinished]
        while busy:
            engine = busy[-1]
            if not engine.unfinished or engine.next_event == math.inf:  # done, or it never will be
                busy.pop()
                continue
            now = self._events.soonest
            if now >= deadline:
                return
            self.advance(min(deadline, math.nextafter(now, math.inf)))

    def _schedule(self, index: int) -> None:
        """Note when the engine will have done something that concerns others."""
        self._events.put(index, self.engines[index].next_event)

    def _run(self, until: float) -> None:
        events, engines = self._events, self.engines
        while (index := events.take(until)) is not None:
            engine = engines[index]
            engine.pass_event()
            unfinished = engine.unfinished
            if self._load[index] < math.inf:
                self._load[index] = unfinished
            if not unfinished and index in self._draining:
                self.stopped[index] = engine.now
            else:
                self._schedule(index)

    # ---- replicas ----

    def _change(self, at_s: float, order: int, change: int) -> None:
        if change == 0:  # an engine has started up: `order` is its index
            self._open(-order)
        for _ in range(change):
            index = self._start(at_s + self._startup_s)
            heapq.heappush(self._changes, (at_s + self._startup_s, -index, 0))
        for _ in range(-change):
            self._drain(at_s)

    def _start(self, at_s: float) -> int:
        engine = self._make_engine(len(self.engines))
        engine.now = at_s
        self.engines.append(engine)
        index = len(self.engines) - 1
        self._load = np.append(self._load, math.inf)
        self._schedule(index)
        return index

    def _open(self, index: int) -> None:
        if self._serves(index):
            self._load[index] = 0

    def _drain(self, at_s: float) -> None:
        """Tell the youngest open engine to go; the last one stays."""
        is_open = np.flatnonzero(self._load < math.inf)
        if len(is_open) < 2:
            raise ValueError(f"replicas at {at_s} s: the last engine that serves cannot go")
        index = int(is_open[-1])
        self._load[index] = math.inf
        self._draining.add(index)
        engine = self.engines[index]
        engine.advance(at_s)
        for sequence in list(engine.scheduler.inference.waiting):
            if not sequence.output:
                engine.scheduler.cancel(sequence.request_id)
                target = self.router.choose(sequence.request, self._load)
                self.engines[target].advance(at_s)
                self.engines[target].add(sequence.request)
                self._load[target] = self.engines[target].unfinished
                self._schedule(target)
        self._schedule(index)
