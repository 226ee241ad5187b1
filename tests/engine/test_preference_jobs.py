"""Jobs that learn from pairs of answers, beside requests: the first step, the curve against torch
and PEFT, what is learnt, what a checkpoint keeps, and what stops them.

The reference loop's DPO losses were compared with those that TRL 1.16's DPOTrainer logs for the
same model, adapter and pairs: they differ by less than 1e-6 over 20 steps.
"""

import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.nn.functional import logsigmoid
from transformers import get_scheduler

from flexllm_jax import DpoConfig, IpoConfig, SamplingParams, SimpoConfig
from flexllm_jax.finetune.checkpoint import JobCheckpoints
from flexllm_jax.finetune.job import JobStatus
from flexllm_jax.finetune.microbatch import PackedMicrobatch
from flexllm_jax.peft.bank import to_row
from tests.engines import (
    job_config,
    load_with_adapter,
    random_prompts,
    save_random_adapter,
    write_rows,
)
from tests.numerics.test_loss_curve import batches

STEPS, SEED = 20, 5


def pair_rows(count, seed=0, longest=12):
    """Prompts to be answered in capitals, not in small letters."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt = "".join(random.choice(list("abcdefgh"), random.integers(3, longest)))
        kept = prompt[: random.integers(2, len(prompt) + 1)]
        rows.append({"prompt": prompt, "chosen": kept.upper(), "rejected": kept[::-1] + "."})
    return rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pair_rows(40))


@pytest.fixture(scope="module")
def start(llama, tmp_path_factory):
    return save_random_adapter(llama, tmp_path_factory.mktemp("start"))


def answer_logprobs(model, sequence):
    """Log-probabilities of the tokens that count."""
    tokens = torch.tensor(sequence.tokens, dtype=torch.long)
    logits = model(input_ids=tokens[None]).logits[0, :-1]
    of_each = logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    return of_each[torch.tensor(sequence.loss_mask[1:])]


def pair_loss(method, preferred, rejected, reference):
    """The loss of a pair from its log-probabilities, and from the start's sums."""
    beta = method.beta
    if method.type == "dpo":
        gap = (preferred.sum() - reference[0]) - (rejected.sum() - reference[1])
        return -logsigmoid(beta * gap)
    if method.type == "ipo":
        gains = [
            (own.sum() - known) / len(own)
            for own, known in zip((preferred, rejected), reference, strict=True)
        ]
        return (gains[0] - gains[1] - 1 / (2 * beta)) ** 2
    return -logsigmoid(beta * (preferred.mean() - rejected.mean()) - method.gamma)


def reference_curve(base, start, pairs, method, batch_tokens, optimizer):
    """Mean losses of the batches, as torch and PEFT train them."""
    model = load_with_adapter(base, start, is_trainable=True)
    with torch.no_grad():
        known = {
            id(pair): [answer_logprobs(model, s).sum() for s in (pair.preferred, pair.rejected)]
            for pair in pairs
        }
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=optimizer["lr"], weight_decay=0.0)
    scheduler = get_scheduler("linear", adam, optimizer["warmup"], STEPS)
    losses, stream = [], batches(pairs, batch_tokens, SEED)
    for _ in range(STEPS):
        batch = next(stream)
        adam.zero_grad()
        total = 0.0
        for pair in batch:
            own = [answer_logprobs(model, s) for s in (pair.preferred, pair.rejected)]
            loss = pair_loss(method, *own, known[id(pair)]) / len(batch)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        scheduler.step()
        losses.append(total)
    return losses


@pytest.mark.parametrize(
    "method", [DpoConfig(beta=0.3), IpoConfig(beta=0.5), SimpoConfig()], ids=lambda m: m.type
)
def test_the_curve_is_that_of_torch_and_peft(llm, llama, start, rows, method):
    optimizer = {"lr": 3e-3, "warmup": 4}
    config = job_config(
        f"curve-{method.type}",
        rows,
        method=method,
        init_adapter=start,
        steps=STEPS,
        seed=SEED,
        optimizer=optimizer,
    )
    job = llm.finetune(config).wait(60)
    assert job.status == "succeeded", job.reason
    pairs = job._job.source.dataset.items
    expected = reference_curve(llama, start, pairs, method, config.batch_tokens, optimizer)
    np.testing.assert_allclose(job.losses, expected, atol=1e-4, rtol=0)
    assert np.ptp(expected) > 0.05, "nothing moved"


