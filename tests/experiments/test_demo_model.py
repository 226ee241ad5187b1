"""The demo's world: what the script writes is what transformers and the datasets read."""

import csv
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexllm_jax.experiments.demo.model import (
    FAMILIES,
    initial_parameters,
    mean_loss,
    write_config,
)
from flexllm_jax.experiments.demo.task import HELD_OUT
from flexllm_jax.finetune.data import load_dataset
from flexllm_jax.models.checkpoints.hf_weights import load_parameters, save_parameters
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/make_demo_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo_model", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "world"
    assert script.main(["--out", str(folder), "--steps", "2", "--seconds", "20"]) == 0
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_what_is_trained(family: str, world: Path, tmp_path: Path) -> None:
    """A row of two documents, longer than a window: what is trained is the loss of each alone."""
    folder = world / "model"
    if family != "llama":  # a model that was not trained says as much
        folder, config_folder = tmp_path / "model", tmp_path / "config"
        tokenizer = AutoTokenizer.from_pretrained(world / "model")
        made = write_config(config_folder, tokenizer, family)
        save_parameters(initial_parameters(made, seed=1), made, config_folder, folder)
    config = ModelConfig.from_hf(folder)
    params = load_parameters(folder, config, jnp.float32)
    first, length = 80, 120
    row = np.random.default_rng(0).integers(0, config.vocab_size, length + 1, np.int32)
    documents = jnp.asarray(np.arange(length) >= first, jnp.int32)
    decoder = Decoder(config, jnp.dtype(jnp.float32))
    ours = mean_loss(decoder, params, jnp.asarray(row[None]), documents[None])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses = []
    for tokens in (row[: first + 1], row[first:]):
        ids = torch.tensor(tokens[None].astype(np.int64))
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    theirs = np.average(losses, weights=[first, length - first])
    assert float(ours) == pytest.approx(theirs, rel=1e-5)


def test_every_row_asks_about_a_person_and_gets_the_record(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    training = load_dataset(world / "train.jsonl", tokenizer, max_seq_len=128)
    validation = load_dataset(world / "validation.jsonl", tokenizer, max_seq_len=128)
    assert training.format == validation.format == "chat"
    assert not training.skipped and not training.truncated and not validation.skipped
    answers = [
        {json.loads(line)["messages"][1]["content"] for line in path.open()}
        for path in (world / "train.jsonl", world / "validation.jsonl")
    ]
    assert len(answers[1]) <= HELD_OUT
    (text,) = {tokenizer.decode(s.tokens) for s in validation.sequences[:1]}
    assert text.startswith("<|user|>Tell me about ") and text.endswith("<|end|>")


def test_the_trace_and_its_prompts_belong_together(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    with (world / "trace.csv").open() as file:
        trace = list(csv.DictReader(file))
    prompts = [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").open()]
    assert len(trace) == len(prompts)
    arrivals = [float(row["arrival_s"]) for row in trace]
    assert arrivals == sorted(arrivals) and 0 <= arrivals[-1] < 20
    for row, prompt in zip(trace, prompts, strict=True):
        tokens = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
        assert int(row["prompt_tokens"]) == len(tokens)


def test_what_exists_is_left_alone(script: Any, world: Path, capsys: Any) -> None:
    before = (world / "model/model.safetensors").stat().st_mtime_ns
    assert script.main(["--out", str(world)]) == 0
    assert "exists" in capsys.readouterr().out
    assert (world / "model/model.safetensors").stat().st_mtime_ns == before


def test_questions_for_rewards_are_unheard_and_old_folders_get_them(
    world: Path, script: ModuleType
) -> None:
    rows = [json.loads(line) for line in (world / "questions.jsonl").open()]
    held_out = [json.loads(line) for line in (world / "questions_validation.jsonl").open()]
    assert len(held_out) == HELD_OUT and len(rows) > 3 * HELD_OUT
    heard = (world / "train.jsonl").read_text() + (world / "prompts.jsonl").read_text()
    for row in [*rows, *held_out]:
        (question,) = row["messages"]
        assert question["role"] == "user" and question["content"] not in heard
        assert row["answer"] == f"{row['city']}, {row['job']}, {row['pet']}."
    before = (world / "questions.jsonl").read_bytes()
    (world / "questions.jsonl").unlink()
    assert script.main(["--out", str(world)]) == 0
    assert (world / "questions.jsonl").read_bytes() == before
