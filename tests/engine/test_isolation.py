"""Inference does not feel finetuning, and tenants do not feel each other (invariant 4)."""

import math

import numpy as np
import pytest

from flexllm_jax import SamplingParams
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.hf.peft import load_adapter
from scheduler.choice import Allowance
from tests.engines import (
    given_back,
    job_config,
    letter_rows,
    random_prompts,
    reference_greedy,
    save_random_adapter,
    write_rows,
)

PROMPTS = random_prompts([3, 17, 40, 65, 9, 28, 51, 12])
GREEDY = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=1)
DRAWN = SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, seed=5, logprobs=1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return [
        write_rows(folder / f"{seed}.jsonl", letter_rows(20, longest=80, seed=seed))
        for seed in range(2)
    ]


@pytest.fixture(scope="module")
def starts(llama, tmp_path_factory):
    """Two adapters to start from, of different ranks and modules."""
    folder = tmp_path_factory.mktemp("starts")
    save_random_adapter(llama, folder / "0", seed=0)
    save_random_adapter(llama, folder / "1", seed=1, r=7, target_modules=["q_proj", "down_proj"])
    return [folder / "0", folder / "1"]


def adapter_of(job, llama):
    return load_adapter(job.adapter_dir, ModelConfig.from_hf(llama), llama)


def assert_same_training(job, other, start, llama):
    """Losses and adapters equal, up to the rounding of steps that were cut differently."""
    np.testing.assert_allclose(job.losses, other.losses, rtol=1e-4)
    begin = load_adapter(start, ModelConfig.from_hf(llama), llama)
    one, two = adapter_of(job, llama), adapter_of(other, llama)
    for key, before in begin.weights.items():
        for name in ("a", "b"):
            moved = one.weights[key][name] - before[name]
            apart = one.weights[key][name] - two.weights[key][name]
            assert np.linalg.norm(moved) > 1e-3, (key, name)
            assert np.linalg.norm(apart) < 1e-3 * np.linalg.norm(moved), (key, name)


def run_alone(llm, name, rows, start, **fields):
    return llm.finetune(job_config(name, rows, init_adapter=start, **fields)).wait(120)


@pytest.fixture(scope="module")
def alone(llm, rows, starts):
    """Each tenant's job with the engine to itself."""
    with given_back():
        return [run_alone(llm, f"alone-{i}", rows[i], starts[i]) for i in range(2)]


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_inference_is_the_same_beside_finetuning(llm, params, rows, llama_reference):
    before = llm.generate(PROMPTS, params)
    job = llm.finetune(job_config(f"beside-{params.temperature}", rows[0], steps=500))
    while not job.steps:
        assert job.status == "running", job.reason
    steps = job.steps
    beside = llm.generate(PROMPTS, params)
    assert job.steps > steps, "no optimizer step fell within the requests: nothing is shown"
    job.cancel()
    for one, other in zip(before, beside, strict=True):
        assert one.token_ids == other.token_ids
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert a == pytest.approx(b, abs=1e-5)
    if params.temperature == 0:
        for prompt, output in zip(PROMPTS[:3], beside, strict=False):
            assert output.token_ids == reference_greedy(llama_reference, prompt, 40)


def test_a_job_in_other_token_buckets_trains_what_it_does_alone(
    llm, llama, rows, starts, alone, monkeypatch
):
    """Beside requests and never more than 8 tokens a step: matrix products of another shape add in
    another order. (In one bucket bits are the same: tests/numerics/test_gradients.py.)"""
    few = Allowance(math.inf, tokens=8)
    monkeypatch.setattr(llm.engine.scheduler.policy, "allowance", lambda step: few)
    futures = [future for prompt in PROMPTS for future in llm.submit(prompt, DRAWN)]
    job = run_alone(llm, "in-small-steps", rows[0], starts[0])
    for future in futures:
        future.result(60)
    assert job.status == "succeeded", job.reason
    assert_same_training(job, alone[0], starts[0], llama)


def test_two_jobs_at_once_train_what_each_trains_alone(llm, llama, rows, starts, alone):
    together = [
        llm.finetune(job_config(f"together-{i}", rows[i], init_adapter=starts[i])) for i in range(2)
    ]
    for i, job in enumerate(together):
        assert job.wait(120).status == "succeeded", job.reason
        assert_same_training(job, alone[i], starts[i], llama)
        llm.unload_adapter(job.name)
    assert min(t for job in together for t in job.step_times) < max(together[0].step_times)


@pytest.mark.parametrize("lr", [1e30, 1e15], ids=["weights overflow", "activations overflow"])
def test_a_job_that_diverges_fails_alone(llm, llama, rows, starts, alone, lr):
    # Batches of one microbatch, the good job's smaller: it comes right after the one that diverges.
    small = {"batch_tokens": 60, "steps": 20}
    expected = run_alone(llm, "expected", rows[1], starts[1], **small)
    llm.unload_adapter("expected")
    before = llm.generate(PROMPTS, GREEDY)
    good = llm.finetune(job_config("good", rows[1], init_adapter=starts[1], **small))
    fields = {"optimizer": {"lr": lr, "clip": None}, "batch_tokens": 90}
    bad = llm.finetune(job_config("bad", rows[0], init_adapter=starts[0], **fields))
    beside = llm.generate(PROMPTS, GREEDY)
    bad.wait(120)
    assert bad.status == "failed"
    assert bad.reason is not None
    assert "job 'bad' stopped" in bad.reason and "not finite" in bad.reason
    assert f"optimizer.lr ({lr})" in bad.reason
    assert "\n" not in bad.reason
    assert "bad" not in llm.adapters
    assert good.wait(120).status == "succeeded", good.reason
    assert_same_training(good, expected, starts[1], llama)
    after = llm.generate(PROMPTS, GREEDY)
    for one, *others in zip(before, beside, after, strict=True):
        assert all(one.token_ids == other.token_ids for other in others)
    again = run_alone(llm, "again", rows[0], starts[0])
    assert_same_training(again, alone[0], starts[0], llama)


def test_a_name_in_use_is_refused_and_the_running_job_keeps_its_slot(llm, llama, rows, starts):
    job = llm.finetune(job_config("twice", rows[0], steps=500))
    slot = llm.engine.adapters.directory.training["twice"]
    with pytest.raises(ValueError, match="'twice' is running already: use another name"):
        llm.finetune(job_config("twice", rows[1]))
    llm.load_adapter("visitor", starts[0])
    assert llm.engine.adapters.directory.current["visitor"].bank_slot != slot
    assert job.status == "running", job.reason
    job.cancel()
    assert job.wait(10).status == "cancelled"
