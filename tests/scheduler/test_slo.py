"""Deadlines, slack, and the report's summary, against hand-made numbers."""

from __future__ import annotations

import math

import pytest

from scheduler.request import Sequence, Slo
from scheduler.slo import RequestTiming, next_token_deadline, slack, step_budget, summarize
from tests.scheduler.simulated_device import request

SLO = Slo(tpot_s=0.1, ttft_s=2.0)


def sequence(output=0, in_flight=0, first_token_at=None, slo=SLO):
    made = request("r", 4, max_tokens=50, arrival=10.0)
    return Sequence(
        made,
        slo,
        (10.0, 0),
        list(made.prompt),
        to_sample=50,
        output=[0] * output,
        in_flight=in_flight,
        first_token_at=first_token_at,
    )


def test_deadlines():
    assert next_token_deadline(sequence(), 0.0) == 12.0
    assert next_token_deadline(sequence(1, 0, 11.0), 0.0) == pytest.approx(11.1)
    assert next_token_deadline(sequence(3, 2, 11.0), 0.0) == pytest.approx(11.5)
    # The first token is still in flight: it will be there when the step starts.
    assert next_token_deadline(sequence(0, 1), 11.5) == pytest.approx(11.6)
    assert next_token_deadline(sequence(0, 1, slo=Slo()), 11.5) == math.inf


def test_the_budget_is_the_smallest_slack_capped_at_one_tpot():
    early, late = sequence(9, 0, 10.0), sequence(1, 0, 10.0)
    assert slack([early, late], 10.04) == pytest.approx(0.06)
    assert step_budget([early, late], 10.04, margin=0.5) == pytest.approx(0.03)
    assert step_budget([early], 10.04, margin=1.0) == pytest.approx(0.1)
    assert step_budget([early, late], 10.5, margin=1.0) == 0.0
    assert step_budget([], 10.0, margin=1.0) == math.inf
    assert step_budget([sequence(1, 0, 1.0, Slo())], 10.0, margin=0.9) == math.inf


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
