"""Simulated engines: every request is answered once, runs repeat, and leaps change little."""

from __future__ import annotations

import math

import pytest

from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.latency.model import StepFeatures
from scheduler.latency.roofline import A100, LLAMA_3_1_8B, Efficiency, roofline
from scheduler.policies import POLICIES, make_policy
from scheduler.request import Request, Slo
from scheduler.simulation.engine import PerfectModel, SimulatedEngine, replay, report
from scheduler.simulation.supply import FinetuneSupply
from scheduler.simulation.workload import Lengths, make_arrivals

SLO = Slo(0.05, 5.0)
BUCKETS = (16, 64, 128, 192, 256, 320, 512, 2048)
EFFICIENCY = Efficiency(compute=0.46, memory=0.69, step_s=7.4e-3, unit_s=0.0)


def make(policy="coserving", *, finetune=True, **fields) -> SimulatedEngine:
    limits = SchedulerConfig(
        max_sequences=128,
        max_tokens_per_step=2048,
        max_model_len=8192,
        token_buckets=BUCKETS,
        num_pages=20_000,
        prefix_caching=False,
        num_layers=32,
        unit_tokens=512,
        slo=SLO,
        idle_step_s=0.05,
    )
    truth = roofline(A100, LLAMA_3_1_8B, BUCKETS, 512, efficiency=EFFICIENCY, spread=0.1)
    supply = FinetuneSupply([2000, 3500, 800], 4096) if finetune else None
    scheduler = Scheduler(limits, truth.copy(), make_policy(policy))
    return SimulatedEngine(scheduler, truth, supply, **{"noise": 0.03, **fields})


def arrivals(rate=2.0, duration_s=40.0):
    return make_arrivals(
        "gamma", rate, duration_s, 1, 2.0, Lengths(250, 1.0, 2000), Lengths(150, 0.8, 800)
    )


def run(engine, rate=2.0, duration_s=40.0):
    sent = arrivals(rate, duration_s)
    replay(engine, sent, deadline_s=400)
    return report([engine], SLO, engine.now)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "finetuning_only"])
@pytest.mark.parametrize("leaps", [False, True])
def test_every_policy_answers_every_request_once(policy, leaps):
    engine = make(policy, leaps=leaps)
    made = run(engine)
    sent = arrivals()
    assert made["inference"]["completed"] == made["inference"]["requests"] == len(sent)
    assert made["inference"]["output_tokens"] == sum(a.output_tokens for a in sent)
    assert engine.output_tokens == made["inference"]["output_tokens"]
    assert sorted(t.arrival for t in engine.timings) == [a.arrival_s for a in sent]
    trained = made["finetune"]["finetune"]["tokens"]
    assert (trained > 0) == (policy != "inference_only")
    assert engine.forwarded_tokens >= trained
    assert 0 < made["engine"]["busy"] <= 1.01  # the last units may still run


def test_a_run_repeats_and_another_seed_differs():
    assert run(make(seed=3)) == run(make(seed=3)) != run(make(seed=4))


@pytest.mark.parametrize("policy", ["coserving", "published", "inference_only", "temporal_128"])
def test_leaps_give_what_single_steps_give(policy):
    single, leaping = (run(make(policy, leaps=leaps), 1.0, 120.0) for leaps in (False, True))
    for section, name in (("inference", "tpot_ms"),):
        assert leaping[section][name]["mean"] == pytest.approx(
            single[section][name]["mean"], rel=0.03
        )
    tokens = [made["finetune"]["finetune"]["tokens_per_s"] for made in (single, leaping)]
    assert tokens[1] == pytest.approx(tokens[0], rel=0.05)
    steps = [made["engine"]["steps"] for made in (single, leaping)]
    assert steps[1] == pytest.approx(steps[0], rel=0.03)


