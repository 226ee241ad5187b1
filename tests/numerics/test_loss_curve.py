"""A job's loss curve is PEFT's (invariant 3): same adapter to start from, same batches, AdamW with
weight decay, warm-up, a schedule and clipping, over 20 steps; alone and co-served."""

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


def peft_curve(base, start, sequences, batch_tokens, seed, schedule):
    """Losses, gradient norms, and the trained model."""
    model = load_with_adapter(base, start, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = OPTIMIZER["weight_decay"]
    optimizer = torch.optim.AdamW(parameters, lr=OPTIMIZER["lr"], weight_decay=decay)
    scheduler = get_scheduler(schedule, optimizer, OPTIMIZER["warmup"], STEPS)
    losses, norms = [], []
    stream = batches(sequences, batch_tokens, seed)
    for _ in range(STEPS):
        batch = next(stream)
        labels = sum(int(s.loss_mask.sum()) for s in batch)
        total = 0.0
        optimizer.zero_grad()
        for sequence in batch:
            tokens = torch.tensor(sequence.tokens, dtype=torch.long)
            targets = torch.where(torch.tensor(sequence.loss_mask), tokens, -100)
            loss = model(input_ids=tokens[None], labels=targets[None]).loss
            share = loss * int(sequence.loss_mask.sum()) / labels
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