def test_the_first_loss_is_ln_2_and_pairs_are_learnt_beside_requests(llm, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", pair_rows(100, seed=1))
    held_out = write_rows(tmp_path / "held_out.jsonl", pair_rows(20, seed=2))
    config = job_config(
        "learnt",
        rows,
        method=DpoConfig(beta=0.1),
        validation=held_out,
        batch_tokens=400,
        steps=24,
    )
    job, served = llm.finetune(config), 0
    while job.status == "running":
        drawn = SamplingParams(max_tokens=10, temperature=1.0)
        llm.generate(random_prompts([9, 30, 14], seed=served), drawn)
        served += 1
    assert job.wait(60).status == "succeeded", job.reason
    assert served > 1, "hardly anything ran beside it"
    first, last = job.metrics[0], job.metrics[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-5)
    assert last["accuracy"] >= 0.9 and last["margin"] > 0.1
    assert last["reward_preferred"] - last["reward_rejected"] == pytest.approx(last["margin"])
    ((step, validated),) = job.validations
    assert step == 24 and validated["accuracy"] >= 0.9
    assert validated.keys() == last.keys() - {"gradient_norm"}


def rows_of(source, dataset):
    """Tokens that go through the model for all rows, each prompt once."""
    method = source.method
    data = (tuple(method.data(row, ())) for row in dataset.items)
    return sum(PackedMicrobatch(own, method.loss, page=source.page).tokens for own in data)


def test_resumed_is_undisturbed_and_scores_no_reference_again(llm, rows, start, tmp_path):
    validation = write_rows(tmp_path / "validation.jsonl", pair_rows(6, seed=3))
    fields = {"method": DpoConfig(), "validation": validation, "steps": 7, "init_adapter": start}
    fields |= {"validation_every": 4}
    whole = llm.finetune(job_config("pairs-whole", rows, **fields)).wait(60)
    assert whole.status == "succeeded", whole.reason
    runs = Path(llm.config.output_dir)
    # What a kill behind step 4 leaves.
    checkpoints = runs / "pairs-killed" / "checkpoints"
    shutil.copytree(runs / "pairs-whole" / "checkpoints", checkpoints)
    for folder in checkpoints.glob("7*"):
        shutil.rmtree(folder)
    assert JobCheckpoints(checkpoints).steps() == [4]
    resumed = llm.finetune(job_config("pairs-killed", rows, resume=True, **fields)).wait(60)
    assert resumed.status == "succeeded", resumed.reason
    assert resumed._job.resumed_from == 4
    # As far as steps of several sizes are the same; references of the weights at step 4 are not.
    for mine, expected in zip(resumed.metrics, whole.metrics, strict=True):
        assert mine == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert [at for at, _ in resumed.validations] == [at for at, _ in whole.validations] == [4, 7]
    for (_, mine), (_, expected) in zip(resumed.validations, whole.validations, strict=True):
        assert mine == pytest.approx(expected, rel=1e-3, abs=1e-5)
    data = whole._job.source
    trained, validated = (rows_of(data, own) for own in (data.dataset, data.validation))
    assert resumed._job.forwarded == resumed._job.tokens + 2 * validated, "references scored again"
    assert whole._job.forwarded == whole._job.tokens + 3 * validated + trained
    assert trained < data.dataset.tokens, "prompts went through twice"
    ours, theirs = (
        load_file(j.adapter_dir / "adapter_model.safetensors") for j in (resumed, whole)
    )
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-4)

    other = write_rows(tmp_path / "other.jsonl", pair_rows(6, seed=4))
    with pytest.raises(ValueError, match="its rows are not those that were scored") as error:
        llm.finetune(job_config("pairs-whole", rows, resume=True, **fields | {"validation": other}))
    assert "\n" not in str(error.value)


def test_a_coefficient_that_is_not_finite_stops_the_job(llm, rows, start, monkeypatch):
    kept = []
    end = llm.engine.trainer._end

    def keep(job, status, reason):
        if status is JobStatus.FAILED:
            kept.append(jax.device_get(job.state["master"]))
        end(job, status, reason)

    monkeypatch.setattr(llm.engine.trainer, "_end", keep)
    config = job_config("endless", rows, method=IpoConfig(beta=1e-39), init_adapter=start)
    job = llm.finetune(config).wait(60)
    assert job.status == "failed" and "at step 1 is not finite" in job.reason
    assert "method ipo" in job.reason and "\n" not in job.reason
    (state,) = kept
    values, _ = to_row(job._job.adapter, llm.engine.runner.model, llm.engine.runner.sizes.bank, "")
    jax.tree.map(np.testing.assert_array_equal, state, jax.device_get(values))