@pytest.mark.parametrize("rate", [1.0, 4.0])
def test_the_slo_holds_and_finetuning_uses_the_slack(rate):
    alone, beside = run(make("inference_only"), rate), run(make(), rate)
    assert beside["inference"]["slo_attainment"] >= 0.98
    assert beside["inference"]["tpot_ms"]["mean"] > 0.85 * SLO.tpot_s * 1e3
    assert alone["inference"]["tpot_ms"]["mean"] < 0.6 * SLO.tpot_s * 1e3
    published = run(make("published"), rate)
    ours, theirs = (m["finetune"]["finetune"]["tokens_per_s"] for m in (beside, published))
    assert ours > 1.2 * theirs


def test_a_burst_is_absorbed_within_a_step():
    """Thirty requests arrive at once: the next plan but one holds nothing but inference."""
    engine, plans = make(), []
    dispatch = engine._dispatch
    engine._dispatch = lambda plan, pace: (plans.append((engine.now, plan)), dispatch(plan, pace))
    engine.add(Request("first", (0,) * 50, 600, 0.0))
    engine.advance(5.0)
    for index in range(30):
        engine.add(Request(str(index), (0,) * 400, 100, 5.0))
    engine.advance(5.4)
    after = [plan for at, plan in plans if at >= 5.0]
    assert after[0].prefill and not after[0].forward and not after[0].backward
    backlog = [plan for plan in after if plan.prefill and not plan.prefill[-1].samples]
    assert backlog and not any(plan.forward or plan.backward for plan in backlog)
    engine.finish()
    assert report([engine], SLO, engine.now)["inference"]["slo_attainment"] == 1.0


@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_the_floor_is_honoured_under_overload(floor):
    engine = make()
    object.__setattr__(engine.scheduler.config, "finetune_floor", floor)
    sent = make_arrivals("poisson", 40.0, 20.0, 1, 1.0, Lengths(1500, 0.1), Lengths(60, 0.1))
    replay(engine, sent, deadline_s=20.0)
    assert engine.unfinished > 50, "this is no overload"
    full = StepFeatures(2048, finetune_tokens=2048, adapters=True)
    forward_s = engine.device.forward_s(full) / 2048
    share = 2 * engine.forwarded_tokens * forward_s / engine.now
    assert share == pytest.approx(floor, abs=0.06)


def test_perfect_knowledge_never_predicts_wrong():
    engine = make(noise=0.3)
    truth = engine.device
    engine.scheduler = Scheduler(
        engine.scheduler.config, PerfectModel(truth.bases, truth.coefficients)
    )
    predicted, dispatch = [], engine._dispatch

    def spy(plan, pace):
        seconds = (truth.forward_s(plan.features) + truth.unit_s(plan.features)) * pace
        predicted.append((plan.predicted_s, seconds))
        dispatch(plan, pace)

    engine._dispatch = spy
    made = run(engine)
    assert all(p == pytest.approx(s) for p, s in predicted)
    assert made["inference"]["slo_attainment"] == 1.0


def test_requests_that_are_not_finished_count_as_missed():
    engine = make("finetuning_only")
    replay(engine, arrivals(), deadline_s=50.0)
    made = report([engine], SLO, 50.0)
    assert made["inference"]["slo_attainment"] == 0.0
    assert made["inference"]["failed"] == len(arrivals())


def test_a_supply_packs_within_a_batch_and_a_long_sequence_alone():
    supply = FinetuneSupply([300, 300, 900, 200], 700, accumulation=4)
    made = [supply.next() for _ in range(4)]
    assert [m.lengths for m in made] == [(300, 300), (900,), (200,), (300, 300)]
    assert [m.weights_version for m in made] == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="has no sequences"):
        FinetuneSupply([], 10)


def test_an_engine_without_work_waits():
    engine = make(finetune=False)
    engine.advance(10.0)
    assert engine.steps == 0 and engine.next_event == math.inf
    engine.add(Request("r", (0,) * 10, 3, 12.0))
    engine.finish()
    (timing,) = engine.timings
    assert timing.first_token_at == pytest.approx(12.0, abs=0.1)
