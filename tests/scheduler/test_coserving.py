"""What the scheduler decides, case by case; the properties hold it to the rest."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import replace

import pytest

from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.latency.model import LatencyModel, Sampling
from scheduler.request import Microbatch, Slo, StepPlan
from tests.scheduler.simulated_device import request

CONFIG = SchedulerConfig(
    max_sequences=4,
    max_tokens_per_step=16,
    max_model_len=64,
    token_buckets=(4, 8, 16),
    num_pages=32,
    page_size=4,
    num_layers=2,
    unit_tokens=8,
    max_finetune_segments=4,
    idle_step_s=math.inf,
)
FREE = LatencyModel({})


def make(latency: LatencyModel = FREE, **changes) -> Scheduler:
    return Scheduler(replace(CONFIG, **changes), latency)


def planned(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    plan = scheduler.plan(now)
    assert plan is not None
    return plan


def tokens(plan: StepPlan) -> dict[str, int]:
    """Some token for every sample of `plan`."""
    chunks = (*plan.decode, *plan.prefill)
    return {chunk.sequence.request_id: 7 for chunk in chunks if chunk.samples}


def run(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    """Plan and complete a step at once."""
    plan = planned(scheduler, now)
    scheduler.complete(plan, tokens(plan), (), now)
    return plan


def shape(chunks) -> list[tuple[str, int, int, bool]]:
    return [(c.sequence.request_id, c.start, c.length, c.samples) for c in chunks]


def started(plan: StepPlan) -> bool:
    return bool(plan.forward and plan.forward.started)


def units(plan: StepPlan) -> range:
    return plan.backward.units if plan.backward else range(0)


def finetunes(plan: StepPlan) -> bool:
    return bool(plan.forward or plan.backward)


# ---- order and chunks ----


def test_decode_then_prefill_by_arrival_in_chunks():
    scheduler = make()
    scheduler.add(request("first", 3))
    run(scheduler)
    scheduler.add(request("late", (1,) * 9, arrival=2.0))
    scheduler.add(request("early", (2,) * 10, arrival=1.0))
    plan = run(scheduler)
    assert shape(plan.decode) == [("first", 3, 1, True)]
    assert shape(plan.prefill) == [("early", 0, 10, True), ("late", 0, 5, False)]
    assert plan.token_bucket == plan.num_tokens == 16
    plan = run(scheduler)
    assert shape(plan.decode) == [("first", 4, 1, True), ("early", 10, 1, True)]
    assert shape(plan.prefill) == [("late", 5, 4, True)]
    assert plan.token_bucket == 8 and plan.num_tokens == 6


def test_plans_run_ahead_of_their_results_and_stop_at_max_tokens():
    scheduler = make()
    scheduler.add(request("r", 5, max_tokens=2))
    first, second = planned(scheduler), planned(scheduler)
    assert shape(first.prefill) == [("r", 0, 5, True)]
    assert shape(second.decode) == [("r", 5, 1, True)]
    sequence = first.prefill[0].sequence
    assert (sequence.in_flight, sequence.computed, sequence.num_tokens) == (2, 6, 7)
    assert scheduler.plan(0.0) is None and scheduler.has_work
    assert scheduler.complete(first, {"r": 8}, (), 1.0) == []
    assert scheduler.complete(second, {"r": 9}, (), 2.0) == [sequence]
    assert (sequence.output, sequence.finish_reason) == ([8, 9], "length")
    assert (sequence.first_token_at, sequence.last_token_at) == (1.0, 2.0)
    assert not scheduler.has_work and scheduler.pool_usage == 0


def test_what_a_stopped_or_cancelled_request_still_has_in_flight_is_ignored():
    scheduler = make()
    scheduler.add(request("stops", 3))
    scheduler.add(request("cancelled", (5, 6)))
    first, second = planned(scheduler), planned(scheduler)
    sequence = first.prefill[0].sequence
    assert scheduler.cancel("cancelled") and not scheduler.cancel("cancelled")
    scheduler.add(request("cancelled", (5, 6)))  # the id may be used again at once
    assert scheduler.complete(first, tokens(first), {"stops"}, 0.0) == [sequence]
    assert scheduler.complete(second, tokens(second), {"stops"}, 0.0) == []
    assert (sequence.output, sequence.finish_reason) == ([7], "stop")
    assert scheduler.num_waiting == 1 and scheduler.num_running == 0


def test_plans_are_completed_once_and_in_order():
    scheduler = make()
    scheduler.add(request("r", 5))
    first, second = planned(scheduler), planned(scheduler)
    with pytest.raises(ValueError, match="step 1 is not the oldest"):
        scheduler.complete(second, tokens(second), (), 0.0)
    scheduler.complete(first, tokens(first), (), 0.0)
    with pytest.raises(ValueError, match="step 0 is not the oldest"):
        scheduler.complete(first, tokens(first), (), 0.0)
    with pytest.raises(ValueError, match="step 1 has no token for 'r'"):
        scheduler.complete(second, {}, (), 0.0)


def test_prefill_is_bounded_by_the_pace_of_the_decoding():
    latency = LatencyModel({4: 0.02, 8: 0.04, 16: 0.08})
    scheduler = make(latency, slo=Slo(tpot_s=0.05, ttft_s=9.0))
    scheduler.add(request("decodes", 2, max_tokens=30))
    run(scheduler)
    scheduler.add(request("long", (1,) * 40))
    # One TPOT pays for a bucket of 8, also when the decoding sequence is late already.
    assert [run(scheduler, now).token_bucket for now in (0.0, 5.0)] == [8, 8]
    scheduler.cancel("decodes")
    assert run(scheduler, 5.0).token_bucket == 16


def test_a_step_is_priced_by_the_most_that_its_tokens_need_of_sampling():
    costs = {"adjusted_rows": 0.001, "drawn_rows": 0.01, "filtered_rows": 0.1, "logprob_rows": 1.0}
    scheduler = make(LatencyModel({4: 0.5, 8: 0.5, 16: 0.5}, costs))

    def add(name: str, prompt: int, sampling: Sampling, logprobs: bool = False) -> None:
        asked = {"sampling": sampling, "logprobs": logprobs}
        scheduler.add(replace(request(name, prompt, max_tokens=9), **asked))

    add("greedy", 2, Sampling.GREEDY)
    assert run(scheduler).predicted_s == pytest.approx(0.5)
    add("filtered", 30, Sampling.FILTERED)
    assert run(scheduler).predicted_s == pytest.approx(0.5), "it samples nothing yet"
    assert run(scheduler).predicted_s == pytest.approx(0.5 + 4 * 0.111)
    assert run(scheduler).predicted_s == pytest.approx(0.5 + 4 * 0.111)
    scheduler.cancel("filtered")
    add("drawn", 2, Sampling.DRAWN)
    add("reported", 2, Sampling.GREEDY, logprobs=True)
    assert run(scheduler).predicted_s == pytest.approx(0.5 + 4 * 1.011)
    scheduler.cancel("reported")
    assert run(scheduler).predicted_s == pytest.approx(0.5 + 4 * 0.011)
    scheduler.cancel("drawn")
    assert run(scheduler).predicted_s == pytest.approx(0.5)


def test_finetuning_tokens_leave_what_sampling_costs():
    scheduler = make(LatencyModel({4: 0.5, 8: 0.5, 16: 0.5}, {"drawn_rows": 0.01}), idle_step_s=9.0)
    scheduler.add(Microbatch(0, (12,)))
    scheduler.add(replace(request("drawn", 2, max_tokens=9), sampling=Sampling.DRAWN))
    plan = run(scheduler)
    assert plan.forward is not None
    assert plan.predicted_s == pytest.approx(0.5 + 4 * 0.01)


# ---- prefix cache ----


def test_a_fully_cached_prompt_still_computes_a_token():
    scheduler = make()
    scheduler.add(request("a", 8, max_tokens=1))
    run(scheduler)
    scheduler.add(request("b", 8, max_tokens=1))
    plan = run(scheduler)
    assert shape(plan.prefill) == [("b", 4, 4, True)]
    assert plan.prefill[0].sequence.cached_tokens == 4
    assert (scheduler.pool.hits, scheduler.pool.queries) == (1, 2)


def test_salts_keep_prefixes_apart():
    scheduler = make()
    for index, salt in enumerate([None, "x", "x"]):
        scheduler.add(request(str(index), 9, max_tokens=1, cache_salt=salt))
        plan = run(scheduler)
        assert plan.prefill[0].start == (8 if index == 2 else 0)
        assert plan.features.adapters == (salt is not None)


def test_twins_of_one_step_do_not_share_pages_still_being_written():
    scheduler = make()
    scheduler.add(request("a", 8))
    scheduler.add(request("b", 8))
    plan = planned(scheduler)
    assert [chunk.start for chunk in plan.prefill] == [0, 0]
    scheduler.add(request("c", 9))  # the next step may share, before the host has any result
    assert planned(scheduler).prefill[0].start == 8


def test_output_is_cached_for_the_next_turn():
    scheduler = make()
    scheduler.add(request("turn 1", (1, 2, 3), max_tokens=6))
    while scheduler.has_work:
        run(scheduler)
    scheduler.add(request("turn 2", (1, 2, 3, 7, 7, 7, 7, 7, 7, 4, 5)))
    assert planned(scheduler).prefill[0].start == 8


# ---- running out of pages ----


def test_the_newest_is_preempted_and_recomputed_with_its_output():
    scheduler = make(num_pages=5, prefix_caching=False)
    scheduler.add(request("old", (1,) * 7, max_tokens=8))
    scheduler.add(request("new", (2,) * 5, max_tokens=6))
    for _ in range(4):
        plan = run(scheduler)
        assert not plan.preempted
    # "old" has taken the last page with its 9th token; "new" needs a third page for its own 9th.
    assert shape(plan.decode) == [("old", 9, 1, True), ("new", 7, 1, True)]
    plan = run(scheduler)
    assert plan.preempted == ("new",) and shape(plan.decode) == [("old", 10, 1, True)]
    while not plan.prefill:
        plan = run(scheduler)
    assert shape(plan.prefill) == [("new", 0, 9, True)]
    assert plan.prefill[0].sequence.preemptions == 1


def test_a_preempted_sequence_waits_for_its_tokens_in_flight():
    scheduler = make(num_pages=4, prefix_caching=False, page_size=1)
    scheduler.add(request("old", (1,), max_tokens=4))
    scheduler.add(request("new", (2,), max_tokens=4))
    first, second = planned(scheduler), planned(scheduler)
    third = planned(scheduler)
    assert third.preempted == ("new",)
    sequence = first.prefill[1].sequence
    assert sequence.in_flight == 2
    scheduler.cancel("old")
    assert scheduler.plan(0.0) is None
    scheduler.complete(first, tokens(first), (), 0.0)
    assert scheduler.plan(0.0) is None
    scheduler.complete(second, tokens(second), (), 0.0)
    assert shape(planned(scheduler).prefill) == [("new", 0, 3, True)]


def test_a_sequence_that_only_waits_for_its_last_tokens_is_preempted_first():
    scheduler = make(num_pages=5, prefix_caching=False, page_size=1)
    scheduler.add(request("old", (1, 1), max_tokens=2))
    scheduler.add(request("new", (2,), max_tokens=4))
    first, second = planned(scheduler), planned(scheduler)
    third = planned(scheduler)
    assert third.preempted == ("old",) and shape(third.decode) == [("new", 2, 1, True)]
    scheduler.complete(first, tokens(first), (), 0.0)
    (old,) = scheduler.complete(second, tokens(second), (), 0.0)
    assert (old.request_id, old.output) == ("old", [7, 7])


def test_finetuning_gives_its_pages_up_before_any_request_does():
    latency = LatencyModel({}, {"loss_units": 1.0})
    scheduler = make(latency, num_pages=8, slo=Slo(tpot_s=0.5))  # never time for a unit
    scheduler.add(request("r", 4, max_tokens=20))
    run(scheduler)
    scheduler.add(Microbatch(0, (4,) * 5))
    plans = []
    while scheduler.num_running:
        plans.append(run(scheduler))
    assert started(plans[0])
    # Page 4 of the request is one too many: it comes with position 12, eight steps later.
    assert [bool(plan.parked) for plan in plans].index(True) == 8
    assert sum(len(plan.parked) for plan in plans) == 1
    assert not any(plan.preempted for plan in plans)
    assert started(run(scheduler))


def test_a_waiting_request_parks_finetuning_which_starts_again_from_nothing():
    scheduler = make(LatencyModel({}, {"layer_units": 1.0}), num_pages=8, idle_step_s=0.5)
    scheduler.add(Microbatch(3, (16, 8)))
    plans = [run(scheduler) for _ in range(4)]
    assert started(plans[0]) and plans[-1].backward
    scheduler.add(request("r", 14, max_tokens=2))
    plan = run(scheduler)
    assert (
        plan.parked == (3,) and not finetunes(plan) and shape(plan.prefill) == [("r", 0, 14, True)]
    )
    assert not run(scheduler).parked
    plan = run(scheduler)
    assert started(plan) and plan.forward and plan.forward.start == 0


def test_finetuning_keeps_its_pages_when_they_would_not_suffice():
    latency = LatencyModel({}, {"loss_units": 1.0})
    scheduler = make(latency, num_pages=8, slo=Slo(tpot_s=0.5), prefix_caching=False)
    scheduler.add(request("r", 14, max_tokens=8))
    run(scheduler)
    scheduler.add(Microbatch(0, (4, 4)))
    assert started(run(scheduler))
    scheduler.add(request("large", (9,) * 24, max_tokens=1))
    assert not run(scheduler).parked


def test_after_a_park_finetuning_waits_until_there_is_room_for_both():
    latency = LatencyModel({}, {"loss_units": 1.0})
    scheduler = make(latency, num_pages=10, slo=Slo(tpot_s=0.5), prefix_caching=False)
    scheduler.add(Microbatch(0, (16,)))
    scheduler.add(request("r", 13, max_tokens=14))
    plan = run(scheduler)
    assert started(plan) and scheduler.pool.num_free == 2
    scheduler.add(request("s", (9,) * 8, max_tokens=1))
    assert run(scheduler).parked
    # 6 of the 10 pages are free and 4 + 1 would do, but the next burst would take them back.
    assert not finetunes(run(scheduler)) and scheduler.pool.num_free == 6
    scheduler.cancel("r")
    assert started(run(scheduler))


def test_a_blocked_request_is_looked_up_again_only_when_pages_came_free(monkeypatch):
    scheduler = make(num_pages=12, prefix_caching=False)
    scheduler.add(request("old", 16, max_tokens=3))
    scheduler.add(request("older", 14, max_tokens=9))
    run(scheduler)
    scheduler.add(request("blocked", 20, max_tokens=1))
    looked_up = []
    find_prefix = scheduler.pool.find_prefix
    monkeypatch.setattr(
        scheduler.pool,
        "find_prefix",
        lambda tokens, salt: looked_up.append(len(tokens)) or find_prefix(tokens, salt),
    )
    plans = [run(scheduler) for _ in range(4)]
    assert looked_up == [14, 20, 20]
    assert shape(plans[-1].prefill)[0][0] == "blocked"


# ---- finetuning ----


def test_an_idle_engine_without_a_time_limit_takes_whole_buckets_and_all_units():
    scheduler = make()
    scheduler.add(Microbatch(0, (10, 10)))
    scheduler.add(Microbatch(1, (3,)))
    plans = [run(scheduler) for _ in range(3)]
    assert [(p.forward.start, p.forward.length) for p in plans if p.forward] == [
        (0, 16),
        (16, 4),
        (0, 3),
    ]
    assert [plan.token_bucket for plan in plans] == [16, 4, 4]
    assert [units(plan) for plan in plans] == [range(0), range(9), range(3)]
    assert [bool(plan.backward and plan.backward.done) for plan in plans] == [False, True, True]
    assert [plan.features.loss_units for plan in plans] == [0, 3, 1]
    assert plans[0].forward and len(plans[0].forward.pages[0]) == 3
    assert plans[0].features.attention_pairs == 10 * 10 + 6 * 6
    assert plans[1].features.attention_pairs == 4 * 10
    assert scheduler.plan(0.0) is None and not scheduler.has_work


def test_such_plans_do_not_depend_on_time():
    def plans(step_s: float, measured_s: float):
        scheduler = make(LatencyModel({4: 0.01, 16: 0.02}, {"layer_units": 0.01}))
        for index in range(3):
            scheduler.add(Microbatch(index, (7, 9, 13)))
        made, now = [], 0.0
        while plan := scheduler.plan(now):
            made.append(replace(plan, predicted_s=0.0))
            now += step_s
            scheduler.complete(plan, {}, (), now, measured_s)
        return made

    assert plans(0.0, 1e-6) == plans(100.0, 50.0)


def test_idle_steps_are_short_but_never_empty():
    latency = LatencyModel({4: 0.01, 8: 0.02, 16: 0.04}, {"layer_units": 0.01, "loss_units": 0.01})
    scheduler = make(latency, idle_step_s=0.0201)
    scheduler.add(Microbatch(0, (20,)))
    plans = [run(scheduler) for _ in range(7)]
    assert [plan.num_tokens for plan in plans] == [8, 8, 4, 0, 0, 0, 0]
    assert [len(units(plan)) for plan in plans] == [0, 0, 1, 2, 2, 2, 2]
    scheduler = make(latency, idle_step_s=1e-9)
    scheduler.add(Microbatch(0, (6,)))
    plans = [run(scheduler) for _ in range(5)]
    assert [plan.num_tokens for plan in plans] == [4, 2, 0, 0, 0]
    assert [len(units(plan)) for plan in plans] == [0, 0, 1, 1, 1]


def test_padding_is_finetuning_and_a_larger_bucket_needs_slack():
    latency = LatencyModel({4: 0.01, 8: 0.02, 16: 0.04})
    margin = latency.margin
    for slack_s, expected in ((0.0, 4), (0.021 / margin, 8), (0.041 / margin, 16)):
        scheduler = make(latency, slo=Slo(tpot_s=1.0, ttft_s=1.0))
        scheduler.add(request("r", 4))
        run(scheduler, 0.0)
        scheduler.add(Microbatch(0, (40,)))
        plan = planned(scheduler, 1.0 - slack_s)  # the second token is due at 1.0
        assert plan.token_bucket == plan.num_tokens == expected
        assert plan.forward and plan.forward.length == expected - 1


def in_backward(latency: LatencyModel, **changes) -> Scheduler:
    """A scheduler with a long backward under way."""
    scheduler = make(latency, num_layers=200, idle_step_s=1e-9, **changes)
    scheduler.add(Microbatch(0, (16,)))
    while not units(run(scheduler)):
        pass
    return scheduler


def test_backward_units_fill_the_slack_and_stop_when_a_token_is_late():
    latency = LatencyModel({4: 0.01}, {"layer_units": 0.01, "loss_units": 0.01})
    scheduler = in_backward(latency, slo=Slo(tpot_s=0.1, ttft_s=1.0))
    scheduler.add(request("r", 4, max_tokens=50, arrival=-1.0))
    # The first token is due now; half of what is left of a TPOT after another forward is 0.045 s.
    assert len(units(run(scheduler, 0.0))) == int((0.045 * latency.margin - 0.01) / 0.01) == 3
    counts = [len(units(run(scheduler, now))) for now in (0.0, 0.15, 0.9)]
    # The units before end at 0.03, 0.12 s are left; then 0.05 s till the third token; then none.
    budgets = [(0.07 + 0.045) * latency.margin, (0.05 + 0.045) * latency.margin, 0.0]
    assert counts == [max(0, int((min(b, 0.1) - 0.01) / 0.01)) for b in budgets] == [9, 7, 0]


def test_steps_in_flight_use_up_the_slack():
    latency = LatencyModel({4: 0.04}, {"layer_units": 0.001, "loss_units": 0.001})
    scheduler = in_backward(latency, slo=Slo(tpot_s=0.1, ttft_s=9.0))
    scheduler.add(request("r", 4, max_tokens=50))
    run(scheduler, 0.0)
    first = planned(scheduler, 0.09)  # token 2 is due at 0.1: nothing to spare
    assert not units(first)
    second = planned(scheduler, 0.09)  # token 3 at 0.2; 0.04 s are in flight, 0.07 s are left
    assert len(units(second)) == int(((0.07 + 0.03) * latency.margin - 0.04) / 0.001) == 50


def test_units_still_running_use_up_the_slack():
    latency = LatencyModel({4: 0.01}, {"layer_units": 0.001, "loss_units": 0.001})
    scheduler = in_backward(latency, slo=Slo(tpot_s=0.1, ttft_s=9.0))
    scheduler.add(request("r", 4, max_tokens=50))
    assert len(units(run(scheduler, 0.0))) == 90  # the token is read at 0.0, the units end at 0.09
    beside = (0.01 + 0.045) * latency.margin - 0.01
    assert len(units(planned(scheduler, 0.0))) == round(beside / 0.001) == 40


def test_a_microbatch_without_backward_has_loss_units_only():
    scheduler = make()
    scheduler.add(Microbatch(0, (10,), backward=False))
    plan = run(scheduler)
    assert plan.backward and plan.backward.done and units(plan) == range(2)
    assert (plan.features.loss_units, plan.features.layer_units) == (2, 0)


def test_unfinished_prefill_goes_before_finetuning():
    scheduler = in_backward(LatencyModel({}, {"layer_units": 1.0}))
    scheduler.add(request("r", 60, max_tokens=2))
    plans = [run(scheduler) for _ in range(4)]
    assert [len(units(plan)) > 0 for plan in plans] == [False, False, False, True]


def test_cancelled_microbatches_free_their_pages_at_once():
    scheduler = make(idle_step_s=1e-9)
    for index in range(3):
        scheduler.add(Microbatch(index, (20,)))
    run(scheduler)
    assert scheduler.pool_usage > 0
    assert scheduler.cancel_microbatch(1) and not scheduler.cancel_microbatch(1)
    assert scheduler.cancel_microbatch(0)
    assert scheduler.pool_usage == 0 and scheduler.num_microbatches == 1
    plan = run(scheduler)
    assert started(plan) and plan.forward and plan.forward.microbatch.microbatch_id == 2


# ---- refusals ----


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (request("r", ()), r"request 'r': prompt of 0 tokens"),
        (request("r", 3, max_tokens=0), r"max_tokens=0 must both be at least 1"),
        (request("r", 60, max_tokens=5), r"60 tokens \+ max_tokens=5 exceeds max_model_len=64"),
        (request("r", 40, max_tokens=10), r"needs 13 KV pages of 4 tokens, but the pool has 12"),
        (request("known", 3), r"request 'known' is already scheduled"),
        (Microbatch(9, ()), r"microbatch 9: lengths=\(\) must not be empty"),
        (Microbatch(9, (3, 0)), r"each at least 1"),
        (Microbatch(9, (65,)), r"a sequence of 65 tokens exceeds max_model_len=64"),
        (Microbatch(9, (1,) * 13), r"microbatch 9 needs 13 KV pages"),
        (Microbatch(8, (1,)), r"microbatch 8 is already queued"),
    ],
)
def test_what_can_never_run_is_refused_and_says_why(work, message):
    scheduler = make(num_pages=12)
    scheduler.add(request("known", 3))
    scheduler.add(Microbatch(8, (3,)))
    with pytest.raises(ValueError, match=message):
        scheduler.add(work)
    assert scheduler.num_waiting == 1 and scheduler.num_microbatches == 1


def test_a_request_of_exactly_the_pool_finishes_although_the_pool_is_full():
    scheduler = make(num_pages=12)
    scheduler.add(request("cached", (5,) * 20, max_tokens=1))
    while scheduler.has_work:
        run(scheduler)
    assert scheduler.pool.num_cached == 5
    scheduler.add(Microbatch(0, (28,)))
    assert started(run(scheduler))
    scheduler.add(request("r", 40, max_tokens=9))
    plan = run(scheduler)
    assert plan.parked
    while scheduler.num_running:
        plan = run(scheduler)
    assert len(plan.decode.sequences[0].output) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_sequences": 0}, "max_sequences=0 must be at least 1"),
        ({"token_buckets": (8, 4, 16)}, "strictly ascending"),
        ({"token_buckets": ()}, "strictly ascending"),
        ({"token_buckets": (4, 8)}, "max_tokens_per_step=16 must equal the largest"),
        ({"max_sequences": 17}, "max_sequences=17 must not exceed"),
        ({"idle_step_s": 0.0}, "idle_step_s=0.0"),
    ],
)
def test_a_contradictory_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


# ---- time on the host ----


def test_planning_256_decoding_sequences_is_fast(capsys):
    """The design asks for under 1 ms; the bound here only catches work per token of context."""
    config = SchedulerConfig(
        max_sequences=256,
        max_tokens_per_step=2048,
        max_model_len=8192,
        token_buckets=(256, 512, 1024, 2048),
        num_pages=50_000,
        num_layers=32,
        slo=Slo(0.05, 5.0),
    )
    latency = LatencyModel({256: 0.01, 2048: 0.05}, {"layer_units": 1e-3, "decode_kv": 1e-8})
    scheduler = Scheduler(config, latency)
    for index in range(256):
        prompt = tuple(range(index, index + 2000))
        scheduler.add(request(str(index), prompt, 1000, cache_salt="adapter"))
    scheduler.add(Microbatch(0, (8192,)))
    outstanding, seconds, now = [], [], 0.0
    while len(seconds) < 200:
        start = time.thread_time()  # time of this thread alone, however busy the machine is
        plan = planned(scheduler, now)
        elapsed = time.thread_time() - start
        if len(plan.decode) == 256:
            seconds.append(elapsed)
        outstanding.append(plan)
        now += 0.02
        if len(outstanding) == 2:
            oldest = outstanding.pop(0)
            scheduler.complete(oldest, tokens(oldest), (), now)
    median = statistics.median(seconds)
    with capsys.disabled():
        print(f"\nplan() of 256 decoding sequences of 2k tokens: median {median * 1e3:.2f} ms")
    assert median < 5e-3
