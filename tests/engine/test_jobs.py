"""Jobs from outside: validation, progress, publishing, cancelling, and real data."""

from pathlib import Path

import numpy as np
import pytest

from flexllm_jax import SamplingParams
from flexllm_jax.peft.adapter import AdapterError
from tests.engines import (
    job_config,
    letter_rows,
    load_with_adapter,
    random_prompts,
    reference_greedy,
    reference_logprobs,
    write_rows,
)

GSM8K = Path(__file__).resolve().parents[2] / "../shared/data/sft_gsm8k_1500.jsonl"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", letter_rows(20))


def mean_loss(model, sequences):
    """Cross-entropy per label, by transformers."""
    losses = []
    for sequence in sequences:
        logprobs = reference_logprobs(model, sequence.tokens.tolist())
        at = np.flatnonzero(sequence.loss_mask)
        losses += list(-logprobs[at - 1, sequence.tokens[at]])
    return np.mean(losses)


def test_validation_measures_without_training(llm, llama, llama_reference, rows, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", letter_rows(9, seed=77))
    fields = {"steps": 5, "seed": 2}
    config = job_config("validated", rows, validation=held_out, validation_every=2, **fields)
    job = llm.finetune(config).wait(60)
    assert job.status == "succeeded", job.reason
    assert [step for step, _ in job.validation_losses] == [2, 4, 5]
    assert len(job._job.validation) == 9
    model = load_with_adapter(llama, job.adapter_dir)
    expected = mean_loss(model, job._job.validation.sequences)
    assert job.validation_losses[-1][1] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(mean_loss(llama_reference, job._job.validation.sequences))
    plain = llm.finetune(job_config("plain", rows, **fields)).wait(60)
    assert plain.losses == pytest.approx(job.losses, rel=1e-5)


def test_progress(llm, rows):
    job = llm.finetune(job_config("progress", rows, steps=None, epochs=2))
    total = job.total_steps
    assert total > 2
    job.wait(60)
    assert (job.status, job.steps, len(job.losses)) == ("succeeded", total, total)
    assert job._job.tokens == 2 * job._job.dataset.tokens
    assert job.tokens_per_s > 0
    assert job.step_times == sorted(job.step_times)


def test_publishing_while_training_serves_what_is_learnt_so_far(llm, llama, rows, tmp_path):
    job = llm.finetune(job_config("early", rows, steps=2000))
    with pytest.raises(AdapterError, match="'early' is not loaded"):
        llm.generate([[5, 6]], adapter="early")
    while job.steps < 5:
        assert job.status == "running", job.reason
    first = job.publish()
    llm.export_adapter("early", tmp_path / "first")
    prompts = random_prompts([20, 45], seed=6)
    params = SamplingParams(max_tokens=15, ignore_eos=True)
    served = llm.generate(prompts, params, adapter="early")
    model = load_with_adapter(llama, tmp_path / "first")
    for prompt, output in zip(prompts, served, strict=True):
        assert output.token_ids == reference_greedy(model, prompt, 15)
    assert job.publish() == first + 1
    job.cancel()
    assert job.wait(10).status == "cancelled"
    assert job.losses, "the losses so far stay"


def test_real_questions_and_answers(llm, tmp_path):
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K.name} is not at hand")
    some = tmp_path / "gsm8k.jsonl"
    some.write_text("".join(GSM8K.read_text().splitlines(keepends=True)[:60]))
    config = job_config("gsm8k", some, steps=25, max_seq_len=96, batch_tokens=300, train_on="all")
    job = llm.finetune(config)
    outputs = llm.generate(["Natalia sold clips to", "How many"], SamplingParams(max_tokens=20))
    assert all(len(output.token_ids) <= 20 and output.text for output in outputs)
    assert job.wait(120).status == "succeeded", job.reason
    assert len(job._job.dataset) == 60
    assert np.mean(job.losses[-3:]) < 0.85 * job.losses[0]
