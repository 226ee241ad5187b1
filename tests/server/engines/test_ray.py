"""Two engines on Ray behind one endpoint, as scripts/serve_ray.py starts them on this machine."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from transformers import AutoTokenizer

from tests.engines import (
    letter_rows,
    load_with_adapter,
    random_prompts,
    reference_greedy,
    write_rows,
)
from tests.server.running import SERVE, RunningServer, make_config

pytest.importorskip("ray", reason="needs Ray: pip install 'flexllm_jax[ray]'")

SERVE_RAY = SERVE.with_name("serve_ray.py")
PROMPT = random_prompts([12])[0]
LORA = {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2, "batch_tokens": 150}
AT_ONCE = 8
SLOW_S = 240  # an engine starts in 20 s where it has a core to itself


@pytest.fixture(scope="module")
def server(chat_llama, tmp_path_factory):
    config = make_config(
        chat_llama,
        tmp_path_factory.mktemp("ray"),
        ray={"replicas": 2, "cpus_per_replica": 0.5},
        server={"stuck_after_s": 9.0},
    )
    with RunningServer(config, SERVE_RAY) as running:
        running.wait(lambda: running.metric("flexllm:engine_up") == 2, SLOW_S)
        running.wait(lambda: all(f"engine {i} ready" in running.output for i in "01"))
        yield running
        assert running.stop() == 0, running.output


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def rows(client, tmp_path_factory):
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", letter_rows(20))
    return client.files.create(file=path, purpose="fine-tune").id


def ask(client, model, count=10):
    """The texts of requests that are made at the same time."""
    options = {"prompt": PROMPT, "max_tokens": count, "temperature": 0}
    options["extra_body"] = {"ignore_eos": True}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = pool.map(
            lambda _: client.completions.create(model=model, **options), range(AT_ONCE)
        )
        return [answer.choices[0].text for answer in answers]


def by_engine(server, name):
    lines = server.get("/metrics")[1].splitlines()
    values = [line for line in lines if line.startswith(name) and "engine=" in line]
    return {re.search('engine="(.)"', v).group(1): float(v.split()[-1]) for v in values}


def pid_of(server, engine):
    """The process that an engine said it is, the last time it started."""
    return int(re.findall(rf"engine {engine} ready after .*? process (\d+)", server.output)[-1])


def create(client, rows, steps):
    extra = LORA | {"max_steps": steps}
    return client.fine_tuning.jobs.create(
        model="tiny", training_file=rows, seed=3, extra_body=extra
    )


def events(client, job):
    return client.fine_tuning.jobs.list_events(job.id, limit=1000).data[::-1]


def engines_of(client, job):
    """The engines a job was given to, in order."""
    messages = [event.message for event in events(client, job)]
    return [m.removeprefix("Given to engine ") for m in messages if m.startswith("Given to")]


def losses(client, job):
    told = [event.data for event in events(client, job) if event.type == "metrics"]
    return {data["step"]: data["train_loss"] for data in told}


def is_done(client, job):
    status = client.fine_tuning.jobs.retrieve(job.id).status
    assert status != "failed", events(client, job)
    return status == "succeeded"


def test_requests_spread_over_both_engines(server, client, chat_llama, llama_reference):
    expected = reference_greedy(llama_reference, PROMPT, 10)
    text = AutoTokenizer.from_pretrained(chat_llama).decode(expected, skip_special_tokens=True)
    before = by_engine(server, "vllm:iteration_tokens_total_sum")
    assert ask(client, "tiny") == [text] * AT_ONCE
    wanted = sum(before.values()) + AT_ONCE * (len(PROMPT) + 10 - 1)
    name = "vllm:iteration_tokens_total_sum"
    server.wait(lambda: sum(by_engine(server, name).values()) >= wanted - AT_ONCE * len(PROMPT))
    now = by_engine(server, name)
    assert all(now[engine] > before.get(engine, 0) for engine in "01"), now


def test_an_adapter_trained_by_one_engine_is_served_by_both(server, client, rows, chat_llama):
    job = create(client, rows, steps=6)
    server.wait(lambda: is_done(client, job), SLOW_S)
    assert len(engines_of(client, job)) == 1
    name = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    server.wait(lambda: len(client.fine_tuning.jobs.checkpoints.list(job.id).data) == 3)
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[-1]
    names = {name: job.id, checkpoint.fine_tuned_model_checkpoint: f"{job.id}.step-2"}
    texts = []
    for model, engine_name in names.items():
        reference = load_with_adapter(chat_llama, client.models.retrieve(model).root)
        tokens = reference_greedy(reference, PROMPT, 10)
        text = AutoTokenizer.from_pretrained(chat_llama).decode(tokens, skip_special_tokens=True)
        assert ask(client, model) == [text] * AT_ONCE
        version = f'flexllm:adapter_version{{adapter="{engine_name}"'
        server.wait(lambda version=version: by_engine(server, version).keys() == {"0", "1"})
        texts.append(text)
    assert texts[0] != texts[1]


def test_a_job_outlives_its_engine(server, client, rows):
    """Two equal jobs go to different engines; the one whose engine is killed ends with the losses
    of the other."""
    jobs = [create(client, rows, steps=60) for _ in range(2)]
    for job in jobs:
        server.wait(lambda job=job: len(losses(client, job)) > 4)
    engines = [engines_of(client, job) for job in jobs]
    assert sorted(engines) == [["0"], ["1"]]
    assert by_engine(server, "flexllm:engine_jobs") == {"0": 1, "1": 1}

    lost, other = engines[0][0], engines[1][0]
    pid = pid_of(server, lost)
    os.kill(pid, signal.SIGKILL)
    server.wait(lambda: by_engine(server, "flexllm:engine_up")[lost] == 0)
    assert server.get("/health")[0] == 200
    assert len(set(ask(client, "tiny"))) == 1
    for job in jobs:
        server.wait(lambda job=job: is_done(client, job), SLOW_S)
    assert engines_of(client, jobs[0]) == [lost, other]
    assert any("Resumed from step" in event.message for event in events(client, jobs[0]))
    told = [losses(client, job) for job in jobs]
    assert list(told[0]) == list(told[1]) == list(range(1, 61))
    np.testing.assert_allclose(list(told[0].values()), list(told[1].values()), rtol=1e-3)

    server.wait(lambda: server.metric("flexllm:engine_up") == 2, SLOW_S)
    server.wait(lambda: pid_of(server, lost) != pid)  # the log comes a little later
    before = by_engine(server, "vllm:iteration_tokens_total_sum")[lost]
    ask(client, "tiny")
    server.wait(lambda: by_engine(server, "vllm:iteration_tokens_total_sum")[lost] > before)


def test_a_stuck_engine_fails_the_health_check_and_gets_no_requests(server, client):
    pid = pid_of(server, "0")
    os.kill(pid, signal.SIGSTOP)
    try:
        server.wait(lambda: server.get("/health")[0] == 503, 20)
        assert "engine 0" in server.get("/health")[1]
        assert len(set(ask(client, "tiny"))) == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    server.wait(lambda: server.get("/health")[0] == 200, 20)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("server.api_keys_file=absent.yaml", "server.api_keys_file: absent.yaml cannot be read"),
        ("ray.address=localhost:1", "ray.address: localhost:1 cannot be joined"),
        ("ray.address=nowhere", "ray.address: nowhere cannot be joined"),
    ],
)
def test_what_cannot_be_used_is_told_in_one_line(server, tmp_path, field, says):
    command = [sys.executable, str(SERVE_RAY), "--config", str(server.output_dir / "config.yaml")]
    command += ["--set", f"output_dir={tmp_path}", "--set", field]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1 and says in ended.stderr


def test_without_ray_the_extra_is_named(server):
    program = f"import sys, runpy; sys.modules['ray'] = None; sys.argv[0] = {str(SERVE_RAY)!r}; "
    program += f"runpy.run_path({str(SERVE_RAY)!r}, run_name='__main__')"
    command = [sys.executable, "-c", program, "--config", str(server.output_dir / "config.yaml")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    said = "serve_ray.py: ray is not installed: pip install 'flexllm_jax[ray]'"
    assert ended.stderr.splitlines() == [said]
