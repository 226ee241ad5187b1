"""Two processes run one engine from the scripts: a job goes on when one of them is lost, and a
server serves."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexllm_jax.engine.device.processes import LOST
from tests.checkpoints import make_llama, save_tokenizer
from tests.engines import free_port, random_prompts, reference_greedy
from tests.scripts.workspace import Workspace, make_workspace
from tests.server.running import SERVE, RunningServer, make_config

STEPS = 24


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    model = save_tokenizer(make_llama(tmp_path / "model", vocab=272, num_heads=4))
    made = make_workspace(tmp_path / "two", model, steps=STEPS, validation=None)
    made.tree["finetune"]["checkpoint_every"] = 2
    made.tree["compile"]["token_buckets"] = [48]  # fewer programs: each start compiles or loads all
    return made


def start(workspace: Workspace, script: str, *others: str) -> list[subprocess.Popen[str]]:
    """Both processes; `others` are arguments of the second one only."""
    address = f"127.0.0.1:{free_port()}"
    sections = {"tp": 2, "num_processes": 2, "coordinator_address": address}
    processes = []
    for process_id in range(2):
        fields = [f"parallel.{k}={v}" for k, v in (sections | {"process_id": process_id}).items()]
        arguments = [word for field in fields for word in ("--set", field)]
        processes.append(
            subprocess.Popen(
                workspace.command(script, *arguments, *(others if process_id else ())),
                cwd=workspace.folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
            )
        )
    return processes


def wait_for_checkpoint(workspace: Workspace, later_than: int) -> int:
    """The newest step with a checkpoint, once there is one later than that."""
    folder, deadline = workspace.output / "mine" / "checkpoints", time.monotonic() + 300
    while time.monotonic() < deadline:
        steps = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
        if max(steps, default=0) > later_than:
            return max(steps)
        time.sleep(0.05)
    raise AssertionError("no checkpoint within five minutes")


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def test_a_lost_process_ends_the_engine_and_the_job_resumes(workspace: Workspace) -> None:
    reached = 0
    for victim in (1, 0):
        processes = start(workspace, "finetune.py")
        reached = wait_for_checkpoint(workspace, later_than=reached)
        processes[victim].send_signal(signal.SIGKILL)
        status, output = end(processes[1 - victim])
        end(processes[victim])
        assert status == LOST, output
        assert f"process {victim}" in output and "jobs resume from their checkpoints" in output
    assert reached < STEPS - 2
    for process in start(workspace, "finetune.py"):
        status, output = end(process)
        assert status == 0, output
    resumed = load_file(workspace.output / "mine" / "adapter" / "adapter_model.safetensors")
    alone = make_workspace(workspace.folder / "one", Path(workspace.tree["model"]["path"]))
    alone.tree.update({name: workspace.tree[name] for name in ("finetune", "compile")})
    done = alone.run("finetune.py")
    assert done.returncode == 0, done.stderr
    expected = load_file(alone.output / "mine" / "adapter" / "adapter_model.safetensors")
    for name, tensor in expected.items():
        assert resumed[name] == pytest.approx(tensor, abs=1e-4), name


def test_processes_that_do_not_agree_are_told_the_field(workspace: Workspace) -> None:
    for process in start(workspace, "finetune.py", "--set", "finetune.unit_tokens=16"):
        status, output = end(process)
        assert status == 2 and re.search(r"finetune\.unit_tokens .*differs", output), output


def test_a_server_of_two_processes(llama: Path, tmp_path: Path) -> None:
    section = {
        "tp": 2,
        "num_processes": 2,
        "coordinator_address": f"127.0.0.1:{free_port()}",
    }
    config = make_config(llama, tmp_path, parallel=section, compile={"token_buckets": [48]})
    with RunningServer(config) as server:
        command = [sys.executable, str(SERVE), "--config", str(tmp_path / "config.yaml")]
        follower = subprocess.Popen([*command, "--set", "parallel.process_id=1"])
        server.wait_ready(300)
        prompt = random_prompts([20])[0]
        answer = server.client().completions.create(
            model="tiny", prompt=prompt, max_tokens=10, temperature=0
        )
        assert server.stop() == 0, server.output
    assert follower.wait(60) == 0
    reference = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    tokens = reference_greedy(reference, prompt, 10)
    assert answer.choices[0].text == AutoTokenizer.from_pretrained(llama).decode(tokens)
