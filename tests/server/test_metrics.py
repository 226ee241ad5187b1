"""What /metrics says of jobs, of engines that tell of them one after the other."""

from types import SimpleNamespace

import pytest

from flexllm_jax.config import build_config
from flexllm_jax.server import metrics as metrics_module
from flexllm_jax.server.engines.protocol import JobReport, Stats
from flexllm_jax.server.metrics import ServerMetrics
from tests.server.running import make_config

ENGINE = SimpleNamespace(name="0")


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_module, "_ENDED_JOBS", 2)
    config = build_config(make_config(tmp_path / "model", tmp_path))
    return ServerMetrics(config, "tiny")


def report(name, status, forward):
    return JobReport(
        *(name, "a", status, 1, 2, forward, forward // 2, 0, 0.0, {"loss": 1.5}, None, 0, []),
        answered=forward // 10,
    )


def take(metrics, *jobs):
    metrics.take(ENGINE, Stats(False, 0.0, 0.0, 0, 0, 0, 1, 0, 0, 0, [], [], list(jobs)))


def series(metrics, sees=None):
    """Lines of jobs: {(name, job, phase): value}."""
    found = {}
    for family in metrics_module._Visible(metrics.registry, sees or (lambda name: True)).collect():
        for sample in family.samples:
            if "job" in sample.labels and not sample.name.endswith("_created"):
                key = sample.labels["job"], sample.labels.get("phase", "loss")
                assert key not in found, "told twice"
                found[key] = sample.value
    return found


def test_jobs_that_ended_long_ago_are_one_sum(metrics):
    """Their labels go, the total stays, whatever becomes of the engine; running ones are kept."""
    take(metrics, report("runs", "running", 10))
    for number in range(5):
        metrics.engine_started(ENGINE)
        take(metrics, report("runs", "running", 10), report(f"job-{number}", "running", 60))
        take(metrics, report("runs", "running", 10), report(f"job-{number}", "succeeded", 100))
        take(metrics, report("runs", "running", 10))
        forward = {job: n for (job, phase), n in series(metrics).items() if phase == "forward"}
        assert sum(forward.values()) == 10 + 100 * (number + 1) + 10 * (number + 1)
    assert forward == {"": 300, "job-3": 100, "job-4": 100, "runs": 60}
    assert series(metrics)["", "backward"] == 150
    assert {job for job, phase in series(metrics) if phase == "loss"} == {"job-3", "job-4", "runs"}
    assert metrics.jobs == {"runs", "job-3", "job-4"}
    hidden = series(metrics, sees=lambda name: name == "runs")
    assert hidden == {("", "forward"): 500, ("", "backward"): 250, ("", "answers"): 50} | {
        ("runs", "forward"): 60,
        ("runs", "backward"): 30,
        ("runs", "answers"): 6,
        ("runs", "loss"): 1.5,
    }


def test_a_job_that_goes_on_has_labels_again(metrics):
    for name in ("failed", "b", "c", "d"):
        take(metrics, report(name, "failed", 100))
    take(metrics)
    assert ("failed", "forward") not in series(metrics)
    take(metrics, report("failed", "running", 40))
    assert series(metrics)["failed", "forward"] == 40
    assert series(metrics)["", "forward"] == 200
