"""Both sides of the comparison get the same model and the same tokens."""

import json

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexllm_jax.experiments.gpu.workload import engine_workload
from flexllm_jax.experiments.side_by_side.epoch import compare_epoch, read_rows
from flexllm_jax.experiments.side_by_side.peft import Theirs, make_model
from flexllm_jax.experiments.side_by_side.report import plot, plot_epoch, show, show_epoch
from flexllm_jax.experiments.side_by_side.workload import (
    EpochWorkload,
    random_tokens,
    write_rows,
)
from flexllm_jax.finetune.data import load_dataset

WORKLOAD = engine_workload(dry_run=True)
RESULT = {
    "finetune": {"theirs": [100.0, 200.0, 300.0], "ours": [150.0, 250.0, 350.0], "ratio": 1.25},
    "decode": {"theirs": [10.0], "ours": [20.0], "ratio": 2.0},
    "coserving": {
        "sequential_s": 10.0,
        "together_s": 7.0,
        "finetune_tokens_per_s_beside_requests": 123.0,
        "tpot_ms_alone": 4.0,
        "tpot_ms_coserved": 5.0,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, WORKLOAD)
    return folder


def test_a_row_becomes_exactly_its_tokens(model, tmp_path) -> None:
    tokens = random_tokens(np.random.default_rng(0), 3, 50)
    file = write_rows(tmp_path / "rows.jsonl", tokens)
    dataset = load_dataset(file, AutoTokenizer.from_pretrained(model), "text", max_seq_len=64)
    assert [list(s.tokens)[:50] for s in dataset.sequences] == tokens.tolist()


def test_what_is_there_is_not_made_again(model) -> None:
    before = AutoModelForCausalLM.from_pretrained(model).lm_head.weight.clone()
    make_model(model, WORKLOAD)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(model).lm_head.weight, before)


def test_their_side_trains_and_decodes(model) -> None:
    theirs = Theirs.load(model, WORKLOAD)
    tokens = random_tokens(np.random.default_rng(0), 2, WORKLOAD.sequence)
    adapter = {name: p.clone() for name, p in theirs.peft.named_parameters() if p.requires_grad}
    assert theirs.finetune(tokens) > 0
    assert any(
        not torch.equal(p, adapter[n]) for n, p in theirs.peft.named_parameters() if n in adapter
    )
    assert theirs.decode(random_tokens(np.random.default_rng(1), 2, WORKLOAD.prompt)) > 0


def test_the_report(tmp_path) -> None:
    console = Console(width=120, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    show(WORKLOAD, RESULT, console)
    told = console.export_text()
    assert "200.0" in told and "1.25" in told and "7.0 s together, 10.0 s one after" in told
    plot(RESULT, tmp_path / "plot.png")
    assert matplotlib.image.imread(tmp_path / "plot.png").shape[1] == 1650
    json.dumps(RESULT)


def test_the_three_of_an_epoch_have_the_same_rows_and_loss(tmp_path) -> None:
    """Padded, packed and on the engine, the first step's loss is the same number: the same tokens
    count, and packed rows do not see each other."""
    workload = EpochWorkload(
        title="tiny",
        hf_config=dict(WORKLOAD.hf_config, vocab_size=512),
        batch_rows=6,
        rank=4,
        lr=1e-3,
        token_buckets=[64],
        finetune={"max_tokens": 512, "unit_tokens": 128, "checkpoint_every": 0},
    )
    file = tmp_path / "rows.jsonl"
    words = [f"{i} and {i * i}" for i in range(2, 8)]
    rows = [{"question": f"What is {w * (1 + i % 3)}?", "answer": w} for i, w in enumerate(words)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = compare_epoch(file, tmp_path, workload, slices=1, limit=None)
    ours, padded, packed = (losses[0] for losses in result["mean_loss"].values())
    assert padded == pytest.approx(ours, rel=1e-4) and packed == pytest.approx(ours, rel=1e-4)
    assert result["tokens_that_count"] < result["tokens"] and result["rows"] == 6

    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    show_epoch(workload, result, console)
    assert "Trainer, packed" in console.export_text()
    plot_epoch(result, tmp_path / "plot.png")
    assert matplotlib.image.imread(tmp_path / "plot.png").shape[1] == 900


def test_a_row_without_an_answer_is_named(tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "What?"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: needs `question` and `answer`"):
        read_rows(file)
