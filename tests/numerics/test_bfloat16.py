"""bfloat16: no worse than transformers' own bfloat16, both measured against float32."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flexllm_jax import SamplingParams
from tests.engines import (
    job_config,
    letter_rows,
    random_prompts,
    reference_logprobs,
    start_engine,
    write_rows,
)


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
