"""Processes that hang, are killed at the worst moment, or meet others: each ends by its deadline,
another goes on, and what was promised is kept. One server after the other, in one folder."""

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai
import pytest

from tests.engines import letter_rows, write_rows
from tests.server.running import SERVE, RunningServer, make_config

GRACE_S, STUCK_S = 4.0, 5.0
LORA = {"lora_rank": 4, "lora_alpha": 12, "learning_rate": 1e-3, "batch_tokens": 150}


@pytest.fixture(scope="module")
def config(chat_llama, adapter, tmp_path_factory):
    section = {"grace_s": GRACE_S, "stuck_after_s": STUCK_S, "adapter_dirs": [str(adapter.parent)]}
    return make_config(chat_llama, tmp_path_factory.mktemp("lifetimes"), server=section)


class Now:
    """The server that runs now."""

    server: RunningServer


@pytest.fixture(scope="module")
def now(config):
    state = Now()
    state.server = RunningServer(config).wait_ready()
    yield state
    state.server.__exit__()


@pytest.fixture(scope="module")
def rows(now, tmp_path_factory):
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", letter_rows(20))
    return now.server.client().files.create(file=path, purpose="fine-tune").id


def load(server, name, path):
    body = json.dumps({"lora_name": name, "lora_path": str(path)}).encode()
    return server.post("/v1/load_lora_adapter", body)


def events(server, job):
    found = server.client().fine_tuning.jobs.list_events(job.id, limit=1000).data
    return [event.message for event in reversed(found)]


def create(server, rows, steps=5000, model="tiny"):
    return server.client().fine_tuning.jobs.create(
        model=model, training_file=rows, seed=3, extra_body={**LORA, "max_steps": steps}
    )


def status(server, job):
    return server.client().fine_tuning.jobs.retrieve(job.id).status


def steps(server, job):
    return sum("training loss" in message for message in events(server, job))


def children(server):
    return f"/proc/{server.process.pid}/task/{server.process.pid}/children"


