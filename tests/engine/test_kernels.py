"""The whole engine with the Pallas kernels, interpreted, beside the same engine with XLA's."""

import numpy as np
import pytest

from flexllm_jax import SamplingParams
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.hf.peft import load_adapter
from tests.engines import (
    job_config,
    letter_rows,
    random_prompts,
    save_random_adapter,
    start_engine,
    write_rows,
)

SIZES = {
    "max_model_len": 64,
    "cache": {"num_pages": 24},
    "scheduler": {"max_tokens_per_step": 24, "max_sequences": 3},
    "finetune": {"max_tokens": 40, "unit_tokens": 20},
    "compile": {"token_buckets": [24]},
    "adapter_bank": {"slots": 4},
}
SAMPLING = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=1)


def coserve(llama, folder, kernels: str, adapter, rows):
    """Requests to the base model and to an adapter beside a job that goes on from that adapter."""
    with_kernels = start_engine(llama, folder / kernels, kernels=kernels, **SIZES)
    with with_kernels as llm:
        llm.load_adapter("served", adapter)
        job = llm.finetune(
            job_config("tuned", rows, init_adapter=adapter, steps=2, batch_tokens=60)
        )
        prompts = random_prompts([3, 17, 30])
        outputs = llm.generate(prompts, SAMPLING)
        outputs += llm.generate(prompts, SAMPLING, adapter="served")
        job.wait(300)
        tuned = load_adapter(job.adapter_dir, ModelConfig.from_hf(llama), llama)
        return llm.engine.runner.sizes.backend, outputs, job.losses, tuned


def test_pallas_gives_the_tokens_and_gradients_of_xla(llama, tmp_path):
    adapter = save_random_adapter(llama, tmp_path / "adapter")
    rows = write_rows(tmp_path / "rows.jsonl", letter_rows(6, longest=24))
    runs = [coserve(llama, tmp_path, kernels, adapter, rows) for kernels in ("xla", "pallas")]
    (xla, outputs, losses, tuned), (pallas, other_outputs, other_losses, other_tuned) = runs
    assert (xla.implementation, pallas.implementation) == ("xla", "pallas")
    assert pallas.interpret
    for one, two in zip(outputs, other_outputs, strict=True):
        assert one.token_ids == two.token_ids
        for mine, theirs in zip(one.logprobs, two.logprobs, strict=True):
            assert mine.keys() == theirs.keys()
            assert list(mine.values()) == pytest.approx(list(theirs.values()), abs=1e-4)
    np.testing.assert_allclose(losses, other_losses, rtol=1e-5)
    before = load_adapter(adapter, ModelConfig.from_hf(llama), llama)
    for key, start in before.weights.items():
        for name in ("a", "b"):
            end = tuned.weights[key][name]
            moved = end - start[name]
            apart = end - other_tuned.weights[key][name]
            assert np.linalg.norm(moved) > 1e-3, (key, name)
            assert np.linalg.norm(apart) < 1e-3 * np.linalg.norm(moved), (key, name)
