"""Traces are read exactly, refused by file and line; drawn arrivals follow their process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scheduler.simulation.workload import Arrival, Lengths, load_trace, make_arrivals

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


def trace(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def test_a_trace_is_read_and_scaled(tmp_path):
    path = trace(tmp_path, HEADER + "0.0,3,4\n1.5,5,6\n")
    assert load_trace(path) == [Arrival(0.0, 3, 4), Arrival(1.5, 5, 6)]
    assert load_trace(path, time_scale=2.0)[1] == Arrival(3.0, 5, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"trace\.csv:1: no column arrival_s, prompt_tokens, output_tokens"),
        ("arrival_s,prompt_tokens\n", r"trace\.csv:1: no column output_tokens"),
        (HEADER, r"trace\.csv:1: the trace has no requests"),
        (HEADER + "0,1,1\nsoon,1,1\n", r"trace\.csv:3: need a number .*soon"),
        (HEADER + "0,1\n", r"trace\.csv:2: need a number"),
        (HEADER + "0,1,1.5\n", r"trace\.csv:2: need .*1\.5"),
        (HEADER + "0,0,1\n", r"trace\.csv:2: .*prompt_tokens=0"),
        (HEADER + "nan,1,1\n", r"trace\.csv:2: arrival_s=nan"),
        (HEADER + "-1,1,1\n", r"trace\.csv:2: arrival_s=-1"),
        (HEADER + "2,1,1\n1,1,1\n", r"trace\.csv:3: arrival_s is before"),
    ],
)
def test_a_bad_trace_names_its_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_trace(trace(tmp_path, text))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_time_scale_must_be_positive(tmp_path, scale):
    with pytest.raises(ValueError, match=r"workload\.time_scale"):
        load_trace(trace(tmp_path, HEADER + "0,1,1\n"), scale)


def test_real_traces_are_read():
    folder = Path(__file__).resolve().parents[2] / "../shared/data"
    paths = sorted(folder.glob("workload_*.csv"))
    if not paths:
        pytest.skip(f"no workload_*.csv in {folder}")
    for path in paths:
        arrivals = load_trace(path)
        assert arrivals[0].arrival_s == 0.0 and arrivals[-1].arrival_s < 601


@pytest.mark.parametrize(
    ("process", "cv", "expected_cv"),
    [("poisson", 3.0, 1.0), ("gamma", 2.0, 2.0), ("gamma", 0.5, 0.5)],
)
def test_arrivals_have_their_rate_and_burstiness(process, cv, expected_cv):
    arrivals = make_arrivals(process, rate=20.0, duration_s=2000.0, seed=1, cv=cv)
    times = np.array([arrival.arrival_s for arrival in arrivals])
    gaps = np.diff(times)
    assert len(times) == pytest.approx(40_000, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(expected_cv, rel=0.05)
    assert (gaps >= 0).all() and times[-1] < 2000.0


def test_uniform_arrivals_are_evenly_spaced():
    times = [arrival.arrival_s for arrival in make_arrivals("uniform", 4.0, 1.1)]
    assert times == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_the_seed_decides_and_a_longer_workload_begins_like_a_shorter_one():
    short = make_arrivals("gamma", 5.0, 10.0, seed=3, cv=2.0)
    assert short == make_arrivals("gamma", 5.0, 10.0, seed=3, cv=2.0)
    assert short != make_arrivals("gamma", 5.0, 10.0, seed=4, cv=2.0)
    long = make_arrivals("gamma", 5.0, 500.0, seed=3, cv=2.0)
    assert long[: len(short)] == short


def test_lengths():
    drawn = Lengths(mean=200, cv=1.0, maximum=100_000).draw(np.random.default_rng(0), 100_000)
    assert drawn.mean() == pytest.approx(200, rel=0.02)
    assert drawn.std() == pytest.approx(200, rel=0.05)
    assert set(Lengths(mean=7, cv=0).draw(np.random.default_rng(0), 5)) == {7}
    assert Lengths(mean=200, maximum=64).draw(np.random.default_rng(0), 1000).max() == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bursty", 1.0, 1.0), r"process='bursty' must be one of"),
        (("poisson", 0.0, 1.0), r"arrivals\.rate=0\.0"),
        (("poisson", 1.0, float("inf")), r"arrivals\.duration_s=inf"),
    ],
)
def test_bad_processes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_arrivals(*arguments)
