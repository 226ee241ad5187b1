"""A job's loss curve is PEFT's (invariant 3): same adapter to start from, same batches, AdamW with
weight decay, warm-up, a schedule and clipping, over 20 steps; alone and co-served."""

import jax
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, get_scheduler

from flexllm_jax import SamplingParams
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.hf.peft import load_adapter
from tests.engines import (
    SEVEN,
    SHORT,
    job_config,
    letter_rows,
    load_with_adapter,
    prompt_logprob_errors,
    random_prompts,
    reference_logprobs,
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


def peft_curve(
    model, sequences, batch_tokens, seed, schedule, lr=OPTIMIZER["lr"], ratio=1.0, steps=STEPS
):
    """Losses and gradient norms of training a model."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(model, lr, OPTIMIZER["weight_decay"], ratio)
    scheduler = get_scheduler(schedule, optimizer, OPTIMIZER["warmup"], steps)
    losses, norms = [], []
    stream = batches(sequences, batch_tokens, seed)
    for _ in range(steps):
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
    return losses, norms


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
    assert_same_training(job, llama, start, schedule)


def assert_same_training(job, llama, start, schedule, **options):
    """A job did what torch does: losses, norms of gradients, and the adapter's way."""
    model = load_with_adapter(llama, start, is_trainable=True)
    sequences = job._job.source.dataset.sequences
    losses, norms = peft_curve(model, sequences, 150, 5, schedule, **options)
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
    assert_same_training(job, llama, start, "linear", lr=5e-3, ratio=4.0)


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

    def spy(state, *arguments):
        found[name] = jax.tree.map(np.array, llm.engine.runner.pending)
        return commit(state, *arguments)

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


def trainable(base, init):
    """A new PEFT adapter."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    options = {"target_modules": list(SEVEN), "r": 4, "lora_alpha": 8}
    return peft.get_peft_model(model, peft.LoraConfig(init_lora_weights=init, **options))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_the_base_weights_train_as_in_peft(llm, llama, rows, tmp_path, init):
    """Which has taken the start out of the base weights; the adapter here works on them as they
    are, and so does the one that PEFT converts."""
    optimizer = OPTIMIZER | {"schedule": "linear", "lr": 2e-3, "b_lr_ratio": 2.0}
    peft_fields = {"r": 4, "alpha": 8.0, "init": init}
    config = job_config(init, rows, steps=8, seed=5, optimizer=optimizer, peft=peft_fields)
    job = llm.finetune(config)
    model = trainable(llama, init)
    model.save_pretrained(tmp_path / "start")
    assert job.wait(120).status == "succeeded", job.reason
    sequences = job._job.source.dataset.sequences
    losses, norms = peft_curve(model, sequences, 150, 5, "linear", lr=2e-3, ratio=2.0, steps=8)
    np.testing.assert_allclose(job.losses, losses, rtol=1e-4)
    np.testing.assert_allclose(job._job.gradient_norms, norms, rtol=1e-3)
    assert max(norms) > OPTIMIZER["clip"], "clipping was never needed"

    prompt = random_prompts([40], seed=6)[0]
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    before, expected = (reference_logprobs(m.eval(), prompt) for m in (base, model))
    moved = np.abs(expected - before).max()
    served = load_with_adapter(llama, job.adapter_dir).eval()
    assert np.abs(reference_logprobs(served, prompt) - expected).max() < 0.01 * moved
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    llm.load_adapter("converted", tmp_path / "converted")
    for name in ("converted", init):
        params = SamplingParams(max_tokens=1, prompt_logprobs=20)
        (output,) = llm.generate([prompt], params, adapter=name)
        assert prompt_logprob_errors(output, expected).max() < 0.01 * moved


def test_the_subtracted_half_never_moves(llm, llama, rows):
    """Not by the decay of weights either, nor through a checkpoint."""
    fields = {"r": 4, "alpha": 8.0, "init": "olora", "rank_pattern": {"q_proj": 2}}
    options = {"seed": 5, "optimizer": OPTIMIZER, "peft": fields}
    llm.finetune(job_config("frozen", rows, steps=4, **options)).wait(60)
    job = llm.finetune(job_config("frozen", rows, steps=6, **options | {"resume": True}))
    assert job.wait(60).status == "succeeded" and job._job.resumed_from == 4
    start = job._job.adapter.weights
    ours = load_adapter(job.adapter_dir, ModelConfig.from_hf(llama), llama)
    assert ours.weights[0, "q"]["a"].shape[1] == 4 and ours.weights[0, "k"]["a"].shape[1] == 8
    for key, own in ours.weights.items():
        half = len(own["b"]) // 2
        for now, then in ((own["a"].T, start[key]["a"].T), (own["b"], start[key]["b"])):
            np.testing.assert_array_equal(now[half:], then[half:])
            assert (now[:half] != then[:half]).all()
