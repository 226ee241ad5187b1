"""Fleets: routers, replicas that come and go, and clusters that are separate."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from scheduler.request import Request
from scheduler.simulation.engine import request_of
from scheduler.simulation.fleet import (
    AdapterAffinity,
    Fleet,
    LeastLoaded,
    ReplicaChange,
    RoundRobin,
)
from scheduler.simulation.workload import Lengths, make_arrivals
from tests.scheduler.test_simulator import make


def arrivals(rate, duration_s=20.0):
    return make_arrivals(
        "poisson", rate, duration_s, 2, 1.0, Lengths(200, 0.5, 900), Lengths(80, 0.5, 300)
    )


def engines(leaps=True, **fields):
    return lambda index: make(leaps=leaps, seed=index, sample_s=None, **fields)


def send(fleet, sent):
    chosen = [fleet.submit(request_of(a, str(i))) for i, a in enumerate(sent)]
    fleet.finish()
    return chosen


def answered(fleet):
    return sorted(t.arrival for engine in fleet.engines for t in engine.timings)


@pytest.mark.parametrize("router", [RoundRobin, LeastLoaded, AdapterAffinity])
def test_every_request_is_answered_once_by_some_engine(router):
    fleet, sent = Fleet(engines(), 4, router()), arrivals(12.0)
    chosen = send(fleet, sent)
    assert answered(fleet) == [a.arrival_s for a in sent]
    counts = Counter(chosen)
    assert len(counts) == 4 and max(counts.values()) < 2 * min(counts.values())


def test_round_robin_takes_turns_and_least_loaded_avoids_the_busy():
    assert send(Fleet(engines(), 3, RoundRobin()), arrivals(3.0))[:6] == [0, 1, 2, 0, 1, 2]
    fleet = Fleet(engines(), 2, LeastLoaded())
    fleet.submit(Request("long", (0,) * 10, 2000, 0.0))
    later = [fleet.submit(Request(str(i), (0,) * 10, 2, 5.0 + 5 * i)) for i in range(4)]
    assert later == [1, 1, 1, 1]


def test_adapters_stay_together_with_bounded_load():
    router, load = AdapterAffinity(bound=1.25), np.zeros(8)
    rng = np.random.default_rng(0)
    homes = defaultdict(Counter)
    for _ in range(4000):
        adapter = f"adapter-{min(int(rng.zipf(1.5)), 50)}"
        index = router.choose(Request("r", (0,), 1, 0.0, cache_salt=adapter), load)
        assert load[index] < 1.25 * (load.sum() + 1) / 8 + 1
        homes[adapter][index] += 1
        load[index] += 1
        if load.sum() > 200:
            load[rng.choice(8, p=load / load.sum())] -= 1
    # A rare adapter fits on its first engine nearly always; a random router would use all eight.
    rare = [c for c in homes.values() if 10 <= c.total() < 100]
    assert rare and np.mean([max(c.values()) / c.total() for c in rare]) > 0.4


def test_replicas_come_after_their_start_and_go_without_losing_anything():
    changes = [ReplicaChange(2.0, 2), ReplicaChange(12.0, -2)]
    fleet = Fleet(engines(), 1, LeastLoaded(), changes=changes, startup_s=3.0)
    sent = arrivals(8.0)
    chosen = send(fleet, sent)
    assert answered(fleet) == [a.arrival_s for a in sent]
    used = [
        {c for a, c in zip(sent, chosen, strict=True) if low <= a.arrival_s < high}
        for low, high in ((0, 5), (5.5, 12), (12, 99))
    ]
    assert used == [{0}, {0, 1, 2}, {0}]
    assert set(fleet.stopped) == {1, 2} and min(fleet.stopped.values()) >= 12.0


def test_a_fleet_repeats():
    first, second = (Fleet(engines(), 3, LeastLoaded()) for _ in range(2))
    assert send(first, arrivals(6.0)) == send(second, arrivals(6.0))
    assert [e.now for e in first.engines] == [e.now for e in second.engines]


def test_separate_clusters_finetune_in_proportion():
    def made(index):
        policy = "inference_only" if index < 2 else "finetuning_only"
        return make(policy, leaps=True, finetune=index >= 2, seed=index)

    fleet = Fleet(made, 4, LeastLoaded(), serves=lambda index: index < 2)
    chosen = send(fleet, arrivals(4.0))
    assert set(chosen) == {0, 1}
    fleet.advance(30.0)
    tokens = [engine.forwarded_tokens for engine in fleet.engines]
    assert tokens[:2] == [0, 0] and tokens[2] == pytest.approx(tokens[3], rel=0.05)


def test_a_fleet_must_serve():
    with pytest.raises(ValueError, match="none of 2 engines takes requests"):
        Fleet(engines(), 2, RoundRobin(), serves=lambda index: False)
    with pytest.raises(ValueError, match=r"replicas at 1.0 s: the last engine that serves"):
        Fleet(engines(), 1, RoundRobin(), changes=[ReplicaChange(1.0, -1)]).advance(5.0)
