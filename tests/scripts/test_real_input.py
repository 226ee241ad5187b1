"""coserve.py on real data: an Azure trace with ShareGPT lengths, Arena-Hard prompts, GSM8K rows."""

from pathlib import Path

import pytest

from tests.scripts.workspace import ROOT, make_workspace

DATA = (ROOT / "../shared/data").resolve()
TRACE = DATA / "workload_azconv600s_sharegpt_01rps.csv"
PROMPTS = DATA / "prompts_arenahard_500.jsonl"
ROWS = DATA / "sft_gsm8k_1500.jsonl"


def test_real_trace_prompts_and_rows(tmp_path: Path, llama: Path) -> None:
    for file in (TRACE, PROMPTS, ROWS):
        if not file.exists():
            pytest.skip(f"{file.name} is not in ../shared/data")
    workspace = make_workspace(tmp_path, llama, dataset=str(ROWS), validation=None)
    workspace.tree["workload"] = {
        "trace": str(TRACE),
        "prompts": str(PROMPTS),
        "time_scale": 0.02,
        "max_requests": 40,
    }
    done = workspace.run("coserve.py")
    assert done.returncode == 0, done.stderr
    report = workspace.report()
    lengths = [line.split(",")[1:3] for line in TRACE.read_text().splitlines()[1:41]]
    fitting = [(int(p), int(o)) for p, o in lengths if int(p) + int(o) <= 160]
    assert 0 < len(fitting) < 40
    inference = report["inference"]
    assert (inference["requests"], inference["completed"]) == (40, len(fitting))
    assert inference["failed"] == 40 - len(fitting) == sum(inference["failures"].values())
    assert inference["output_tokens"] == sum(output for _, output in fitting)
    job = report["finetune"]["mine"]
    assert job["status"] == "succeeded" and job["steps"] == 3
    assert report["engine"]["recompiles_after_warmup"] == 0
