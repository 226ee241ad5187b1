"""simulate.py and benchmark.py from a configuration: what they write, print, and refuse."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.experiments.test_simulation import TREE
from tests.scripts.workspace import SCRIPTS


def run(script, tree, tmp_path, *arguments):
    (tmp_path / "c.yaml").write_text(json.dumps(tree))
    command = [sys.executable, str(SCRIPTS / script), "--config", "c.yaml", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)


def test_simulate_writes_a_report_and_a_plot(tmp_path):
    done = run("simulate.py", TREE, tmp_path, "--set", "policy=published", "--set", "output_dir=o")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "o/report.json").read_text())
    assert report["inference"]["completed"] == report["inference"]["requests"] > 20
    assert report["finetune"]["finetune"]["tokens_per_s"] > 0
    assert report["simulation"]["policy"] == report["engine"]["policy"] == "published"
    assert (tmp_path / "o/report.png").stat().st_size > 10_000
    assert "published" in done.stdout and "SLO met" in done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "fair"}, "policy: 'fair' must be one of coserving,"),
        ({"polcy": "coserving"}, "polcy: unknown field (value 'coserving'); did you mean policy?"),
        ({"workload": {"trace": "none.csv"}}, "workload.trace: none.csv: No such file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, changes, message):
    done = run("simulate.py", TREE | changes, tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "runs").exists()


def test_benchmark_compares_and_judges(tmp_path):
    tree = {
        "title": "small",
        "simulation": {
            "base": TREE,
            "panels": {"one": {}},
            "systems": {"ours": {"policy": "coserving"}, "theirs": {"policy": "published"}},
            "rates": [1, 2],
            "targets": {"slo_attainment": 0.5, "finetune_over": {"theirs": 100.0}},
        },
        "output_dir": "o",
    }
    done = run("benchmark.py", tree, tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "o/results.json").read_text())["simulation"]
    assert [(row["system"], row["x"]) for row in rows] == [
        ("ours", 1),
        ("ours", 2),
        ("theirs", 1),
        ("theirs", 2),
    ]
    assert (tmp_path / "o/simulation.png").exists()
    assert "target 0.5: met" in done.stdout and "target 100: NOT met" in done.stdout
