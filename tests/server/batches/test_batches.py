"""Batches through the unmodified openai SDK: each request is answered once, whatever is killed."""

import json
import os
import signal
import time
from typing import Any

import openai
import pytest

from tests.engines import random_prompts, reference_greedy
from tests.server.running import RunningServer, make_config

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ENDED = ("completed", "failed", "cancelled", "expired")
PROMPTS = random_prompts([9, 14, 21, 5], seed=30)


def request(name, url=TEXT, **body):
    fields = {"model": "tiny", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    fields |= {"return_token_ids": True} | body
    return {"custom_id": name, "method": "POST", "url": url, "body": fields}


def start(client, lines, endpoint=TEXT, **fields):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    file = client.files.create(file=("requests.jsonl", text.encode()), purpose="batch")
    ask = {"input_file_id": file.id, "endpoint": endpoint, "completion_window": "24h"}
    return client.batches.create(**ask | fields)


def wait(client, batch, ready=lambda b: b.status in ENDED, timeout_s=90) -> Any:
    end = time.monotonic() + timeout_s
    while not ready(now := client.batches.retrieve(batch.id)):
        assert time.monotonic() < end, now
        time.sleep(0.1)
    return now


def results(client, file_id):
    text = client.files.content(file_id).text if file_id else ""
    return {(told := json.loads(line))["custom_id"]: told for line in text.splitlines()}


def test_requests_of_a_file_are_answered(server, client, llama_reference):
    lines = [request(f"r{i}", prompt=prompt) for i, prompt in enumerate(PROMPTS)]
    lines += [request("bad", prompt=[1], model="absent"), request("worse", prompt=5)]
    batch = start(client, lines, metadata={"a": "b"})
    assert (batch.object, batch.metadata) == ("batch", {"a": "b"})
    assert batch.status in ("validating", "in_progress")
    done = wait(client, batch)
    assert done.status == "completed" and done.completed_at and done.in_progress_at
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (6, 4, 2)
    good, bad = results(client, done.output_file_id), results(client, done.error_file_id)
    assert set(good) == {"r0", "r1", "r2", "r3"} and set(bad) == {"bad", "worse"}
    for i, prompt in enumerate(PROMPTS):
        answer = good[f"r{i}"]["response"]
        assert answer["status_code"] == 200
        expected = reference_greedy(llama_reference, prompt, 6)
        assert answer["body"]["choices"][0]["token_ids"] == expected
    codes = {name: told["response"]["status_code"] for name, told in bad.items()}
    assert codes == {"bad": 404, "worse": 400}
    assert "prompt: got 5" in bad["worse"]["response"]["body"]["error"]["message"]
    assert batch.id in [b.id for b in client.batches.list()]
    talk = [{"role": "user", "content": "Who are you?"}]
    chat = start(client, [request("c", CHAT, messages=talk)], CHAT)
    (told,) = results(client, wait(client, chat).output_file_id).values()
    ask = {"max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(model="tiny", messages=talk, **ask)
    content = told["response"]["body"]["choices"][0]["message"]["content"]
    assert content == answer.choices[0].message.content
    served = server.get("/metrics", client.api_key)[1]
    assert 'flexllm:slo_attainment_ratio{slo="batch"} 1.0' in served


@pytest.mark.parametrize(
    ("lines", "reason", "number"),
    [
        (["{not json"], "line 1: is not JSON", 1),
        ([request("a", prompt="x"), request("a", prompt="y")], "custom_id 'a' is another", 2),
        ([request("a", CHAT)], "url: got '/v1/chat/completions'", 1),
        ([request("a", prompt="x", stream=True)], "a batch has no streams", 1),
        ([" "], "the file has no requests", None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_file_that_is_wrong_fails_the_batch(client, lines, reason, number):
    batch = wait(client, start(client, lines))
    assert batch.status == "failed" and batch.output_file_id is None
    assert reason in batch.errors.data[0].message and batch.errors.data[0].line == number


def test_what_no_batch_can_be_made_of(client):
    rows = client.files.create(file=("a.jsonl", b'{"prompt": "a"}\n'), purpose="fine-tune")
    ask = {"endpoint": TEXT, "completion_window": "24h"}
    for fields, reason in (
        ({"input_file_id": rows.id}, "purpose is fine-tune; must be batch"),
        ({"input_file_id": "file-absent"}, "no such file"),
        ({"input_file_id": rows.id, "endpoint": "/v1/embeddings"}, "endpoint"),
        ({"input_file_id": rows.id, "completion_window": "1h"}, "completion_window"),
    ):
        with pytest.raises(openai.BadRequestError, match=reason):
            client.batches.create(**ask | fields)
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve("batch_absent")
    expires = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("a", b"a"), purpose="batch", expires_after=expires)
    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError, match="expires_after"):
        client.files.create(
            file=("a", b"a"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 5}
        )


def test_batches_survive_the_death_of_either_process(chat_llama, llama_reference, tmp_path):
    """Every request is answered once, as if nothing had happened."""
    config = make_config(chat_llama, tmp_path, server={"batch_requests": 3})
    lines = [request(f"r{i}", prompt=PROMPTS[i % len(PROMPTS)], max_tokens=20) for i in range(120)]
    with RunningServer(config) as first:
        client = first.wait_ready().client()
        batch = start(client, lines)
        wait(client, batch, lambda b: b.request_counts.completed >= 5)
        os.kill(first.engine_pid, signal.SIGKILL)
        wait(client, batch, lambda b: b.request_counts.completed >= 40)
        with pytest.raises(openai.ConflictError, match=f"batch {batch.id} still needs the file"):
            client.files.delete(batch.input_file_id)
        first.process.kill()
        first.process.wait()
    folder = tmp_path / "server" / "batches" / batch.id
    with (folder / "output.jsonl").open("a") as file:
        file.write('{"id": "batch_req_half')  # of a line that was being written
    with RunningServer(config) as second:
        client = second.client()
        kept = wait(client, batch, lambda b: True).request_counts.completed
        assert 40 <= kept < 120
        done = wait(client, batch)
        assert done.status == "completed" and done.request_counts.failed == 0
        told = client.files.content(done.output_file_id).text.splitlines()
        assert len(told) == 120 and not folder.exists()
        for line in map(json.loads, told):
            prompt = PROMPTS[int(line["custom_id"][1:]) % len(PROMPTS)]
            expected = reference_greedy(llama_reference, prompt, 20)
            assert line["response"]["body"]["choices"][0]["token_ids"] == expected
        long = [request(f"l{i}", prompt=PROMPTS[0], max_tokens=140) for i in range(50)]
        stopped = start(client, long)
        wait(client, stopped, lambda b: b.request_counts.completed >= 1)
        assert client.batches.cancel(stopped.id).status == "cancelling"
        ended = wait(client, stopped)
        counts = ended.request_counts
        assert ended.status == "cancelled" and 1 <= counts.completed < 50
        assert len(results(client, ended.output_file_id)) == counts.completed
        with pytest.raises(openai.ConflictError, match="is cancelled"):
            client.batches.cancel(stopped.id)
