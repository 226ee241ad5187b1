"""Jobs share finetuning by weight and priority; pausing and cancelling work between steps."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.jobs import JobTable
from scheduler.latency.model import LatencyModel
from scheduler.request import Microbatch, Request

CONFIG = SchedulerConfig(
    max_sequences=4,
    max_tokens_per_step=16,
    max_model_len=64,
    token_buckets=(8, 16),
    num_pages=64,
    page_size=4,
    num_layers=2,
    unit_tokens=8,
    finetune_slots=64,
    idle_step_s=math.inf,
)


def serve(table: JobTable, lengths: dict[str, list[int]], tokens: int) -> Counter[str]:
    """Start and finish microbatches until `tokens` are handed out; every job always has more."""
    given_tokens: Counter[str] = Counter()
    index = 0
    while given_tokens.total() < tokens:
        for job, sizes in lengths.items():
            while table.queued(job) < 2:
                size = sizes[index % len(sizes)]
                table.push(Microbatch(index, (size,), job=job))
                index += 1
        chosen = table.next(lambda microbatch: True)
        assert chosen is not None
        table.start(chosen)
        table.done(chosen)
        given_tokens[chosen.job] += chosen.tokens
    return given_tokens


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.2, 5), min_size=2, max_size=4),
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=5),
)
def test_tokens_follow_the_weights_whatever_the_sizes(weights, sizes):
    table = JobTable()
    for index, weight in enumerate(weights):
        table.add(str(index), weight)
    lengths = {str(i): [s * (i + 1) for s in sizes] for i in range(len(weights))}
    given_tokens = serve(table, lengths, 40_000)
    # No job is ever ahead of another by more than a microbatch of each.
    shares = [given_tokens[str(i)] / weight for i, weight in enumerate(weights)]
    largest = max(max(lengths[str(i)]) / weight for i, weight in enumerate(weights))
    assert max(shares) - min(shares) <= 2 * largest + 1e-6


def test_a_higher_priority_goes_first_and_a_late_job_is_owed_nothing():
    table = JobTable()
    table.add("low")
    table.add("high", priority=1)
    assert serve(table, {"low": [10], "high": [10]}, 500)["low"] == 0
    table.pause("high", True)
    serve(table, {"low": [10]}, 1000)
    table.add("late")
    given_tokens = serve(table, {"low": [10], "late": [10]}, 1000)
    assert given_tokens["late"] == pytest.approx(500, abs=20)


def run(scheduler: Scheduler):
    plan = scheduler.plan(0.0)
    if plan:
        scheduler.complete(plan, {}, (), 0.0)
    return plan


def test_microbatches_of_a_batch_overlap_and_those_of_the_next_wait():
    config = replace(CONFIG, idle_step_s=0.035)
    scheduler = Scheduler(config, LatencyModel({8: 0.01, 16: 0.02}, {"layer_units": 0.01}))
    for index, version in enumerate((0, 0, 1)):
        scheduler.add(Microbatch(index, (20,), job="a", weights_version=version))
    plans = []
    while plan := run(scheduler):
        plans.append(plan)
    together = [
        (p.forward.microbatch.microbatch_id, p.backward.microbatch.microbatch_id)
        for p in plans
        if p.forward and p.backward and p.forward.microbatch is not p.backward.microbatch
    ]
    assert together and set(together) == {(1, 0)}


def test_another_jobs_microbatch_may_overlap_at_any_time():
    scheduler = Scheduler(CONFIG, LatencyModel({}))
    scheduler.add(Microbatch(0, (16,), job="a", weights_version=0))
    scheduler.add(Microbatch(1, (16,), job="a", weights_version=1))
    scheduler.add(Microbatch(2, (16,), job="b", weights_version=7))
    first, second = run(scheduler), run(scheduler)
    assert first.forward.microbatch.microbatch_id == 0 and first.backward.done
    assert second.forward.microbatch.microbatch_id == 2


def test_pausing_parks_and_resuming_starts_again():
    config = replace(CONFIG, idle_step_s=1e-9)
    scheduler = Scheduler(config, LatencyModel({8: 1.0, 16: 1.0}, {"layer_units": 1.0}))
    scheduler.add(Microbatch(0, (20,), job="a"))
    scheduler.add(Microbatch(1, (20,), job="b"))
    assert run(scheduler).forward.microbatch.job == "a"
    scheduler.pause_job("a")
    plan = run(scheduler)
    assert plan.parked == (0,) and plan.forward.microbatch.job == "b"
    scheduler.pause_job("b")
    assert run(scheduler) is None and scheduler.pool_usage == 0 and scheduler.has_work
    scheduler.resume_job("a")
    plan = run(scheduler)
    assert plan.forward.started and plan.forward.start == 0 and plan.parked == (1,)


def test_removing_a_job_frees_what_it_holds():
    scheduler = Scheduler(CONFIG, LatencyModel({}, {"layer_units": 1.0}))
    for index in range(3):
        scheduler.add(Microbatch(index, (40,), job="a"))
    scheduler.plan(0.0)
    assert scheduler.microbatches_of("a") == 3 and scheduler.pool_usage > 0
    scheduler.remove_job("a")
    assert scheduler.microbatches_of("a") == 0 and scheduler.pool_usage == 0
    assert not scheduler.has_work


def test_a_weight_must_be_a_positive_number():
    with pytest.raises(ValueError, match=r"job 'a': weight=0 must be a number above 0"):
        JobTable().add("a", weight=0)


def shares_beside_answers(scheduler: Scheduler, weights: dict[str, float], steps: int):
    """Tokens of each job in so many steps: `learner` has four answers of 12 tokens going at any
    time but while it trains on them, `rows` has microbatches at any time."""
    for job, weight in weights.items():
        scheduler.add_job(job, weight)
    had: Counter[str] = Counter()
    ids = itertools.count()
    running, training = 0, 0
    for _ in range(steps):
        while "rows" in weights and scheduler.microbatches_of("rows") < 2:
            scheduler.add(Microbatch(next(ids), (16,), job="rows"))
        if not running and not training:
            for _ in range(4):
                scheduler.add(Request(str(next(ids)), (0,) * 4, 12, 0.0, job="learner"))
            running = 4
        plan = scheduler.plan(0.0)
        assert plan is not None, "there is always something to do"
        had["learner"] += sum(s.request.job == "learner" for s in plan.decode.sequences)
        had["learner"] += sum(chunk.length + chunk.samples for chunk in plan.prefill)
        if plan.forward:
            had[plan.forward.microbatch.job] += plan.forward.length
        if plan.backward and plan.backward.done and plan.backward.microbatch.job == "learner":
            training -= 1
        sampling = [c.sequence for c in plan.prefill if c.samples] + list(plan.decode.sequences)
        done = scheduler.complete(plan, {s.request_id: 1 for s in sampling}, (), 0.0)
        running -= len(done)
        if done and not running:
            training = 4
            for _ in range(training):
                scheduler.add(Microbatch(next(ids), (16,), job="learner"))
    return had


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_answers_count_in_the_share_of_their_job(weight):
    scheduler = Scheduler(CONFIG, LatencyModel({}))
    had = shares_beside_answers(scheduler, {"learner": 1.0, "rows": weight}, 4000)
    assert had["rows"] / had["learner"] == pytest.approx(weight, rel=0.05)


def test_no_microbatch_starts_in_another_jobs_turn_to_answer():
    """Until it is another turn, or the answers are given up."""
    scheduler = Scheduler(CONFIG, LatencyModel({}))
    scheduler.add_job("learner")
    scheduler.add_job("other")
    scheduler.add(Request("answer", (0,) * 4, 9, 0.0, job="learner"))
    first = scheduler.plan(0.0)
    assert first is not None and first.forward is None
    scheduler.complete(first, {"answer": 1}, (), 0.0)
    scheduler.add(Microbatch(0, (8,), job="other"))
    started = scheduler.plan(0.0)
    assert started is not None and started.forward and started.forward.microbatch.job == "other"
    scheduler.complete(started, {"answer": 1}, (), 0.0)
    scheduler.add(Microbatch(1, (8,), job="other"))
    waits = scheduler.plan(0.0)
    assert waits is not None and waits.forward is None and waits.decode
    scheduler.complete(waits, {"answer": 1}, (), 0.0)
    scheduler.cancel("answer")
    goes = scheduler.plan(0.0)
    assert goes is not None and goes.forward and goes.forward.microbatch.microbatch_id == 1


def test_a_job_that_pauses_for_breath_keeps_its_share():
    """`waits` has no work after every four microbatches until 150 tokens of the other are through;
    what it is owed beyond the credit is forgotten."""

    def served(credit: int) -> Counter[str]:
        table, had, index, rests_until = JobTable(credit), Counter[str](), itertools.count(), 0
        while had.total() < 20_000:
            while table.queued("busy") < 2:
                table.push(Microbatch(next(index), (50,), job="busy"))
            if not table.queued("waits") and had["busy"] >= rests_until:
                for _ in range(4):
                    table.push(Microbatch(next(index), (50,), job="waits"))
            chosen = table.next(lambda microbatch: True)
            assert chosen is not None
            table.start(chosen)
            table.done(chosen)
            had[chosen.job] += chosen.tokens
            if chosen.job == "waits" and not table.queued("waits"):
                rests_until = had["busy"] + 150
        return had

    strict, lenient = served(0), served(200)
    assert strict["busy"] > 1.4 * strict["waits"]
    assert lenient["busy"] == pytest.approx(lenient["waits"], rel=0.05)
