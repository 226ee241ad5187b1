"""A job stopped by Ctrl-C, or killed, and resumed ends with the adapter of one never stopped, bit
for bit (invariant 6); and a process that serves and trains compiles nothing after its start (7)."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexllm_jax import SamplingParams
from flexllm_jax.finetune.checkpoint import JobCheckpoints
from tests.engine.test_preference_jobs import pair_rows
from tests.engines import (
    heed_interrupts,
    job_config,
    letter_rows,
    random_prompts,
    save_random_adapter,
    start_engine,
    write_rows,
)

STEPS = {"supervised": 60, "dpo": 20}
METHODS = {"supervised": {"type": "supervised"}, "dpo": {"type": "dpo", "beta": 0.3}}


def config(name, rows, resume, method="supervised"):
    optimizer = {"lr": 5e-3, "warmup": 3, "schedule": "cosine", "weight_decay": 0.01}
    fields = {"steps": STEPS[method], "seed": 8, "optimizer": optimizer, "validation": rows}
    fields |= {"method": METHODS[method], "validation_every": 9}
    return job_config(name, rows, resume=resume, **fields)


def exercise(llm, adapter):
    """A little of everything an engine can be asked, so that whatever would compile does."""
    prompts = random_prompts([3, 60, 11, 25, 90, 7, 40])
    llm.generate(prompts, SamplingParams(max_tokens=9, logprobs=2, prompt_logprobs=2))
    drawn = SamplingParams(max_tokens=9, temperature=1.0, top_p=0.5, repetition_penalty=1.1, n=2)
    llm.load_adapter("tenant", adapter)
    llm.generate(prompts, drawn, adapter="tenant")
    llm.export_adapter("tenant", Path(llm.config.output_dir) / "exported")
    llm.load_adapter("tenant", adapter)
    llm.unload_adapter("tenant")


def train_in_a_process(model: str, runs: str, rows: str, adapter: str, method: str):
    """Run or resume the job until it ends or this process does; say every step."""
    import tests.conftest  # noqa: F401  how XLA compiles

    with start_engine(Path(model), Path(runs)) as llm:
        print("compiled at start", llm.engine.runner.compilations.count, flush=True)
        if method == "supervised":
            exercise(llm, Path(adapter))  # not beside the job: other cuts of steps round otherwise
        job = llm.finetune(config("job", Path(rows), resume=True, method=method))
        print("resumed", job._job.resumed_from, flush=True)
        said = 0
        while job.status == "running":
            if job.steps > said:
                said = job.steps
                print("compiled", llm.engine.runner.compilations.count, flush=True)
                print("step", said, flush=True)
            time.sleep(0.001)


def interrupt(how: signal.Signals, steps: int, *arguments: object):
    """Signal a process that trains (`train_in_a_process`) once it has done `steps` more steps; what
    it said until then, and its last words."""
    code = "import sys; from tests.engine import test_resume as t; "
    process = subprocess.Popen(
        [sys.executable, "-c", code + "t.train_in_a_process(*sys.argv[1:])", *map(str, arguments)],
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    try:
        return _interrupt(process, how, steps)
    finally:
        process.kill()


def _interrupt(process: subprocess.Popen, how: signal.Signals, steps: int):
    assert process.stdout
    said, first = [], None
    for line in process.stdout:
        said.append(line.split())
        if line.startswith("step"):
            done = int(line.split()[1])
            first = done if first is None else first
            if done >= first + steps:
                break
    process.send_signal(how)
    output, errors = process.communicate(timeout=60)
    said += [line.split() for line in output.splitlines()]
    assert said and said[-1][0] == "step", errors
    assert process.returncode != 0
    return {line[0]: int(line[-1]) for line in said}, errors


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", letter_rows(30))


def test_interrupted_then_killed_then_resumed(llm, llama, rows, tmp_path):
    adapter = save_random_adapter(llama, tmp_path / "adapter")
    done = []
    for how in (signal.SIGINT, signal.SIGKILL):
        values, errors = interrupt(how, 13, llama, tmp_path, rows, adapter, "supervised")
        assert values["compiled"] == 0, "a program was compiled after the start"
        done.append((values["resumed"], values["step"]))
        assert ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
    (first, stopped), (resumed, killed) = done
    assert first == 0
    assert resumed >= stopped, "Ctrl-C lost steps"
    saved = JobCheckpoints(tmp_path / "job" / "checkpoints").steps()[-1]
    assert resumed < saved <= killed + 1
    assert_goes_on_as_if_never_stopped(llm, tmp_path / "job", rows, "supervised")


def test_a_preference_job_killed_then_resumed(llm, llama, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(30))
    adapter = save_random_adapter(llama, tmp_path / "adapter")
    values, _ = interrupt(signal.SIGKILL, 9, llama, tmp_path, pairs, adapter, "dpo")
    assert values["resumed"] == 0
    assert_goes_on_as_if_never_stopped(llm, tmp_path / "job", pairs, "dpo")


def assert_goes_on_as_if_never_stopped(llm, stopped, rows, method):
    """A job that goes on from a stopped one's folder, and one that was never stopped."""
    saved = JobCheckpoints(stopped / "checkpoints").steps()[-1]
    name = f"stopped-{method}"
    shutil.copytree(stopped, Path(llm.config.output_dir) / name)
    again = llm.finetune(config(name, rows, True, method))
    never = llm.finetune(config(f"whole-{method}", rows, False, method))
    assert again.wait(120).status == never.wait(120).status == "succeeded"
    assert 0 < saved == again._job.resumed_from < STEPS[method], "the job ended first"
    assert again.metrics == never.metrics
    assert again.validations == never.validations
    one, other = (job.adapter_dir / "adapter_model.safetensors" for job in (again, never))
    assert one.read_bytes() == other.read_bytes()


@pytest.fixture
def full_disk():
    """Files of this process cannot grow beyond a few bytes: every write fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes fail instead of killing the process
    yield lambda full: resource.setrlimit(
        resource.RLIMIT_FSIZE, (1000 if full else limits[0], limits[1])
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_stops_neither_the_job_nor_serving(llm, rows, full_disk):
    prompts = random_prompts([20, 50])
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    before = [o.token_ids for o in llm.generate(prompts, params)]
    job = llm.finetune(job_config("full", rows, steps=6)).wait(60)
    checkpoints = JobCheckpoints(Path(llm.config.output_dir) / "full" / "checkpoints")
    while checkpoints.steps() != [4, 6]:
        time.sleep(0.01)
    full_disk(True)
    try:
        job = llm.finetune(job_config("full", rows, steps=14, resume=True))
        job.wait(60)
        assert [o.token_ids for o in llm.generate(prompts, params)] == before
        while len(job.messages) < 3:  # steps 8, 12 and 14; checkpoints are written beside
            time.sleep(0.01)
    finally:
        full_disk(False)
    assert len(job.losses) == 14, "the job did not go on"
    assert job.status == "failed"
    assert job.reason is not None and "could not be written" in job.reason
    for message, step in zip(job.messages, (8, 12, 14), strict=True):
        assert f"step {step} could not be saved" in message
        assert "\n" not in message
    assert checkpoints.steps() == [4, 6]
    again = llm.finetune(job_config("full", rows, steps=14, resume=True)).wait(60)
    assert again._job.resumed_from == 6
    assert again.status == "succeeded", again.reason
    assert again.losses == job.losses
