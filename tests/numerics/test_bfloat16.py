"""bfloat16: no worse than transformers' own bfloat16, both measured against float32."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flexllm_jax import SamplingParams
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import Datum, PackedMicrobatch
from flexllm_jax.peft.hf.peft import load_adapter
from tests.engines import (
    SEVEN,
    job_config,
    letter_rows,
    random_prompts,
    reference_logprobs,
    save_random_adapter,
    start_engine,
    write_rows,
)
from tests.numerics.test_losses import Given


@pytest.fixture(scope="module")
def half(llama, tmp_path_factory):
    engine = start_engine(
        llama,
        tmp_path_factory.mktemp("runs"),
        dtype="bfloat16",
        compile={"token_buckets": [48]},
    )
    yield engine
    engine.close()


def test_logits(half, llama, llama_reference):
    theirs = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).eval()
    ours_off, theirs_off = [], []
    params = SamplingParams(max_tokens=1, prompt_logprobs=20)
    for output in half.generate(random_prompts([40, 90, 13]), params):
        tokens = output.prompt_token_ids
        exact, rounded = (reference_logprobs(model, tokens) for model in (llama_reference, theirs))
        for i, logprobs in enumerate(output.prompt_logprobs[1:]):
            for token, value in logprobs.items():
                ours_off.append(value - exact[i, token])
                theirs_off.append(rounded[i, token] - exact[i, token])
    ours_off, theirs_off = (np.sqrt(np.mean(np.square(x))) for x in (ours_off, theirs_off))
    assert 0 < ours_off < 1.5 * theirs_off


def test_a_job_learns_as_in_float32(half, llm, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", letter_rows(30))
    jobs = [engine.finetune(job_config("half", rows, steps=20)).wait(120) for engine in (half, llm)]
    assert all(job.status == "succeeded" for job in jobs)
    np.testing.assert_allclose(jobs[0].losses, jobs[1].losses, rtol=0.05)
    assert np.mean(jobs[0].losses[-3:]) < 0.8 * np.mean(jobs[0].losses[:3])


@pytest.mark.parametrize("head", [False, True], ids=["layers", "layers and head"])
def test_logprobs_in_training_are_those_of_serving(llama, tmp_path, head):
    """In bfloat16 what differs is rounding alone, and LoRA on the head adds none."""
    modules = [*SEVEN, "lm_head"] if head else list(SEVEN)
    llm = start_engine(
        llama, tmp_path / "runs", dtype="bfloat16", adapter_bank={"target_modules": modules}
    )
    with llm:
        adapter = save_random_adapter(llama, tmp_path / "adapter", target_modules=modules)
        llm.load_adapter("served", adapter)
        params = SamplingParams(max_tokens=30, temperature=1.0, logprobs=0, ignore_eos=True)
        outputs = llm.generate(random_prompts([9, 30, 14, 22, 5, 41]), params, adapter="served")
        weight = [np.float32([0] * len(o.prompt_token_ids) + [1] * 30) for o in outputs]
        tokens = [np.int32([*o.prompt_token_ids, *o.outputs[0].token_ids]) for o in outputs]
        data = [Datum.following(t, w) for t, w in zip(tokens, weight, strict=True)]
        source = Given(*(PackedMicrobatch((d,), Loss.of(), backward=False) for d in data))
        start = load_adapter(adapter, llm.engine.runner.model, llama)
        rows = write_rows(tmp_path / "rows.jsonl", [{"text": "unused"}])
        config = job_config("scored", rows, steps=1)
        llm.start_job(FinetuneJob(config, start.config, start, source)).wait(60)
    differences = []
    for output, datum, (logprob,) in zip(outputs, data, source.logprobs, strict=True):
        sampled = [next(iter(one.values())) for one in output.outputs[0].logprobs]
        differences += (logprob[datum.label >= 0] - sampled).tolist()
    mean, largest = np.abs(differences).mean(), np.abs(differences).max()
    print(f"mean {mean:.2e}, largest {largest:.2e}")
    assert mean < 2e-3
    assert largest < 2e-2
