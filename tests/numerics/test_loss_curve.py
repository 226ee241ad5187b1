"""A job's loss curve is PEFT's (invariant 3): same adapter to start from, same batches, AdamW with
weight decay, warm-up, a schedule and clipping, over 20 steps; alone and co-served."""

import jax
import numpy as np
import pytest
import torch
from transformers import get_scheduler

from flexllm_jax import SamplingParams
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.hf_peft import load_adapter
from tests.engines import (
    SHORT,
    job_config,
    letter_rows,
    load_with_adapter,
    random_prompts,
    save_random_adapter,
    write_rows,
)

STEPS = 20
OPTIMIZER = {"lr": 2e-2, "warmup": 4, "weight_decay": 0.1, "clip": 0.5}


@pytest.fixture(scope="module")
def start(llama, tmp_path_factory):
    return save_random_adapter(llama, tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    rows = letter_rows(40, longest=60, seed=1)
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


def batches(sequences, batch_tokens, seed):
    """Rows in each epoch's order until the next would pass `batch_tokens`."""
    epoch = 0
    while True:
        batch, tokens = [], 0
        for row in np.random.default_rng([seed, epoch]).permutation(len(sequences)):
            if batch and tokens + len(sequences[row]) > batch_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(sequences[row])
            tokens += len(sequences[row])
        yield batch
        epoch += 1


def adamw(model, lr, decay, ratio=1.0):
    """With a learning rate of its own for B."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if ("lora_B" in name) == is_b], "lr": rate}
        for is_b, rate in ((False, lr), (True, lr * ratio))
    ]
    return torch.optim.AdamW(groups, weight_decay=decay)


def peft_curve(base, start, sequences, batch_tokens, seed, schedule, lr=OPTIMIZER["lr"], ratio=1.0):
    """Losses, gradient norms, and the trained model."""
    model = load_with_adapter(base, start, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(model, lr, OPTIMIZER["weight_decay"], ratio)
    scheduler = get_scheduler(schedule, optimizer, OPTIMIZER["warmup"], STEPS)
    losses, norms = [], []
    stream = batches(sequences, batch_tokens, seed)
    for _ in range(STEPS):
        batch = next(stream)
        divisor = sum(float(s.weights.sum()) for s in batch)
        total = 0.0
        optimizer.zero_grad()
        for sequence in batch:
            tokens = torch.tensor(sequence.tokens, dtype=torch.long)
            logits = model(input_ids=tokens[None]).logits[0, :-1]
            losses_of = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            share = (losses_of * torch.tensor(sequence.weights[1:])).sum() / divisor
            share.backward()
            total += share.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER["clip"]).item())
        optimizer.step()
        scheduler.step()
        losses.append(total)
    return losses, norms, model


@pytest.mark.parametrize(
    ("schedule", "co_served"),
    [("linear", False), ("cosine", True)],
    ids=["alone, linear", "co-served, cosine"],
)
def test_the_curve_is_that_of_peft(llm, llama, start, rows, schedule, co_served):
    config = job_config(
        f"curve-{schedule}",
        rows,
        init_adapter=start,
        steps=STEPS,
        seed=5,
        optimizer=OPTIMIZER | {"schedule": schedule},
    )
    job = llm.finetune(config)
    served = 0
    while co_served and job.status == "running":
        lengths = np.random.default_rng(served).integers(1, 100, 5)
        drawn = SamplingParams(max_tokens=20, temperature=1.0)
        llm.generate(random_prompts(lengths, seed=served), drawn)
        served += 1
    assert job.wait(120).status == "succeeded", job.reason
    assert served > 1 or not co_served, "hardly anything ran beside it"
    sequences = job._job.source.dataset.sequences
    losses, norms, model = peft_curve(llama, start, sequences, 150, 5, schedule)
    assert_same_training(job, losses, norms, model, start, llama)


def assert_same_training(job, losses, norms, model, start, llama):
    """A job did what torch did: losses, norms of gradients, and the adapter's way."""
    assert max(norms) > 2 * OPTIMIZER["clip"] > 0, "clipping was never needed"
    np.testing.assert_allclose(job.losses, losses, rtol=2e-4)
    np.testing.assert_allclose(job._job.gradient_norms, norms, rtol=2e-3)
    assert np.mean(job.losses[-3:]) < 0.9 * np.mean(job.losses[:3]), "nothing was learnt"
    ours = load_adapter(job.adapter_dir, ModelConfig.from_hf(llama), llama)
    before = load_adapter(start, ModelConfig.from_hf(llama), llama)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parts = name.split(".layers.")[1].split(".")
            key, factor = (int(parts[0]), SHORT[parts[2]]), parts[3][-1].lower()
            theirs = parameter.detach().numpy().T
            moved = np.linalg.norm(theirs - before.weights[key][factor])
            apart = np.linalg.norm(theirs - ours.weights[key][factor])
            assert apart < 5e-3 * moved, (key, factor)


def tokenized_rows(count, seed):
    """Tokens that follow each other, with labels and weights, of which many are 0."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        tokens = (random.integers(3, 100) + np.arange(random.integers(4, 60)) % 7).tolist()
        hidden = int(random.integers(0, len(tokens) - 2))
        yield {
            "input_ids": tokens,
            "labels": [-100] * hidden + tokens[hidden:],
            "weights": random.choice([0, 0.25, 1, 3], len(tokens)).tolist(),
        }


def test_weights_of_tokens_and_a_learning_rate_for_b(llm, llama, start, tmp_path):
    """LoRA+ is AdamW with two groups of parameters, and the loss a weighted mean."""
    rows = write_rows(tmp_path / "rows.jsonl", tokenized_rows(40, seed=2))
    optimizer = OPTIMIZER | {"schedule": "linear", "lr": 5e-3, "b_lr_ratio": 4.0}
    config = job_config(
        "weighted", rows, init_adapter=start, steps=STEPS, seed=5, optimizer=optimizer
    )
    job = llm.finetune(config)
    assert job.wait(120).status == "succeeded", job.reason
    sequences = job._job.source.dataset.sequences
    assert {float(w) for s in sequences for w in s.weights} == {0, 0.25, 1, 3}
    expected = peft_curve(llama, start, sequences, 150, 5, "linear", lr=5e-3, ratio=4.0)
    assert_same_training(job, *expected, start, llama)


def test_a_row_of_twice_the_weight_has_twice_the_gradient(llm, start, tmp_path, monkeypatch):
    """And what a token of weight 0 is to be changes nothing."""
    tokens = random_prompts([40], seed=3)[0]
    weights = np.random.default_rng(4).choice([0, 0.5, 2], len(tokens))
    weights[-1] = 0
    cases = {
        "once": (tokens, weights),
        "twice": (tokens, 2 * weights),
        "another last token": ([*tokens[:-1], (tokens[-1] + 1) % 200], weights),
    }
    trainer, found = llm.engine.trainer, {}
    commit = llm.engine.runner.commit

    def spy(state, first):
        found[name] = jax.tree.map(np.array, llm.engine.runner.pending)
        return commit(state, first)

    monkeypatch.setattr(trainer._runner, "commit", spy)
    for name, (own, counted) in cases.items():
        row = {"input_ids": own, "weights": counted.tolist()}
        rows = write_rows(tmp_path / f"{name}.jsonl", [row])
        llm.finetune(job_config("row", rows, init_adapter=start, steps=1)).wait(60)
    once, twice, other = map(jax.tree.leaves, (found[name] for name in cases))
    assert max(np.abs(leaf).max() for leaf in once) > 1e-3
    for one, two, changed in zip(once, twice, other, strict=True):
        np.testing.assert_allclose(two, 2 * one, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(changed, one)
