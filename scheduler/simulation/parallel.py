"""A fleet in several processes, with exactly the result of one.

Process r of n has the engines r, r + n, r + 2n, ... Nothing couples engines but arrivals, and an
arrival goes to the first of the least loaded engines: the best of each process's own best. So of
every arrival, in order, each process says which of its engines is the best, and once all have said
it, all know where the request goes.

A process does not wait for that at each arrival: they come so close that it has a few steps to take
in between, seldom as many as the others. It holds its best engine where it is, and goes on with the
rest: the arrival cannot go to any other of its engines. For the next arrival it holds the best of
those it does not hold yet, and so on, up to `_AHEAD` arrivals. When the first of them is decided,
the engine that was held for it catches up: at each later arrival the better one of it and the one
that is held there is held, and the other one goes on. Invariant: the engine held for an arrival is
the best of the process's, as they are at the arrival, but for those held for earlier ones.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from scheduler.request import Slo
from scheduler.simulation.engine import SimulatedEngine, rare_collections, request_of
from scheduler.simulation.fleet import Events
from scheduler.simulation.workload import Arrival

_AHEAD = 24  # undecided arrivals at most
# Until a process looks again at what others say: longer each time, as their cores may be taken.
_SHORTEST_NAP_S, _LONGEST_NAP_S = 5e-5, 1e-3
_WATCH = 1000  # arrivals, or naps, until it looks whether it is still wanted
# What is said of an arrival is one number, which is read whole or not at all: the arrival's tag,
# the load of the best engine, and its index; the smallest is the best.
_LOAD_BITS, _INDEX_BITS = 40, 22
_TAG_SHIFT = _LOAD_BITS + _INDEX_BITS
_NOBODY = (1 << _TAG_SHIFT) - 1  # no engine takes requests


class ProcessLost(RuntimeError):
    """A process of the simulation ended before it was done."""


@dataclass(frozen=True)
class Run:
    """What is sent through a fleet.

    arrivals   of each request the fields of `Arrival`: float64 [requests, 3]
    slo        the class of all
    serves     engines before this one take requests, others only finetune
    patience_s   seconds from the last arrival on that are waited for answers
    """

    arrivals: np.ndarray
    slo: Slo
    serves: int
    patience_s: float


def simulate_in_processes(
    engines: Sequence[SimulatedEngine],
    run: Run,
    processes: int,
    progress: Callable[[int], None] = lambda sent: None,
) -> tuple[list[SimulatedEngine], float]:
    """What `Fleet`, with `LeastLoaded`, makes of `run` with new engines: the engines afterwards,
    at the time of the last token, and that time.

    The observations of their latency models are left behind. ProcessLost if a process dies; an
    error in one is raised here.
    """
    if run.serves < 1:
        raise ValueError(f"none of {len(engines)} engines takes requests")
    context = multiprocessing.get_context("spawn")  # a fork beside other threads may hang
    said = context.RawArray("Q", 2 * processes)
    members: list[_Process] = []
    try:
        with _no_interrupts():
            for rank in range(processes):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(rank, said, theirs), daemon=True)
                process.start()
                theirs.close()
                members.append(_Process(f"process {rank + 1} of {processes}", process, ours))
        for rank, member in enumerate(members):
            member.tell((run, list(engines[rank::processes])))
        return _supervise(members, progress)
    finally:
        for member in members:
            member.process.kill()
        for member in members:
            member.process.join()


@dataclass
class _Process:
    name: str
    process: Any  # of the context
    pipe: Connection

    def tell(self, value: Any) -> None:
        try:
            self.pipe.send(value)
        except OSError:
            raise self._lost() from None

    def hear(self) -> tuple[str, Any]:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            raise self._lost() from None

    def _lost(self) -> ProcessLost:
        self.process.join(timeout=10)
        code = self.process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return ProcessLost(f"{self.name} {how} before the simulation was done")


@contextmanager
def _no_interrupts():
    """Processes started meanwhile never get Ctrl-C: it is for the one that started them."""
    resource_tracker.ensure_running()  # else the first start does, and lets them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _supervise(
    members: Sequence[_Process], progress: Callable[[int], None]
) -> tuple[list[SimulatedEngine], float]:
    by_pipe = {member.pipe: rank for rank, member in enumerate(members)}
    met: dict[int, float] = {}
    ended: dict[int, list[SimulatedEngine]] = {}
    latest = 0.0
    while len(ended) < len(members):
        for pipe in wait([m.pipe for rank, m in enumerate(members) if rank not in ended]):
            rank = by_pipe[pipe]  # type: ignore[index]
            kind, value = members[rank].hear()
            if kind == "error":
                raise value
            if kind == "sent":
                progress(value)
            elif kind == "met":
                met[rank] = value
            else:
                ended[rank] = value
        if len(met) == len(members):
            latest = max(met.values())
            met.clear()
            for member in members:
                member.tell(latest)
    count = sum(map(len, ended.values()))
    return [ended[i % len(members)][i // len(members)] for i in range(count)], latest


# ---- in each of the processes ----


def _serve(rank: int, said: Any, pipe: Connection) -> None:
    try:
        run, engines = pipe.recv()
        member = _Member(rank, said, pipe, run, engines)
        with rare_collections():
            try:
                member.send_all()
                member.finish()
            except Exception as error:
                pipe.send(("error", error))
                return
        for engine in engines:
            engine.scheduler.latency.keep(0)  # as much as all the rest, and of no use in a fleet
        pipe.send(("ended", engines))
    except (EOFError, OSError):
        return  # nobody is there any more


class _Member:
    """The engines of process `rank`. Engines have indices within it; `said` has two numbers of each
    process, of its last two arrivals."""

    def __init__(
        self,
        rank: int,
        said: Any,
        pipe: Connection,
        run: Run,
        engines: Sequence[SimulatedEngine],
    ) -> None:
        self._rank, self._said, self._pipe, self._run = rank, said, pipe, run
        self._engines = engines
        self._size = len(said) // 2
        self._others = [other for other in range(self._size) if other != rank]
        self._times: list[float] = run.arrivals[:, 0].tolist()
        self._serving = len(range(rank, run.serves, self._size))
        # What is said of each: the smallest is the best.
        self._words = [index * self._size + rank for index in range(len(engines))]
        self._free = np.full(len(engines), math.inf)  # unfinished requests, inf: cannot be held
        self._free[: self._serving] = 0.0
        self._events = Events()
        for index, engine in enumerate(engines):
            self._events.put(index, engine.next_event)
        self._held: deque[int] = deque()  # of each undecided arrival, -1: none
        self._decided = 0  # arrivals
        self._told = 0  # arrivals of which the best engine is said
        self._naps = 0  # since the last arrival was decided

    def send_all(self) -> None:
        """Let all requests arrive."""
        for number, at_s in enumerate(self._times):
            self._run_free(at_s)
            self._hold()
            self._decide()
            while len(self._held) > _AHEAD:
                self._nap()
            if number % _WATCH == 0:
                self._watch()
                if self._rank == 0:
                    self._pipe.send(("sent", number))
        while self._held:
            self._nap()

    def finish(self) -> None:
        """Go on until all requests are answered, or the patience is over, and then until the time
        of the last token."""
        busy = [engine for engine in self._engines if engine.unfinished]
        last, until = self._times[-1], -math.inf
        deadline = last + self._run.patience_s
        while busy:
            engine = busy[-1]
            if not engine.unfinished or engine.next_event == math.inf:  # done, or it never will be
                busy.pop()
                continue
            until = min(deadline, math.nextafter(self._events.soonest, math.inf))
            self._run_free(until)
            if until == deadline:
                break
        self._run_free(self._latest(until))
        ends = (t.last_token_at or 0.0 for engine in self._engines for t in engine.timings)
        self._run_free(self._latest(max(last, *ends, 0.0)))

    def _latest(self, value: float) -> float:
        """The largest of what all say."""
        self._pipe.send(("met", value))
        return self._pipe.recv()

    # ---- engines ----

    def _run_free(self, until: float) -> None:
        """Let all that is free do what it does before `until`."""
        events = self._events
        while (index := events.take(until)) is not None:
            self._pass_event(index)
            self._release(index)
            if self._held:
                self._decide()

    def _pass_event(self, index: int) -> None:
        engine = self._engines[index]
        engine.pass_event()
        self._count(index)

    def _count(self, index: int) -> None:
        load = self._engines[index].unfinished
        self._words[index] = load << _INDEX_BITS | index * self._size + self._rank

    def _release(self, index: int) -> None:
        """It may go on, and be held."""
        if index < self._serving:
            self._free[index] = self._words[index] >> _INDEX_BITS
        self._events.put(index, self._engines[index].next_event)

    # ---- arrivals ----

    def _hold(self) -> None:
        """Hold the best engine that is free for the arrival that comes now."""
        index = int(self._free.argmin())
        if self._free[index] == math.inf:
            index = -1
        else:
            self._free[index] = math.inf
            self._events.put(index, math.inf)
        self._held.append(index)

    def _decide(self) -> None:
        """Decide arrivals as far as all have said what there is to say."""
        while self._held:
            number, mine = self._decided, self._held[0]
            slot, tag = number % 2, 1 + number // 2 % 3
            best = word = self._words[mine] if mine >= 0 else _NOBODY
            if self._told == number:
                # Whoever says something of the next but one has read this: all have said the next.
                self._said[2 * self._rank + slot] = tag << _TAG_SHIFT | word
                self._told += 1
            for other in self._others:
                said = self._said[2 * other + slot]
                if said >> _TAG_SHIFT != tag:
                    return
                best = min(best, said & _NOBODY)
            self._decided += 1
            self._held.popleft()
            if mine >= 0:
                if best == word:
                    self._add(mine, number)
                self._catch_up(mine)

    def _add(self, index: int, number: int) -> None:
        at_s, prompt, output = self._run.arrivals[number].tolist()
        engine, arrival = self._engines[index], Arrival(at_s, int(prompt), int(output))
        engine.advance(at_s)
        engine.add(request_of(arrival, str(number), self._run.slo))
        self._count(index)

    def _catch_up(self, index: int) -> None:
        """Let an engine that was held for the arrival before all those that are undecided go on, or
        one in its place."""
        words, next_event = self._words, self._engines[index].next_event
        for place, other in enumerate(self._held):
            until = self._times[self._decided + place]
            while next_event < until:
                self._pass_event(index)
                next_event = self._engines[index].next_event
            if other < 0 or words[index] < words[other]:
                self._held[place] = index
                if other < 0:
                    return
                index, next_event = other, self._engines[other].next_event
        self._release(index)

    # ---- waiting ----

    def _nap(self) -> None:
        """Wait for the others a moment, if need be."""
        decided = self._decided
        self._decide()
        if self._decided > decided:
            self._naps = 0
            return
        time.sleep(min(_SHORTEST_NAP_S * 2 ** min(self._naps, 8), _LONGEST_NAP_S))
        self._naps += 1
        if self._naps % _WATCH == 0:
            self._watch()

    def _watch(self) -> None:
        """End with the process that started this one."""
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            raise SystemExit
