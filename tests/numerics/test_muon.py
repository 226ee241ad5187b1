"""A job with Muon: its adapter is what optax's Muon makes of each factor of each layer alone, of
its own rank, from the same gradients; and a job that goes on from a checkpoint ends with the same.
"""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from flexllm_jax.finetune.checkpoint import CheckpointError
from flexllm_jax.finetune.optimizer import learning_rate
from flexllm_jax.peft.adapter import AdapterError
from flexllm_jax.peft.hf.peft import load_adapter
from tests.checkpoints import make_llama, save_tokenizer
from tests.engines import (
    job_config,
    letter_rows,
    save_random_adapter,
    start_engine,
    write_rows,
)

STEPS, RANK, BANK_RANK = 4, 3, 8
MUON = {"type": "muon", "lr": 2e-2, "schedule": "linear", "clip": 0.4, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """An engine with Muon, and a random adapter of it whose rank is below the bank's."""
    folder = tmp_path_factory.mktemp("muon")
    path = save_tokenizer(make_llama(folder / "model", vocab=272))
    llm = start_engine(
        path,
        folder / "runs",
        adapter_bank={"max_rank": BANK_RANK},
        finetune={"optimizers": ("muon",), "unit_tokens": 16, "checkpoint_every": 2},
    )
    adapter = save_random_adapter(path, folder / "adapter", r=RANK, lora_alpha=5)
    rows = write_rows(folder / "rows.jsonl", letter_rows(30))
    yield llm, path, adapter, rows
    llm.close()


def train(case, monkeypatch, name, *, steps=STEPS, resume=False, optimizer=None):
    """A job, and for each of its steps the gradient by layer times its scale."""
    llm, _, adapter, rows = case
    runner, seen = llm.engine.runner, []
    step = runner.optimizer_step

    def spy(state, slot, ranks, values, *rest):
        scale = float(values[-1])
        gradients = jax.tree.map(lambda g: np.array(g) * scale, state["gradients"])
        seen.append(runner.sizes.stacks.by_layer(gradients))
        return step(state, slot, ranks, values, *rest)

    monkeypatch.setattr(runner, "optimizer_step", spy)
    fields = {"steps": steps, "seed": 1, "batch_tokens": 200, "init_adapter": adapter}
    fields["resume"] = resume
    job = llm.finetune(job_config(name, rows, optimizer=MUON | (optimizer or {}), **fields)).wait(
        60
    )
    monkeypatch.undo()
    assert job.status == "succeeded", job.reason
    return job, seen


def weights_of(case, folder):
    llm, path, *_ = case
    return load_adapter(folder, llm.engine.runner.model, path).weights


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_a_job_is_optax_of_each_factor_alone(case, monkeypatch, ratio):
    job, gradients = train(case, monkeypatch, f"muon-{ratio}", optimizer={"b_lr_ratio": ratio})
    llm, _, start, _ = case
    config = job._job.config.optimizer
    trained, weights = weights_of(case, job.adapter_dir), {}
    norms = [optax.global_norm(jax.tree.leaves(own)) for own in gradients]
    assert job._job.gradient_norms == pytest.approx([float(norm) for norm in norms], rel=1e-5)
    assert max(norms) > MUON["clip"], "nothing is clipped"
    for (layer, module), factors in weights_of(case, start).items():
        for name, own in factors.items():
            rate, state = 0.0, None
            for step, (found, norm) in enumerate(zip(gradients, norms, strict=True)):
                rate = learning_rate(config, step, STEPS) * (ratio if name == "b" else 1.0)
                muon = optax.contrib.muon(
                    rate, beta=0.95, weight_decay=MUON["weight_decay"], consistent_rms=0.2
                )
                state = muon.init(own) if state is None else state
                gradient = found[layer][module][name]
                gradient = gradient[:, :RANK] if name == "a" else gradient[:RANK]
                gradient = gradient * min(1.0, MUON["clip"] / norm)
                updates, state = muon.update(gradient, state, own)
                own = own + updates
            weights[layer, module, name] = own
            np.testing.assert_allclose(trained[layer, module][name], own, rtol=0, atol=2e-5)
    before = weights_of(case, start)
    moved = [np.abs(w - before[i, m][n]).max() for (i, m, n), w in weights.items()]
    assert min(moved) > 1e-2
    llm.unload_adapter(f"muon-{ratio}")


def test_a_resumed_job_is_an_undisturbed_one(case, monkeypatch):
    options: Any = {"optimizer": {"schedule": "constant"}}
    whole, _ = train(case, monkeypatch, "whole", **options)
    train(case, monkeypatch, "halved", steps=2, **options)
    halved, seen = train(case, monkeypatch, "halved", resume=True, **options)
    assert halved._job.resumed_from == 2 and len(seen) == 2
    mine, theirs = (weights_of(case, job.adapter_dir) for job in (halved, whole))
    for site, factors in theirs.items():
        for name, own in factors.items():
            np.testing.assert_allclose(mine[site][name], own, rtol=0, atol=1e-6)


def test_another_optimizer_goes_on_from_no_checkpoint_of_muon(case, monkeypatch):
    train(case, monkeypatch, "other", steps=2)
    with pytest.raises((CheckpointError, ValueError), match=r"optimizer\.type='muon'") as error:
        train(case, monkeypatch, "other", resume=True, optimizer={"type": "adamw"})
    assert "\n" not in str(error.value)


def test_what_cannot_have_muon_is_told(case, llm, tmp_path):
    own, *_, rows = case
    muon = {"optimizer": {"type": "muon"}}
    with pytest.raises(ValueError, match=r"add it to finetune\.optimizers") as error:
        llm.finetune(job_config("no-program", rows, **muon))
    assert "\n" not in str(error.value)
    with pytest.raises(AdapterError, match="kind ia3 has none; use adamw"):
        own.finetune(job_config("no-factors", rows, peft={"type": "ia3"}, **muon))
