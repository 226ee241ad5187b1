"""What cannot be written costs that write alone: a job ends rightly once there is room."""

import time

import pytest
from safetensors import SafetensorError

from flexllm_jax.engine.jobs import writer as job_writer
from flexllm_jax.peft.hf.peft import load_adapter, save_adapter
from tests.engines import job_config, letter_rows, start_engine, write_rows


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", letter_rows(12))


@pytest.fixture
def writer(llm, monkeypatch):
    """The writer of an engine that tries again, soon and for long, as the server's does."""
    writer = llm.engine.trainer.writer
    monkeypatch.setattr(job_writer, "_AGAIN_S", 0.05)
    monkeypatch.setattr(writer, "keep_trying_s", 60.0)
    monkeypatch.setattr(writer, "on_checkpoint", writer.on_checkpoint)
    return writer


def blocked(llm, name):
    """A file where the folder of a job's adapter is to be."""
    folder = llm.config.output_dir / name / "adapter"
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    return folder


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_trained_job_waits_for_room(llm, writer, rows):
    folder = blocked(llm, "waiting")
    job = llm.finetune(job_config("waiting", rows, steps=3))
    until(lambda: any("it is tried again" in text for text in job.messages))
    time.sleep(0.3)
    assert job.status == "running"
    assert len([text for text in job.messages if "tried again" in text]) == 1  # told once
    folder.unlink()
    assert job.wait(60).status == "succeeded"
    load_adapter(folder, llm.engine.runner.model)


def test_one_that_waits_can_be_cancelled(llm, writer, rows):
    folder = blocked(llm, "cancelled")
    job = llm.finetune(job_config("cancelled", rows, steps=3))
    until(lambda: any("it is tried again" in text for text in job.messages))
    job.cancel()
    assert job.status == "cancelled"
    folder.unlink()
    time.sleep(0.3)
    assert not folder.exists()


def block_weights(folder):
    """Make safetensors fail with an error of its own, which is no OSError."""
    (folder / "adapter_model.safetensors.part").mkdir(parents=True, exist_ok=True)
    return folder


def exporting(engine, folder):
    """What the server does with checkpoints."""
    return lambda job, step, adapter: save_adapter(adapter, engine.runner.model, "base", folder)


def test_errors_of_safetensors_cost_one_write(llm, writer, rows, tmp_path):
    folder = block_weights(tmp_path / "step")
    writer.on_checkpoint = exporting(llm.engine, folder)
    job = llm.finetune(job_config("checkpoints", rows, steps=6)).wait(60)
    assert job.status == "succeeded"
    assert any("the adapter of step 4 could not be written" in text for text in job.messages)
    with pytest.raises(SafetensorError):
        writer.on_checkpoint(job, 1, load_adapter(job.adapter_dir, llm.engine.runner.model))
    (folder / "adapter_model.safetensors.part").rmdir()
    assert llm.finetune(job_config("more", rows, steps=6)).wait(60).status == "succeeded"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_they_cost_nothing_else_when_the_engine_stops(llama, rows, tmp_path):
    llm = start_engine(llama, tmp_path)
    engine = llm.engine
    engine.trainer.writer.on_checkpoint = exporting(engine, block_weights(tmp_path / "step"))
    jobs = [llm.finetune(job_config(name, rows, steps=5000)) for name in ("one", "two")]
    until(lambda: all(job.steps > 2 for job in jobs))
    llm.close()
    for job in jobs:
        assert job.status == "cancelled" and "the engine was stopped" in job.reason
        assert any("could not be written" in text for text in job.messages)
        steps = [path.name for path in (tmp_path / job.name / "checkpoints").iterdir()]
        assert str(job.steps) in steps
