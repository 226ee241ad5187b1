"""One server that most tests use: a tiny model with a chat template, and an adapter."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from tests.engines import save_random_adapter
from tests.server.running import KEY, LIMITED_KEY, TEMPLATE, RunningServer, make_config

ENDED = ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="session")
def chat_llama(llama, tmp_path_factory):
    """The tiny Llama with a chat template."""
    path = tmp_path_factory.mktemp("chat") / "llama"
    shutil.copytree(llama, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def adapter(llama, tmp_path_factory):
    """A random PEFT adapter."""
    return save_random_adapter(llama, tmp_path_factory.mktemp("adapters") / "random")


@pytest.fixture(scope="session")
def server(chat_llama, adapter, tmp_path_factory):
    """A server with keys, an adapter from the start, and small limits."""
    limits = {"name": "limited", "key": LIMITED_KEY}
    limits |= {"requests_in_flight": 2, "tokens_per_minute": 200}
    keys = [{"name": "tests", "key": KEY}, limits]
    config = make_config(
        chat_llama,
        tmp_path_factory.mktemp("served"),
        adapters={"preload": [{"name": "random", "path": str(adapter)}]},
        graders={"python": True, "timeout_s": 2.0},
        server={
            "api_keys": keys,
            "max_requests": 24,
            "max_queued_jobs": 20,
            "max_body_bytes": 100_000,
            "max_upload_bytes": 200_000,
            "adapter_dirs": [str(adapter.parent)],
            "allowed_origins": ["https://pages.example"],
        },
    )
    with RunningServer(config) as running:
        yield running.wait_ready()


@pytest.fixture(scope="session")
def client(server):
    """The openai SDK's client of it."""
    return server.client()


@pytest.fixture(scope="session")
def thinking_llama(chat_llama, tmp_path_factory):
    """The tiny Llama with a template that begins every answer with a thought."""
    path = tmp_path_factory.mktemp("thinking") / "llama"
    shutil.copytree(chat_llama, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    off = "enable_thinking is defined and not enable_thinking"  # as Qwen3's template has it
    thinks = f"<think>{{% if {off} %}}</think>{{% endif %}}"
    opened = "<assistant>{% endif %}"
    assert TEMPLATE.endswith(opened)
    tokenizer.chat_template = TEMPLATE.replace(opened, f"<assistant>{thinks}{{% endif %}}")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def thinking_server(thinking_llama, tmp_path_factory):
    """A server of it, without keys."""
    # By the data sheet of a CPU drafts pay.
    more = {"server": {"model_name": "thinker"}, "scheduler": {"latency": "roofline"}}
    config = make_config(thinking_llama, tmp_path_factory.mktemp("thinks"), **more)
    with RunningServer(config) as running:
        yield running.wait_ready()


@pytest.fixture(scope="session")
def thinking_client(thinking_server):
    """The openai SDK's client of it."""
    return thinking_server.client()


@pytest.fixture(scope="session")
def tokenizer(chat_llama):
    """Its tokenizer in transformers."""
    return AutoTokenizer.from_pretrained(chat_llama)


@pytest.fixture(autouse=True)
def the_shared_server_is_given_back(request):
    """No test leaves its jobs and adapters to the next, least of all one that fails."""
    if "server" not in request.fixturenames:
        yield
        return
    client = request.getfixturevalue("client")
    before = loaded(client)
    yield
    for job in client.fine_tuning.jobs.list(limit=100):
        if job.status not in ENDED:
            client.fine_tuning.jobs.cancel(job.id)
    for name in loaded(client) - before:
        server = request.getfixturevalue("server")
        server.post("/v1/unload_lora_adapter", json.dumps({"lora_name": name}).encode())


def loaded(client):
    """Names of the adapters that were loaded over HTTP, not trained."""
    return {model.id for model in client.models.list() if not model.id.startswith("ft:")}
