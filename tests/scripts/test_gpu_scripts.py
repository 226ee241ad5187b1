"""The scripts for a GPU go through everything they do, at toy sizes on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_pallas.cases import KERNELS

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_gpu_suite_runs_dry(tmp_path):
    run(
        "scripts/gpu_suite.py", "--dry-run", "--rounds", "1", "--steps", "1", "--out", str(tmp_path)
    )
    result = json.loads((tmp_path / "gpu_suite.json").read_text())
    kernels = {row["kernel"] for row in result["kernels"]}
    assert kernels == set(KERNELS)
    for row in result["kernels"]:
        copies = "/keep-" in row["case"]
        assert row["error"] == 0 if copies else row["error"] > 0, row
        assert row["error"] <= row["tolerance"]
        assert row["microseconds"] > 0
    assert result["lora_overhead"][0]["added"] > 0
    assert result["engine"]["recompiles_after_warmup"] == 0
    assert min(result["engine"]["finetune"]["ours"] + result["engine"]["decode"]["ours"]) > 0


def test_tuning_runs_dry_and_leaves_the_tables_alone():
    table = ROOT / "kernels_pallas" / "grouped_lora" / "tuning.json"
    before = table.read_text()
    printed = run("scripts/tune_kernels.py", "--dry-run", "--kernel", "grouped_lora")
    assert "grouped_lora/expand" in printed
    assert table.read_text() == before


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("phase", ["smoke", "engine", "serve", "peers"])
def test_first_contact_leaves_what_it_measured(tmp_path, cache, phase):
    """Half a minute a phase: what is wrong here would be found on a rented GPU."""
    options = ["--dry-run", "--out", str(tmp_path), "--cache", cache]
    if phase == "serve":
        options += ["--rates", "5", "--seconds", "3"]
    if phase == "smoke":
        options += ["--parts", "sliding"]
    run("scripts/gpu_first_contact.py", phase, *options)
    noted = json.loads((tmp_path / f"{phase}.json").read_text())
    if phase == "smoke":
        agree = noted["sliding/agree"]
        assert agree["tokens"] and agree["adapted"] and "dense/agree" not in noted
        assert noted["sliding/kernels=auto"]["status"] == "succeeded"
        return
    if phase == "peers":
        assert noted["finetune"]["tokens_per_s"] > 0 and noted["generate"]["tokens_per_s"] > 0
        return
    assert noted["recompiles"] == 0
    if phase == "serve":
        assert noted["adapters/4"]["decode_share"] > 0
        assert noted["load/5"]["measured"]["finetune_tokens_per_s"] > 0
        assert noted["load/5"]["failures"] == {} and noted["load/5"]["requests"] > 2
        assert noted["rollouts/1"]["answered_tokens_per_s"] > 0
    else:
        assert noted["decode/4"]["step_ms"] > 0
        assert noted["finetune/alone"]["tokens_per_s"] > 0
        assert noted["decode and finetune"]["finetune_tokens_per_s"] > 0


def test_without_a_gpu_all_say_so():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for script in ("gpu_suite.py", "tune_kernels.py", "gpu_first_contact.py"):
        phase = ["smoke"] if script == "gpu_first_contact.py" else []
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / script), *phase],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        assert "use --dry-run" in done.stderr
