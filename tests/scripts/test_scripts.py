"""The scripts as a user runs them: what they print, write and return."""

import json
import math
import re
import signal
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.scripts.workspace import Workspace, make_workspace

PNG = b"\x89PNG"


@pytest.fixture
def workspace(tmp_path: Path, llama: Path) -> Workspace:
    return make_workspace(tmp_path, llama)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Workspace:
    """A workspace in which finetune.py has run."""
    workspace = make_workspace(tmp_path_factory.mktemp("finetuned"), llama)
    done = workspace.run("finetune.py")
    assert done.returncode == 0, done.stderr
    return workspace


def test_coserve_answers_trains_and_reports(workspace: Workspace) -> None:
    done = workspace.run("coserve.py", "--ask", "abc")
    assert done.returncode == 0, done.stderr
    report = workspace.report()
    assert report.keys() == {"inference", "finetune", "engine"}

    inference = report["inference"]
    assert (inference["requests"], inference["completed"], inference["failed"]) == (6, 5, 1)
    assert inference["output_tokens"] == 4 + 6 + 1 + 8 + 5
    assert inference["prompt_tokens"] == 5 + 40 + 9 + 150 + 20 + 3
    assert inference["output_tokens_per_s"] > 0
    for latency in ("ttft_ms", "tpot_ms"):
        assert inference[latency].keys() == {"mean", "p50", "p99"}
        assert 0 < inference[latency]["p50"] <= inference[latency]["p99"]
    assert 0 <= inference["slo_attainment"] <= 5 / 6
    (reason,) = inference["failures"]
    assert "max_model_len=160" in reason and f"1 failed: {reason}" in done.stdout

    job = report["finetune"]["mine"]
    assert job["steps"] == 3 and len(job["losses"]) == 3 and job["tokens"] > 100
    assert all(map(math.isfinite, job["losses"])) and job["tokens_per_s"] > 0
    assert (Path(job["adapter_dir"]) / "adapter_model.safetensors").is_file()

    engine = report["engine"]
    assert engine["device"] and engine["policy"] == "coserving" and engine["versions"]["jax"]
    assert engine["recompiles_after_warmup"] == 0 and engine["steps"] > 10
    assert engine["wall_s"] > 0.3 and engine["compile_s"] > 0 and engine["peak_memory_bytes"] > 0
    assert engine["host_ms_per_step"].keys() == {"mean", "p50", "p99"}
    padding = engine["padding"]
    assert 0 < padding["share"] < 1 and engine["programs"] > 10
    assert sum(use["steps"] for use in padding["buckets"].values()) <= engine["steps"]
    assert all(0 <= use["padding"] < 1 for use in padding["buckets"].values())

    assert (workspace.output / "report.png").read_bytes().startswith(PNG)
    assert "before: " in done.stdout and "after, mine: " in done.stdout
    said = ("starting ", "ready after ", "memory, ", "finetuning saves ", "  smallest: ")
    said += ("  largest: ",)
    told = re.compile(rf"({'|'.join(said)}|\s*\d+ s \| )")  # of the way, which is on stderr
    assert all(map(told.match, done.stderr.splitlines())), done.stderr
    assert not any(map(told.match, done.stdout.splitlines())), done.stdout


def test_jobs_may_end_with_the_workload(tmp_path: Path, llama: Path) -> None:
    workspace = make_workspace(tmp_path, llama, steps=100_000)
    workspace.tree["workload"] |= {"adapter": "mine", "max_requests": 3}
    done = workspace.run("coserve.py", "--stop-jobs-with-workload")
    assert done.returncode == 0, done.stderr
    report = workspace.report()
    assert report["inference"]["completed"] == 3  # by the job's first version
    assert report["finetune"]["mine"]["status"] == "cancelled"


@pytest.mark.parametrize(
    ("script", "number"), [("coserve.py", signal.SIGINT), ("finetune.py", signal.SIGTERM)]
)
def test_signals_stop_cleanly(
    tmp_path: Path, llama: Path, script: str, number: signal.Signals
) -> None:
    workspace = make_workspace(tmp_path, llama, steps=100_000)
    with Path(workspace.tree["workload"]["trace"]).open("a") as trace:
        trace.write("3600,8,8\n")
    status, output = workspace.stop(script, number, after="step ")
    assert status == 130, output
    assert "Traceback" not in output
    report = workspace.report()
    job = report["finetune"]["mine"]
    checkpoints = workspace.output / "mine" / "checkpoints"
    assert job["status"] == "cancelled" and (checkpoints / str(job["steps"])).is_dir()
    assert not list(workspace.output.glob("mine/adapter"))
    if script == "finetune.py":
        resumed = workspace.run(script, "--set", f"finetune.jobs.0.steps={job['steps'] + 1}")
        assert resumed.returncode == 0, resumed.stderr
        losses = workspace.report()["finetune"]["mine"]["losses"]
        assert losses[:-1] == job["losses"]


def test_finetune_validates_and_exports(finetuned: Workspace) -> None:
    report = finetuned.report()
    job = report["finetune"]["mine"]
    assert job["status"] == "succeeded" and [step for step, _ in job["validation_losses"]] == [3]
    assert report["inference"]["requests"] == 0
    assert (finetuned.output / "report.png").read_bytes().startswith(PNG)


def test_export_hf_is_read_by_peft_and_transformers(
    finetuned: Workspace, llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "exported"
    done = finetuned.run("export_hf.py", "--adapter", "mine", "--out", out)
    assert done.returncode == 0, done.stderr
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, str(out / "adapter"))(tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
        torch.testing.assert_close(merged(tokens).logits, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 1e-2
    again = finetuned.run("export_hf.py", "--adapter", "mine", "--out", out)
    assert again.returncode == 2 and "exists" in again.stderr


def test_generate_with_an_adapter_and_without(finetuned: Workspace, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    arguments = ["--prompts-file", finetuned.tree["workload"]["prompts"], "--max-tokens", 8]
    arguments += ["--ignore-eos", "--format", "jsonl", "--logprobs", 0]
    done = finetuned.run("generate.py", *arguments, "--adapter", "mine", "--output", file)
    assert done.returncode == 0 and not done.stdout, done.stderr
    adapted = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["prompt"] for row in adapted] == ["abc", "hello world"]
    done = finetuned.run("generate.py", *arguments)
    assert done.returncode == 0, done.stderr
    base = [json.loads(line) for line in done.stdout.splitlines()]
    for row in adapted + base:
        assert len(row["token_ids"]) == 8 and row["finish_reason"] == "length"
        assert len(row["logprobs"]) == 8
    for with_adapter, without in zip(adapted, base, strict=True):
        (first,), (other,) = with_adapter["logprobs"][0].values(), without["logprobs"][0].values()
        assert abs(first - other) > 1e-3
