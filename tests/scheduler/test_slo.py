"""Deadlines, slack, and the report's summary, against hand-made numbers."""

from __future__ import annotations

import math

import pytest

from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.latency.model import LatencyModel
from scheduler.request import Slo
from scheduler.slo import RequestTiming, summarize
from tests.scheduler.simulated_device import request

CONFIG = SchedulerConfig(
    max_sequences=8,
    max_tokens_per_step=16,
    max_model_len=64,
    token_buckets=(8, 16),
    num_pages=64,
    slo=Slo(tpot_s=0.1, ttft_s=2.0),
)

SLO = Slo(tpot_s=0.1, ttft_s=2.0)


def test_deadlines_follow_the_first_token():
    scheduler = Scheduler(CONFIG, LatencyModel({}))
    scheduler.add(request("r", 4, max_tokens=50, arrival=10.0))
    (sequence,) = scheduler.inference.waiting
    assert sequence.due == 12.0
    first, second = scheduler.plan(10.5), scheduler.plan(10.5)
    assert sequence.due == math.inf  # the time of the first token is not known yet
    scheduler.complete(first, {"r": 1}, (), 11.0)
    assert sequence.due == pytest.approx(11.2)  # the second is in flight, the third comes next
    third = scheduler.plan(11.0)
    assert sequence.due == pytest.approx(11.3)
    for plan in (second, third):
        scheduler.complete(plan, {"r": 1}, (), 11.05)
    assert sequence.due == pytest.approx(11.3)  # time won is kept


def test_urgent_classes_go_first_and_patience_is_finite():
    scheduler = Scheduler(CONFIG, LatencyModel({}))
    classes = {
        "batch": Slo(1.0, 60.0, 0.5, "batch"),
        "interactive": Slo(0.1, 1.0, 2.0, "interactive"),
        "free": Slo(name="free"),
    }
    for name, slo in classes.items():
        scheduler.add(request(name, 2, arrival=0.0, slo=slo))
    scheduler.add(request("late", 2, arrival=119.9, slo=classes["interactive"]))
    scheduler.add(request("later", 2, arrival=4000.0, slo=classes["interactive"]))
    order = [s.request_id for s in scheduler.inference.waiting]
    assert order == ["interactive", "batch", "late", "free", "later"]


def timing(arrival, first, last, output, failed=False):
    return RequestTiming(arrival, 10, output, first, last, failed)


def test_summary():
    timings = [
        timing(0.0, 1.0, 2.0, 11),  # TPOT 100 ms: met
        timing(1.0, 1.5, 1.5, 1),  # one token: only TTFT counts
        timing(1.0, 4.0, 4.1, 3),  # TTFT 3 s: missed
        timing(2.0, 2.5, 3.5, 3),  # TPOT 500 ms: missed
        timing(2.0, None, None, 0, failed=True),
    ]
    summary = summarize(timings, Slo(0.1 + 1e-9, 2.0))
    assert summary["requests"] == 5 and summary["completed"] == 4 and summary["failed"] == 1
    assert summary["prompt_tokens"] == 50 and summary["output_tokens"] == 18
    assert summary["output_tokens_per_s"] == pytest.approx(18 / 4.1)
    assert summary["ttft_ms"]["mean"] == pytest.approx((1000 + 500 + 3000 + 500) / 4)
    assert summary["ttft_ms"]["p50"] == pytest.approx(750)
    assert summary["tpot_ms"]["mean"] == pytest.approx((100 + 50 + 500) / 3)
    assert summary["tpot_ms"]["p99"] == pytest.approx(492)
    assert summary["slo_attainment"] == pytest.approx(2 / 5)


def test_summary_of_nothing():
    summary = summarize([], SLO)
    assert summary["requests"] == 0 and summary["slo_attainment"] is None
    assert summary["tpot_ms"] == {"mean": None, "p50": None, "p99": None}
    assert summary["output_tokens_per_s"] is None


def test_objectives_must_be_positive():
    with pytest.raises(ValueError, match=r"slo\.tpot_s=0"):
        Slo(tpot_s=0)


def test_classes_are_judged_by_their_own_objectives_and_weighed():
    batch, interactive = Slo(1.0, 60.0, 0.5, "batch"), Slo(0.05, 1.0, 2.0, "interactive")
    made = [
        RequestTiming(0.0, 10, 11, 0.5, 1.5, slo=interactive),  # 100 ms a token: late
        RequestTiming(0.0, 10, 11, 30.0, 39.0, slo=batch),
        RequestTiming(0.0, 10, 11, 0.5, 1.5),
    ]
    section = summarize(made, SLO)
    assert section["slo_attainment"] == pytest.approx(2 / 3)
    assert section["goodput"] == pytest.approx(1.5 / 3.5)
    by_class = {name: c["slo_attainment"] for name, c in section["classes"].items()}
    assert by_class == {"batch": 1.0, "interactive": 0.0, "standard": 1.0}
    assert "classes" not in summarize(made[2:], SLO)
