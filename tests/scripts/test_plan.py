"""plan.py from the root of the repository: what it writes, prints, and refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.scripts.workspace import ROOT

CONFIG = "configs/llama3.1-8b.yaml"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/plan.py", "--config", CONFIG, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_plan_is_written_and_printed(tmp_path):
    done = run("--chip", "h100", "--rate", "0.3", "--budget-gb", "50", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["memory"]["available_bytes"] == 50 * 10**9
    assert plan["devices_needed"] == 1 and plan["load"][0]["slo_attainment"] > 0.99
    assert 50 < plan["requests"] < 150
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    for told in ("NVIDIA H100 80GB HBM3: fits", "KV pages", "finetuning alone", "1 GPU for 99%"):
        assert told in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chip", "h200", "--target", "2"), "--target: got 2; must be above 0 and at most 1"),
        (("--chip", "h200", "--budget-gb", "500"), "cache.budget_gb: 500 is more than the 139.3"),
        (("--chip", "h200", "--trace", "none.csv"), "none.csv: No such file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
    done = run(*arguments, "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
