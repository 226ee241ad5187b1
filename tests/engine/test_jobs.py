"""Jobs from outside: validation, progress, publishing, cancelling, and real data."""

import shutil
import time
from pathlib import Path

import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from flexllm_jax import SamplingParams
from flexllm_jax.finetune.checkpoint import CheckpointError, JobCheckpoints
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.peft.adapter import AdapterError
from tests.engines import (
    SHORT,
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
    assert len(job._job.source.validation) == 9
    model = load_with_adapter(llama, job.adapter_dir)
    expected = mean_loss(model, job._job.source.validation.sequences)
    assert job.validation_losses[-1][1] == pytest.approx(expected, rel=1e-4)
    assert expected != pytest.approx(
        mean_loss(llama_reference, job._job.source.validation.sequences)
    )
    plain = llm.finetune(job_config("plain", rows, **fields)).wait(60)
    assert plain.losses == pytest.approx(job.losses, rel=1e-5)


def test_checkpoints_are_by_layer_and_as_optax_has_them(llm, rows):
    """Earlier versions wrote them so, and go on from them; on the device layers are stacked."""
    job = llm.finetune(job_config("by-layer", rows, steps=2)).wait(60)
    runner = llm.engine.runner
    master = [
        {
            site: {name: np.zeros(shape, np.float32) for name, shape in own.items()}
            for site, own in layer.items()
        }
        for layer in runner.sizes.bank.by_layer(runner.model)
    ]
    optimizer = optax.chain(optax.identity(), optax.adamw(1e-3)).init(master)
    folder = Path(llm.config.output_dir) / "by-layer" / "checkpoints"
    saved = JobCheckpoints(folder).restore_latest({"master": master, "optimizer": optimizer})
    assert saved and saved.step == 2
    for name, tensor in load_file(job.adapter_dir / "adapter_model.safetensors").items():
        parts = name.split(".layers.")[1].split(".")
        layer, module, factor = int(parts[0]), SHORT[parts[2]], parts[3][-1].lower()
        kept = saved.arrays["master"][layer][module][factor].T
        np.testing.assert_array_equal(kept[: tensor.shape[0], : tensor.shape[1]], tensor)
    llm.unload_adapter("by-layer")


def test_progress(llm, rows):
    job = llm.finetune(job_config("progress", rows, steps=None, epochs=2))
    total = job.total_steps
    assert total > 2
    job.wait(60)
    assert (job.status, job.steps, len(job.losses)) == ("succeeded", total, total)
    assert job._job.tokens == 2 * job._job.source.dataset.tokens
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


class TestWhatAnEndPromises:
    """It is on disk when `wait` comes back, however slow the disk: who copies it then has all."""

    @pytest.fixture(autouse=True)
    def slow_disk(self, monkeypatch):
        save = JobCheckpoints.save

        def slow(self, *arguments):
            time.sleep(0.2)
            save(self, *arguments)

        monkeypatch.setattr(JobCheckpoints, "save", slow)

    def copied(self, llm, job, name):
        """The steps of the checkpoints in a copy of the job's folder, under another name."""
        runs = Path(llm.config.output_dir)
        shutil.copytree(runs / job.name, runs / name)
        return JobCheckpoints(runs / name / "checkpoints").steps()

    def test_success(self, llm, llama, rows):
        job = llm.finetune(job_config("promised", rows, steps=6)).wait(60)
        assert job.status == "succeeded", job.reason
        assert self.copied(llm, job, "copied") == [4, 6]
        load_with_adapter(llama, Path(llm.config.output_dir) / "copied" / "adapter")
        more = llm.finetune(job_config("copied", rows, steps=9, resume=True)).wait(60)
        assert (more._job.resumed_from, more.steps) == (6, 9)
        whole = llm.finetune(job_config("never", rows, steps=9)).wait(60)
        assert more.losses[6:] != whole.losses[6:], "the rate of the first 6 steps fell to 0"
        assert more.losses[0] == whole.losses[0]
        for name in ("promised", "copied", "never"):
            llm.unload_adapter(name)

    def test_cancel(self, llm, rows):
        job = llm.finetune(job_config("dropped", rows, steps=5000))
        while job.steps < 4:
            assert job.status == "running", job.reason
        job.cancel()
        assert job.status == "cancelled"
        steps = self.copied(llm, job, "dropped copy")
        assert steps and steps[-1] == job.steps // 4 * 4

    def test_failure(self, llm, rows, monkeypatch):
        done = FinetuneJob.step_done

        def diverging(job, metrics, tokens):
            return done(job, metrics | ({"loss": float("nan")} if job.step == 4 else {}), tokens)

        monkeypatch.setattr(FinetuneJob, "step_done", diverging)
        job = llm.finetune(job_config("diverged", rows, steps=9)).wait(60)
        assert job.status == "failed" and "loss nan at step 5 is not finite" in job.reason
        assert self.copied(llm, job, "diverged copy") == [4]

    def test_its_name_is_taken_until_then(self, llm, rows):
        job = llm.finetune(job_config("again", rows, steps=2))
        while not job._job.closed:
            time.sleep(0.001)
        with pytest.raises(ValueError, match="job 'again' is still being written"):
            llm.finetune(job_config("again", rows, steps=2))
        with pytest.raises(ValueError, match="job 'again' has ended"):
            job.publish()
        assert job.wait(60).status == "succeeded"
        llm.unload_adapter("again")


class TestResuming:
    def test_another_adapter_is_refused_by_the_fields_name(self, llm, rows):
        llm.finetune(job_config("first", rows, steps=2)).wait(60)
        llm.unload_adapter("first")
        config = job_config("first", rows, steps=4, resume=True, peft={"r": 8, "alpha": 8.0})
        with pytest.raises(CheckpointError, match=r"peft\.r=4 \(now 8\)") as error:
            llm.finetune(config)
        assert "\n" not in str(error.value)
        assert "first" not in llm.engine.adapters.directory.training

    def test_other_batches_take_the_rest_of_the_data(self, llm, rows):
        fields = {"steps": None, "epochs": 2}
        first = llm.finetune(job_config("cut", rows, batch_tokens=60, **fields | {"epochs": 1}))
        first.wait(60)
        llm.unload_adapter("cut")
        job = llm.finetune(job_config("cut", rows, batch_tokens=200, resume=True, **fields))
        assert job.wait(60).status == "succeeded"
        assert job.tokens == first.tokens == job._job.source.dataset.tokens
        assert first.steps < job.steps == job.total_steps < 2 * first.steps
        llm.unload_adapter("cut")


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
    assert len(job._job.source.dataset) == 60
    assert np.mean(job.losses[-3:]) < 0.85 * job.losses[0]
