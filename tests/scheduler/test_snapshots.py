"""Prefixes of models with recurrent layers are shared where a snapshot of the state was taken."""

from __future__ import annotations

import math
import statistics
import time

import pytest

from scheduler.cache.snapshots import Snapshots
from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.latency.model import LatencyModel
from scheduler.request import Microbatch, Slo, StepPlan
from tests.scheduler.simulated_device import SimulatedEngine, request

ROWS = 4
FIRST = ROWS  # the first slot of a snapshot


def make(snapshots: int = 4, every: int = 16, **changes) -> SimulatedEngine:
    config = SchedulerConfig(
        **{
            "max_sequences": ROWS,
            "max_tokens_per_step": 64,
            "max_model_len": 256,
            "token_buckets": (8, 64),
            "num_pages": 128,
            "page_size": 4,
            "idle_step_s": math.inf,
            "state_snapshots": snapshots,
            "snapshot_every": every,
        }
        | changes
    )
    return SimulatedEngine(Scheduler(config, LatencyModel({})), keep_plans=True)


def serve(engine: SimulatedEngine, *requests) -> list[StepPlan]:
    """Serve requests to their end, one after the other; their plans."""
    engine.plans.clear()
    for one in requests:
        engine.scheduler.add(one)
        engine.drain(limit=200)
    return list(engine.plans)


def chunks(plans: list[StepPlan]) -> list[tuple[int, int]]:
    """The first position and the end of every chunk of prefill."""
    return [(c.start, c.start + c.length) for plan in plans for c in plan.prefill]


def copies(plans: list[StepPlan]) -> list[tuple[int, int]]:
    return [copy for plan in plans for copy in plan.state_copies]


# ---- where snapshots are taken ----


def test_chunks_end_at_multiples_and_at_the_last_page_of_the_prompt():
    engine = make()
    plans = serve(engine, request("a", 42, max_tokens=2))
    assert chunks(plans) == [(0, 16), (16, 32), (32, 40), (40, 42)]
    assert copies(plans) == [(0, FIRST), (0, FIRST + 1), (0, FIRST + 2)]
    assert plans[0].state_copies == ()  # a state is kept before the step that overwrites it


def test_a_step_that_has_no_room_up_to_there_ends_anywhere():
    engine = make(max_tokens_per_step=8, token_buckets=(8,))
    plans = serve(engine, request("a", 18, max_tokens=2))
    assert chunks(plans) == [(0, 8), (8, 16), (16, 18)]


def test_what_a_chunk_leaves_of_its_step_is_for_finetuning():
    engine = make()
    engine.scheduler.add(Microbatch(0, (64,)))
    engine.scheduler.add(request("a", 20, max_tokens=2))
    engine.step()
    (plan,) = engine.plans
    assert chunks([plan]) == [(0, 16)] and plan.forward and plan.forward.length == 48


def test_the_same_prompt_is_computed_from_its_last_page_on():
    engine = make()
    serve(engine, request("a", 40, max_tokens=2))
    plans = serve(engine, request("b", 40, max_tokens=2))
    assert chunks(plans) == [(36, 40)]
    assert copies(plans) == [(FIRST + 2, 0)]
    snapshots = engine.scheduler.pool.snapshots
    assert snapshots is not None
    assert (snapshots.saved, snapshots.hits, snapshots.used) == (3, 1, 3)


def test_where_prompts_part_is_found_by_the_second_and_shared_by_the_third():
    engine = make(every=64)
    system = tuple(range(24))
    question = [request(name, system + (100 + i,) * 9, 2) for i, name in enumerate("abc")]
    assert chunks(serve(engine, question[0])) == [(0, 32), (32, 33)]
    assert chunks(serve(engine, question[1])) == [(0, 24), (24, 32), (32, 33)]
    assert chunks(serve(engine, question[2])) == [(24, 32), (32, 33)]


def test_the_end_of_an_output_is_no_place_where_prompts_part():
    engine = make(every=64)
    first = request("turn 1", 8, max_tokens=13)
    serve(engine, first)
    known = (*first.prompt, *engine.finished["turn 1"].output)
    plans = serve(engine, request("turn 2", (*known, *[9] * 10), max_tokens=2))
    assert chunks(plans) == [(4, 28), (28, 31)]


def test_a_long_output_is_kept_at_multiples_too():
    engine = make()
    first = request("turn 1", 8, max_tokens=40)
    serve(engine, first)
    known = first.prompt + tuple(engine.finished["turn 1"].output)
    plans = serve(engine, request("turn 2", (*known, 9, 9), max_tokens=2))
    assert chunks(plans)[0][0] == 32


def test_snapshots_are_no_closer_than_is_worth_it():
    far = Snapshots(range(4), every=1024, page_size=16)
    assert far.stops(0, 688, 2500) == [688, 1024, 2048, 2496]
    assert far.stops(0, 0, 2048) == [1024, 2032]
    assert far.stops(0, 48, 80) == [64]  # 48 tokens are soon computed again
    assert far.stops(0, 0, 64) == []
    assert far.stops(1024, 1056, 1100) == [1088]


