"""A server with the Tinker API and two tenants."""

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.server.running import RunningServer, make_config
from tests.server.tinker.speaking import ALL_MODULES, Speaker

KEYS = {"one": "tml-first-tenant", "two": "tml-second-tenant", "boss": "tml-administrator"}


def tinker_config(model, output_dir, **changes):
    """The configuration of the tests."""
    keys = [{"name": name, "key": key, "admin": name == "boss"} for name, key in KEYS.items()]
    server = {
        "api_keys": keys,
        "tinker": {"enabled": True, "model_names": ["Qwen/Qwen3-8B"], "snapshot_every": 3},
    }
    tinker = changes.pop("tinker", {})
    server["tinker"] |= tinker
    adapters = {"target_modules": ALL_MODULES}
    return make_config(model, output_dir, adapters=adapters, server=server, **changes)


@pytest.fixture(scope="session")
def tinker_server(chat_llama, tmp_path_factory):
    """One that most tests use."""
    config = tinker_config(chat_llama, tmp_path_factory.mktemp("tinker"))
    with RunningServer(config) as running:
        yield running.wait_ready()


@pytest.fixture
def one(tinker_server):
    """A session of the first tenant."""
    return Speaker(tinker_server, KEYS["one"]).begin()


@pytest.fixture
def two(tinker_server):
    """A session of the second tenant."""
    return Speaker(tinker_server, KEYS["two"]).begin()


@pytest.fixture(scope="module")
def adapter_logprobs(chat_llama, tmp_path_factory):
    """What PEFT makes of an adapter's files: log-probabilities of a text's tokens."""

    def score(files, text):
        folder = tmp_path_factory.mktemp("adapter")
        for name, content in files.items():
            (folder / name).write_bytes(content)
        base = AutoModelForCausalLM.from_pretrained(chat_llama, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, str(folder))
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0].log_softmax(-1)
        return np.array([float(logits[i, token]) for i, token in enumerate(text[1:])])

    return score
