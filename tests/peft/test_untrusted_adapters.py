"""Adapter folders that somebody made to hold the engine up, or to break it: each is refused, soon,
in one line."""

import json
import os
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flexllm_jax.peft import patterns
from flexllm_jax.peft.adapter import Adapter, AdapterError, LoraConfig, init_adapter
from flexllm_jax.peft.hf.files import CONFIG, WEIGHTS
from flexllm_jax.peft.hf.peft import load_adapter, save_adapter
from tests.peft.test_hf_targets import MODEL

ENDLESS = "(([a-z_.0-9])+)+!"
NAN, INFINITE = float("nan"), float("inf")


@pytest.fixture
def folder(tmp_path):
    """An adapter that is right."""
    adapter = init_adapter(LoraConfig(4, 8, ("q_proj", "up_proj")), MODEL, 0)
    save_adapter(adapter, MODEL, "base", tmp_path)
    return tmp_path


def change(folder, **fields):
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | fields))


def refusal(folder):
    began = time.monotonic()
    with pytest.raises(AdapterError) as error:
        load_adapter(folder, MODEL)
    assert time.monotonic() - began < 20
    text = str(error.value)
    assert "\n" not in text and len(text) < 1100
    return text


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"layers_to_transform": [0], "layers_pattern": ENDLESS},
        {"rank_pattern": {ENDLESS: 4}},
        {"alpha_pattern": {ENDLESS: 4}},
    ],
    ids=str,
)
def test_an_expression_without_end(monkeypatch, folder, fields):
    monkeypatch.setattr(patterns, "CPU_S", 0.2)
    change(folder, **fields)
    assert "give a list of names instead" in refusal(folder)


def test_expressions_mean_what_they_mean_in_peft(folder):
    pattern = {r"layers\.(?!0).*\.q_proj": 6, "q_proj": 4, r".*up_proj": 2}
    adapter = init_adapter(
        LoraConfig(3, 8, ("q_proj", "up_proj"), rank_pattern=pattern, alpha_pattern={".*": 5}),
        MODEL,
        0,
    )
    save_adapter(adapter, MODEL, "base", folder)
    loaded = load_adapter(folder, MODEL)
    assert isinstance(loaded.config, LoraConfig) and isinstance(adapter.config, LoraConfig)
    assert loaded.config == adapter.config and loaded.config.resolved
    for layer, module in adapter.weights:
        assert loaded.config.rank(layer, module) == adapter.config.rank(layer, module)
        assert loaded.config.scale(layer, module) == adapter.config.scale(layer, module)
    assert [adapter.config.rank(layer, "q") for layer in range(3)] == [4, 6, 6]


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "(" * 5000 + ")" * 5000},
        {"target_modules": "(q_proj"},
        {"target_modules": [["q_proj"]]},
        {"target_modules": 7},
        {"layers_to_transform": [0], "layers_pattern": 7},
        {"layers_to_transform": {"a": 1.5}, "layers_pattern": ["a|b"]},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": 10**400}},
        {"r": 10**400},
        {"r": 0},
        {"r": 4.0},
        {"lora_alpha": 10**400},
        {"lora_alpha": 1e30},
        {"lora_alpha": NAN},
        {"lora_alpha": INFINITE},
        {"lora_alpha": "8"},
        {"alpha_pattern": {"q_proj": -INFINITE}},
        {"alpha_pattern": {"q_proj": 1e300}},
        {"lora_dropout": -1.0},
        {"lora_dropout": "a"},
        {"base_model_name_or_path": ["base"]},
        {"init_lora_weights": ["pissa"] * 10_000},
        {"peft_type": ["LORA"]},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_fields_that_mean_nothing(folder, fields):
    change(folder, **fields)
    refusal(folder)


@pytest.mark.parametrize("value", [NAN, INFINITE, -INFINITE])
def test_weights_are_finite(folder, value):
    tensors = load_file(folder / WEIGHTS)
    name = max(tensors)
    tensors[name][0, 0] = value
    save_file(tensors, folder / WEIGHTS)
    assert name in refusal(folder) and "finite" in refusal(folder)


def test_many_names_take_no_time(folder):
    change(folder, target_modules=[f"q_{i}_proj" for i in range(60_000)] + ["q_proj", "up_proj"])
    began = time.monotonic()
    assert isinstance(load_adapter(folder, MODEL), Adapter)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["pipe", "loop", "device", "folder", "nothing", "bytes"])
def test_only_regular_files_are_read(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(folder / "other")
        (folder / "other").symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "bytes":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    assert str(path) in refusal(folder)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a": ' * 100_000, "{" + '"a": [' * 900 + "]" * 900 + "}", " " * 2**21, ""],
    ids=["lists", "objects", "some", "long", "empty"],
)
def test_a_configuration_that_is_no_json(folder, text):
    (folder / CONFIG).write_text(text)
    assert CONFIG in refusal(folder)
