"""Jobs over HTTP are tracked: what the trackers' own readers find is what the events say."""

import importlib.util
import json
import os
import signal
import time

import openai
import pytest

from tests.engines import letter_rows
from tests.server.finetuning.test_jobs import create, upload
from tests.server.running import RunningServer, make_config
from tests.trackers.readers import read_tensorboard, read_wandb

WANDB = importlib.util.find_spec("wandb") is not None  # it is in the extra test-clients
WANTED = {"project": "letters", "name": "mine", "entity": None, "tags": ["a", "b"]}


def events_of(client, job):
    return list(client.fine_tuning.jobs.list_events(job.id, limit=1000))


def measured(client, job, name):
    """By step, from events."""
    found = {e.data["step"]: e.data[name] for e in events_of(client, job) if name in (e.data or {})}
    return sorted(found.items())


def test_an_integration_that_is_not_configured_is_refused(client):
    file = upload(client)
    wanted = [{"type": "wandb", "wandb": WANTED}]
    with pytest.raises(openai.BadRequestError, match=r"integrations: .*trackers\.wandb") as error:
        create(client, file, integrations=wanted)
    assert error.value.param == "integrations"
    for wrong, match in (
        ([{"type": "mlflow", "mlflow": {}}], r"integrations\.0\.type"),
        ([{"type": "wandb", "wandb": {"name": "x"}}], r"integrations\.0\.wandb\.project"),
        ([{"type": "wandb"}], r"integrations\.0\.wandb"),
        (wanted * 2, "integrations"),
    ):
        with pytest.raises(openai.BadRequestError, match=match):
            create(client, file, integrations=wrong)


def test_a_job_is_tracked_over_a_kill_of_the_server(chat_llama, tmp_path, monkeypatch):
    """Two starts of a server: the second goes on with the job and with its runs."""
    pytest.importorskip("tensorboard", reason="tensorboard is in the extra test")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # that of other tests
    trackers = {"tensorboard": {}, "samples": 2, "sample_tokens": 5}
    fields = {}
    if WANDB:
        trackers["wandb"] = {"project": "of the operator", "mode": "offline"}
        fields["integrations"] = [{"type": "wandb", "wandb": WANTED}]
    config = make_config(chat_llama, tmp_path, trackers=trackers)
    with RunningServer(config) as server:
        client = server.wait_ready().client()
        files = {"validation_file": upload(client, count=5, seed=9)}
        job = create(client, upload(client), extra={"max_steps": 60}, **files, **fields)
        assert [one.to_dict() for one in job.integrations or []] == fields.get("integrations", [])
        folder = tmp_path / "tensorboard" / job.id
        server.wait(lambda: folder.exists() and read_tensorboard(folder)[0].get("train/loss"))
        engine = server.engine_pid
        server.process.kill()
        server.process.wait()
        os.kill(engine, signal.SIGKILL)
    with RunningServer(config) as server:
        client = server.wait_ready().client()
        end = time.monotonic() + 60
        while client.fine_tuning.jobs.retrieve(job.id).status != "succeeded":
            assert time.monotonic() < end, server.output
            time.sleep(0.1)
        server.wait(lambda: read_tensorboard(folder)[1].get("samples"))
        names = ("train_loss", "train_gradient_norm", "valid_loss")
        told, norms, validated = (measured(client, job, name) for name in names)
        events = [event.message for event in events_of(client, job)]
        assert server.stop() == 0
    assert [step for step, _ in told] == list(range(1, 61))
    scalars, texts = read_tensorboard(folder)
    assert len(list(folder.glob("events*"))) == 2
    for series, wanted in (
        ("train/loss", told),
        ("train/gradient_norm", norms),
        ("validation/loss", validated),
    ):
        assert [step for step, _ in scalars[series]] == [step for step, _ in wanted]
        values = [value for _, value in wanted]
        assert [value for _, value in scalars[series]] == pytest.approx(values, rel=1e-6)
    assert json.loads(texts["configuration"].strip("`"))["optimizer"]["lr"] == 1e-2
    held_out = letter_rows(5, seed=9)
    _, _, *samples = texts["samples"].splitlines()
    for row, sample in zip(held_out, samples, strict=False):
        assert sample.startswith(f"| {row['prompt']} | {row['completion']}</s> | ")
    assert events.count(f"Tracked by tensorboard: run {job.id}") == 1
    if WANDB:
        runs, series = read_wandb(tmp_path / "wandb")
        assert {(run.run_id, run.project, run.display_name) for run in runs} == {
            (job.id, "letters", "mine")
        }
        assert series["train/loss"] == told
        assert events.count(f"Tracked by wandb: run {job.id}") == 1