def ends_within(pid, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_a_second_server_on_one_folder_ends_with_one_line(now, config):
    command = [sys.executable, str(SERVE), "--config", str(now.server.output_dir / "config.yaml")]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 2
    assert len(second.stderr.splitlines()) == 1
    assert f"is used by another server (process {now.server.process.pid})" in second.stderr
    assert now.server.get("/health")[0] == 200


def test_a_job_keeps_the_adapter_that_its_model_meant(now, rows, adapter):
    """Also when the name is unloaded before the job has begun."""
    server = now.server
    assert load(server, "start", adapter)[0] == 200
    jobs = [create(server, rows, 40), create(server, rows, 40)]  # no place is left
    trained = create(server, rows, 2, model="start")
    body = json.dumps({"lora_name": "start"}).encode()
    assert server.post("/v1/unload_lora_adapter", body)[0] == 200
    server.wait(lambda: all(status(server, job) == "succeeded" for job in [*jobs, trained]), 120)
    made = server.output_dir / trained.id / "adapter" / "adapter_config.json"
    given = json.loads((adapter / "adapter_config.json").read_text())
    assert json.loads(made.read_text())["lora_alpha"] == given["lora_alpha"] != LORA["lora_alpha"]


def test_a_job_that_waits_for_room_ends_rightly(now, rows):
    server = now.server
    job = create(server, rows, 6)
    folder = server.output_dir / job.id / "adapter"
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("in the way")
    server.wait(lambda: any("it is tried again" in text for text in events(server, job)))
    assert status(server, job) == "running"
    folder.unlink()
    server.wait(lambda: status(server, job) == "succeeded")


def test_an_engine_that_stands_still_is_ended_and_a_failed_job_can_be_resumed(now, rows):
    """The job fails as its data is gone when the next engine is to go on; then it comes back."""
    server, client, pid = now.server, now.server.client(), now.server.engine_pid
    job = create(server, rows)
    server.wait(lambda: steps(server, job) > 4)
    with pytest.raises(openai.BadRequestError, match="is running; this is for paused jobs"):
        client.post(f"/fine_tuning/jobs/{job.id}/resume", cast_to=object)
    data = server.output_dir / "server" / "files" / rows
    data.rename(data.with_name("away"))
    os.kill(pid, signal.SIGSTOP)
    server.wait(lambda: server.get("/health")[0] == 503, 20)
    server.wait(lambda: status(server, job) == "failed", 120)
    assert "engine 0 is killed: the engine process has said nothing for" in server.output
    assert server.engine_pid != pid and ends_within(pid, 1)
    data.with_name("away").rename(data)
    client.post(f"/fine_tuning/jobs/{job.id}/resume", cast_to=object)
    server.wait(lambda: any("Resumed from step" in text for text in events(server, job)))
    client.fine_tuning.jobs.cancel(job.id)
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        client.post(f"/fine_tuning/jobs/{job.id}/resume", cast_to=object)


def test_a_call_that_never_returns_does_not_keep_the_engine(now, rows, adapter, config, tmp_path):
    """The server is killed; its engine ends by itself though a worker hangs, and the next server
    starts. It has the adapters that were loaded, goes on with the job, and has tidied up."""
    server = now.server
    assert load(server, "kept", adapter)[0] == 200
    job, other = create(server, rows), create(server, rows)
    server.wait(lambda: steps(server, job) > 4)
    path = write_rows(tmp_path / "rows.jsonl", letter_rows(5))
    third = create(server, server.client().files.create(file=path, purpose="fine-tune").id, 2)
    server.wait(lambda: status(server, third) == "queued")
    data = server.output_dir / "server" / "files" / third.training_file
    data.unlink()
    os.mkfifo(data)  # a worker of the engine reads it for ever, as from a lost network disk
    server.client().fine_tuning.jobs.cancel(other.id)
    server.wait(lambda: status(server, third) == "running")
    time.sleep(1.0)
    assert steps(server, third) == 0
    pid, sockets = server.engine_pid, set(Path(tempfile.gettempdir()).glob("flexllm-*/commands"))
    stray = server.output_dir / "server" / "files" / ("file-" + 32 * "0")
    stray.write_text("no row tells of it")
    os.utime(stray, (1, 1))
    server.stop(signal.SIGKILL)
    data.unlink()
    shutil.copy(path, data)
    now.server = RunningServer(config)
    assert ends_within(pid, GRACE_S + 2)
    server = now.server.wait_ready()
    assert "kept" in [model.id for model in server.client().models.list()]
    answer = server.client().completions.create(model="kept", prompt="a", max_tokens=2)
    assert answer.model == "kept"
    server.wait(lambda: any("Resumed from step" in text for text in events(server, job)))
    server.client().fine_tuning.jobs.cancel(job.id)
    server.wait(lambda: status(server, third) == "succeeded")
    assert not stray.exists()
    left = set(Path(tempfile.gettempdir()).glob("flexllm-*/commands"))
    assert len(sockets - left) >= 1


def test_the_next_server_ends_an_engine_that_stands_still_and_starts_its_own_again(now, config):
    """The server was killed while its engine was stopped: nobody is left to end it but the next,
    whose own engine is killed in its first start."""
    pid = now.server.engine_pid
    os.kill(pid, signal.SIGSTOP)
    now.server.stop(signal.SIGKILL)
    try:
        server = now.server = RunningServer(config)
        server.wait(lambda: Path(children(server)).read_text())
        os.kill(server.engine_pid, signal.SIGKILL)
        server.wait_ready()
        assert "ended with status -9; starting another" in server.output
        assert "an earlier server's engine, does not end: killed" in server.output
        assert ends_within(pid, 1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_stop_has_a_deadline_whatever_hangs(now):
    """The engine stands still, and another program has locked the database."""
    server = now.server
    other = sqlite3.connect(server.output_dir / "server" / "server.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    os.kill(server.engine_pid, signal.SIGSTOP)
    began = time.monotonic()
    assert server.stop() == 1
    assert time.monotonic() - began < GRACE_S + 6
    assert "did not stop within" in server.output
    other.close()
