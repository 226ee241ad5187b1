"""A folder in which the scripts can run: configuration, trace, prompts and rows of a tiny model.

The engine is the one that other tests use too, so that its programs are in the cache.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.engines import COMPILE_CACHE, heed_interrupts, letter_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
TRACE = "arrival_s,prompt_tokens,output_tokens\n"


@dataclass(frozen=True)
class Workspace:
    """`config` is the file; `tree` what is in it."""

    folder: Path
    tree: dict[str, Any]

    @property
    def config(self) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(json.dumps(self.tree))  # JSON is YAML
        return path

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def command(self, script: str, *arguments: object) -> list[str]:
        given = ["--config", self.config, *arguments]
        return [sys.executable, str(SCRIPTS / script), *map(str, given)]

    def run(self, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(script, *arguments),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def stop(self, script: str, number: signal.Signals, after: str) -> tuple[int, str]:
        """Send a signal once a line of the output has `after`; returns exit status and output."""
        process = subprocess.Popen(
            self.command(script),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            preexec_fn=heed_interrupts,
        )
        output = ""
        assert process.stdout is not None
        for line in process.stdout:
            output += line
            if after in line:
                process.send_signal(number)
                break
        output += process.stdout.read()
        return process.wait(timeout=120), output

    def report(self) -> dict[str, Any]:
        return json.loads((self.output / "report.json").read_text())


def make_workspace(folder: Path, model: Path, **job: Any) -> Workspace:
    """Six requests, of which one is longer than the context, and a job of three steps."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(folder / "rows.jsonl", letter_rows(20))
    prompts = write_rows(folder / "prompts.jsonl", [{"prompt": "abc"}, {"prompt": "hello world"}])
    trace = folder / "trace.csv"
    trace.write_text(TRACE + "0,5,4\n0,40,6\n0.1,9,1\n0.2,150,30\n0.3,20,8\n0.3,3,5\n")
    job = {
        "name": "mine",
        "dataset": str(rows),
        "validation": str(rows),
        "batch_tokens": 150,
        "steps": 3,
        "peft": {"r": 4, "alpha": 8},
        "optimizer": {"lr": 1e-2},
    } | job
    tree = {
        "model": {"path": str(model), "dtype": "float32", "max_model_len": 160},
        "cache": {"page_size": 8, "num_pages": 48},
        "adapters": {"slots": 6, "max_rank": 8},
        "scheduler": {"max_tokens_per_step": 48, "max_sequences": 6},
        "compile": {"token_buckets": [8, 48], "cache_dir": str(COMPILE_CACHE)},
        "finetune": {"max_tokens": 96, "unit_tokens": 32, "checkpoint_every": 0, "jobs": [job]},
        "workload": {"trace": str(trace), "prompts": str(prompts)},
        "output_dir": str(folder / "out"),
    }
    return Workspace(folder, tree)
