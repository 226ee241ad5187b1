"""Requests for more adapters than there are slots wait for one, whatever runs in the others."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engines import random_prompts, save_random_adapter
from tests.server.running import RunningServer, make_config

COUNT = 16
PROMPT = random_prompts([9])[0]


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory):
    """Adapters "0" to "15"."""
    folder = tmp_path_factory.mktemp("many")
    for seed in range(COUNT):
        save_random_adapter(llama, folder / str(seed), seed=seed)
    return folder


def start(model, folder, output, **section):
    section = {"adapter_dirs": [str(folder)], **section}
    server = RunningServer(
        make_config(model, output, server={"port": 0, "model_name": "tiny"} | section)
    )
    server.wait_ready()
    for name in range(COUNT):
        assert load(server, name)[0] == 200
    return server


@pytest.fixture(scope="module")
def served(chat_llama, folder, tmp_path_factory):
    with start(chat_llama, folder, tmp_path_factory.mktemp("served")) as server:
        yield server


def load(server, name):
    body = {"lora_name": str(name), "lora_path": str(name)}
    return server.post("/v1/load_lora_adapter", json.dumps(body).encode())


def ask(server, name, tokens=8):
    body = {"model": str(name), "prompt": PROMPT, "max_tokens": tokens, "temperature": 0}
    body["ignore_eos"] = True
    status, headers, answer = server.post("/v1/completions", json.dumps(body).encode())
    return status, headers, json.loads(answer)


def test_all_are_answered_and_each_by_its_own(served):
    def text(name):
        status, _, answer = ask(served, name)
        assert status == 200, answer
        return answer["choices"][0]["text"]

    alone = [text(name) for name in range(COUNT)]
    assert len(set(alone)) > COUNT // 2
    asked = [i % COUNT for i in range(4 * COUNT)]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(text, asked)) == [alone[name] for name in asked]


def test_an_adapter_unloaded_while_its_requests_wait_ends_them(served):
    with ThreadPoolExecutor(2 * COUNT) as pool:
        asked = [pool.submit(ask, served, i % COUNT, 60) for i in range(2 * COUNT)]
        time.sleep(0.2)
        body = json.dumps({"lora_name": str(COUNT - 1)}).encode()
        assert served.post("/v1/unload_lora_adapter", body)[0] == 200
        answers = [future.result() for future in asked]
    for i, (status, _, answer) in enumerate(answers):
        gone = i % COUNT == COUNT - 1 and status in (400, 404)
        assert status == 200 or gone, answer
    assert ask(served, COUNT - 1)[0] == 404
    assert load(served, COUNT - 1)[0] == 200
    assert ask(served, COUNT - 1)[0] == 200


def test_who_waits_too_long_is_told_to_come_again(chat_llama, folder, tmp_path):
    with start(chat_llama, folder, tmp_path, adapter_wait_s=0.01) as server:
        with ThreadPoolExecutor(COUNT) as pool:
            answers = list(pool.map(lambda name: ask(server, name, 100), range(COUNT)))
        refused = [answer for answer in answers if answer[0] != 200]
        assert {status for status, _, _ in refused} == {429}
        assert {
            int({k.lower(): v for k, v in h.items()}["retry-after"]) for _, h, _ in refused
        } == {5}
        assert "adapters.slots" in refused[0][2]["error"]["message"]