def test_what_nobody_can_share_is_not_kept():
    engine = make()
    plans = serve(engine, request("a", 40, max_tokens=2, reusable=False))
    assert chunks(plans) == [(0, 40)] and not copies(plans)


def test_salts_keep_snapshots_apart():
    engine = make()
    serve(engine, request("a", 40, cache_salt=("adapter", 1)))
    plans = serve(engine, request("b", 40, cache_salt=("adapter", 2)))
    assert chunks(plans)[0] == (0, 16)


# ---- slots ----


def test_without_slots_everything_is_as_for_other_models():
    engine = make(snapshots=0)
    serve(engine, request("a", 42, max_tokens=2))
    plans = serve(engine, request("b", 42, max_tokens=2))
    assert chunks(plans) == [(40, 42)] and not copies(plans)


def test_a_long_prompt_drives_out_no_more_than_one_end():
    engine = make(snapshots=3, every=16)
    ends = [request(str(i), (i,) * 14, max_tokens=1) for i in range(3)]
    serve(engine, *ends)
    serve(engine, request("long", 120, max_tokens=1))
    snapshots = engine.scheduler.pool.snapshots
    assert snapshots is not None and snapshots.used == 3
    assert snapshots.evicted == 1 and snapshots.saved == 4
    again = [request(f"again {i}", (i,) * 14, max_tokens=1) for i in (1, 2)]
    assert chunks(serve(engine, *again)) == [(12, 14)] * 2


def test_what_was_read_outlives_what_was_not():
    engine = make(snapshots=2, every=64)
    prompts = [(i,) * 14 for i in range(3)]
    serve(engine, request("a", prompts[0], 1), request("b", prompts[1], 1))
    serve(engine, request("a again", prompts[0], 1), request("c", prompts[2], 1))
    assert chunks(serve(engine, request("a once more", prompts[0], 1))) == [(12, 14)]
    assert chunks(serve(engine, request("b again", prompts[1], 1)))[0][0] == 0


def test_a_snapshot_goes_with_its_page():
    engine = make(num_pages=16)
    serve(engine, request("a", 40, max_tokens=1))
    snapshots = engine.scheduler.pool.snapshots
    assert snapshots is not None and snapshots.used == 3
    pages = engine.scheduler.pool.allocate(16)
    assert pages and snapshots.used == 0 and snapshots.evicted == 3
    engine.scheduler.pool.release(pages)
    serve(engine, request("b", (5,) * 40, max_tokens=1))
    assert snapshots.used == 3


# ---- preemption ----


def test_a_preempted_sequence_goes_on_from_its_last_snapshot():
    engine = make(num_pages=24, snapshots=16, every=8, max_sequences=2)
    for name, prompt in (("old", (1,) * 30), ("new", (2,) * 30)):
        engine.scheduler.add(request(name, prompt, max_tokens=40))
    engine.drain(limit=400)
    resumed = engine.finished["new"]
    assert resumed.preemptions and resumed.cached_tokens >= 24
    alone = make(every=8)
    serve(alone, request("new", (2,) * 30, max_tokens=40))
    assert alone.finished["new"].output == resumed.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_snapshots": -1}, "state_snapshots=-1 must be at least 0"),
        ({"snapshot_every": 18}, "snapshot_every=18 must be a multiple of page_size=4"),
    ],
)
def test_a_contradictory_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


# ---- time on the host ----


def test_planning_256_sequences_that_come_to_a_multiple_together_is_fast(capsys):
    """The worst step: all decode across a multiple at once, and slots must be freed for them."""
    config = SchedulerConfig(
        max_sequences=256,
        max_tokens_per_step=2048,
        max_model_len=8192,
        token_buckets=(256, 2048),
        num_pages=50_000,
        slo=Slo(0.05, 5.0),
        state_snapshots=64,
        snapshot_every=16,
    )
    scheduler = Scheduler(config, LatencyModel({256: 0.01, 2048: 0.05}))
    for index in range(256):
        scheduler.add(request(str(index), (index, *range(15)), 1000))
    seconds, most, now = [], 0, 0.0
    while len(seconds) < 64:
        start = time.thread_time()
        plan = scheduler.plan(now)
        elapsed = time.thread_time() - start
        assert plan is not None
        if len(plan.decode) == 256:
            seconds.append(elapsed)
            most = max(most, len(plan.state_copies))
        now += 0.02
        samples = (*plan.decode, *plan.prefill)
        sampled = {c.sequence.request_id: 7 for c in samples if c.samples}
        scheduler.complete(plan, sampled, (), now)
    assert most == 8  # of 256 that come to a multiple together
    median, worst = statistics.median(seconds), max(seconds)
    with capsys.disabled():
        print(f"\nplan() with snapshots: {worst * 1e3:.2f} ms, without {median * 1e3:.2f} ms")
    assert worst < 10e-3
