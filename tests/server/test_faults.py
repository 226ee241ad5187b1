"""Either process may be killed at any time; nothing that was taken in is lost. Clients that read
slowly are served at their pace, and hold up nobody."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from flexllm_jax import FinetuneConfig
from tests.engines import letter_rows, write_rows
from tests.server.running import RunningServer, make_config

STEPS = 60
LORA = {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-3, "batch_tokens": 150}
LONG = {"model": "tiny", "prompt": [7] * 9, "max_tokens": 150, "temperature": 0}
LONG["extra_body"] = {"ignore_eos": True}


@pytest.fixture(scope="module")
def config(chat_llama, tmp_path_factory):
    server = {"max_running_jobs": 1, "stalled_after_s": 200.0}
    return make_config(chat_llama, tmp_path_factory.mktemp("faults"), server=server)


def losses(client, job):
    events = client.fine_tuning.jobs.list_events(job.id, limit=1000).data
    told = [e.data for e in reversed(events) if e.type == "metrics"]
    return {data["step"]: data["train_loss"] for data in told}


def messages(client, job):
    return [e.message for e in client.fine_tuning.jobs.list_events(job.id, limit=1000).data]


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"


def test_jobs_survive_the_death_of_either_process(config, llm, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", letter_rows(20))
    first = RunningServer(config).wait_ready()
    try:
        client = first.client()
        file = client.files.create(file=rows, purpose="fine-tune")
        ask = {"model": "tiny", "training_file": file.id, "seed": 3}
        done = client.fine_tuning.jobs.create(**ask, extra_body={**LORA, "max_steps": 2})
        jobs = [
            client.fine_tuning.jobs.create(**ask, extra_body={**LORA, "max_steps": steps})
            for steps in (STEPS, 4)
        ]
        first.wait(lambda: len(losses(client, jobs[0])) > 6)

        # The engine's process is killed amid a stream: the client is told, the job goes on.
        stream = iter(client.completions.create(**LONG, stream=True))
        next(stream)
        os.kill(first.engine_pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the engine process has ended"):
            list(stream)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**LONG)
        first.wait_ready()
        assert client.completions.create(**LONG).usage.completion_tokens == 150
        first.wait(lambda: any("Resumed from step" in m for m in messages(client, jobs[0])))
        assert client.fine_tuning.jobs.retrieve(jobs[1].id).status == "queued"

        # The HTTP process is killed: its engine ends too.
        engine_pid = first.engine_pid
    finally:
        first.stop(signal.SIGKILL)
    end = time.monotonic() + 30
    while is_alive(engine_pid):
        assert time.monotonic() < end, "the engine outlives the server"
        time.sleep(0.05)

    with RunningServer(config) as second:
        client = second.client()
        assert client.fine_tuning.jobs.retrieve(jobs[0].id).status in ("running", "succeeded")
        finished = client.fine_tuning.jobs.retrieve(done.id)
        second.wait_ready()
        answer = client.completions.create(model=finished.fine_tuned_model, prompt="a")
        assert answer.model == finished.fine_tuned_model
        for job in jobs:
            second.wait(
                lambda job=job: client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
            )
        told = losses(client, jobs[0])
        same = FinetuneConfig(
            name="uninterrupted",
            dataset=rows,
            peft={"r": 4, "alpha": 8.0},
            optimizer={"lr": 1e-3},
            batch_tokens=150,
            steps=STEPS,
            seed=3,
            resume=False,
        )
        expected = llm.finetune(same).wait(120).losses
        assert list(told) == list(range(1, STEPS + 1))
        np.testing.assert_allclose(list(told.values()), expected, rtol=1e-3)

        # An engine that stood still for a while fails the health check, until it goes on.
        os.kill(second.engine_pid, signal.SIGSTOP)
        second.wait(lambda: second.get("/health")[0] == 503, 20)
        os.kill(second.engine_pid, signal.SIGCONT)
        second.wait(lambda: second.get("/health")[0] == 200, 20)

        # SIGTERM: the stream ends as it should, the job has a checkpoint, the status is 0.
        job = client.fine_tuning.jobs.create(**ask, extra_body={**LORA, "max_steps": 5000})
        second.wait(lambda: len(losses(client, job)) > 3)
        steps = len(losses(client, job))
        with ThreadPoolExecutor(1) as pool:
            stream = iter(client.completions.create(**LONG, stream=True))
            next(stream)
            rest = pool.submit(list, stream)
            began = time.monotonic()
            assert second.stop() == 0, second.output
            assert time.monotonic() - began < config["server"]["grace_s"]
            assert len(rest.result()) == 149
            assert rest.result()[-1].choices[0].finish_reason == "length"

    with RunningServer(config) as third:
        client = third.client()
        assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
        third.wait_ready()
        third.wait(lambda: any("Resumed from step" in m for m in messages(client, job)))
        resumed = next(m for m in messages(client, job) if "Resumed from step" in m)
        assert int(resumed.split()[-1]) >= steps
        client.fine_tuning.jobs.cancel(job.id)


class SlowReader:
    """A stream of a hundred outputs, each with its prompt's log-probabilities: more than the
    sockets hold. Nothing of it is read until asked."""

    OUTPUTS, TOKENS = 100, 4

    def __init__(self, server):
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        address = server.url.removeprefix("http://")
        host, port = address.rsplit(":", 1)
        self._socket.connect((host, int(port)))
        body = {"model": "tiny", "prompt": [7] * 140, "max_tokens": self.TOKENS, "n": self.OUTPUTS}
        body |= {"ignore_eos": True, "echo": True, "logprobs": 20, "stream": True}
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self._socket.sendall(head.encode() + data)

    def read(self):
        """The events, a few KiB at a time."""
        pieces = []
        while piece := self._socket.recv(16384):
            pieces.append(piece)
            time.sleep(0.001)
        received = b"".join(pieces)
        return [line for line in received.splitlines() if line.startswith(b"data: ")]


def resident_mib(pid):
    return int(open(f"/proc/{pid}/status").read().split("VmRSS:")[1].split()[0]) / 1024


def test_slow_readers_hold_up_nobody(config, tmp_path):
    """The engine is done with their requests long before they are; others are answered meanwhile,
    and what waits for them is bounded by what they asked for."""
    with RunningServer(config | {"output_dir": str(tmp_path)}) as server:
        client = server.wait_ready().client()
        client.completions.create(**LONG)
        before = resident_mib(server.process.pid)
        readers = [SlowReader(server) for _ in range(2)]
        tokens = SlowReader.OUTPUTS * SlowReader.TOKENS
        server.wait(lambda: server.metric("vllm:num_requests_running") > 1)
        answer = client.completions.create(**LONG)
        assert answer.usage.completion_tokens == 150
        server.wait(lambda: server.metric("vllm:num_requests_running") == 0)
        assert server.metric("vllm:kv_cache_usage_perc") == 0
        assert server.metric("vllm:generation_tokens_total") < 300 + 2 * tokens  # not sent yet
        assert resident_mib(server.process.pid) < before + 100
        for reader in readers:
            events = reader.read()
            assert len(events) == tokens + 1
            assert events[-1] == b"data: [DONE]"
        server.wait(lambda: server.metric("vllm:generation_tokens_total") == 300 + 2 * tokens)
        assert client.completions.create(**LONG).choices[0].text == answer.choices[0].text
