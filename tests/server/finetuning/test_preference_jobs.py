"""Preference jobs through the unmodified openai SDK: how they are asked for, what is told of them,
what is refused."""

import csv
import io
import json
import math

import openai
import pytest

from tests.engine.test_preference_jobs import pair_rows
from tests.server.finetuning.test_jobs import LORA, upload, wait


def upload_pairs(client, count=24, seed=0, bad=()):
    rows = [json.dumps(row) for row in [*pair_rows(count, seed), *bad]]
    data = ("pairs.jsonl", "\n".join(rows).encode())
    return client.files.create(file=data, purpose="fine-tune").id


def create(client, file_id, method, **fields):
    extra = LORA | {"batch_tokens": 200} | fields.pop("extra", {})
    return client.fine_tuning.jobs.create(
        model="tiny", training_file=file_id, seed=3, method=method, extra_body=extra, **fields
    )


def test_a_dpo_job_from_upload_to_its_metrics(client):
    same = {"prompt": "ab", "chosen": "A", "rejected": "A"}
    training = upload_pairs(client, bad=[{"prompt": "ab", "chosen": "A"}, same])
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2}}}
    validation = upload_pairs(client, 6, seed=1)
    job = create(client, training, method, validation_file=validation)
    assert job.method.type == "dpo" and job.method.dpo.hyperparameters.beta == 0.2
    job = wait(client, job, "succeeded")
    assert job.method.type == "dpo" and job.method.supervised is None
    hyperparameters = job.method.dpo.hyperparameters
    assert (hyperparameters.beta, hyperparameters.n_epochs) == (0.2, 2)

    events = list(client.fine_tuning.jobs.list_events(job.id))[::-1]
    skipped = {e.data["line"]: e.data["reason"] for e in events if e.data and "line" in e.data}
    assert skipped.keys() == {25, 26}
    assert "no field `rejected`" in skipped[25] and "answers are the same" in skipped[26]
    steps = [e.data for e in events if e.type == "metrics" and "train_loss" in e.data]
    names = ("accuracy", "margin", "reward_preferred", "reward_rejected")
    assert steps[0]["train_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(steps[0]["train_margin"]) < 1e-5
    for data in steps:
        rewards = data["train_reward_preferred"] - data["train_reward_rejected"]
        assert data["train_margin"] == pytest.approx(rewards, abs=1e-6)
    assert steps[-1]["train_margin"] > 0.01
    (validated,) = [e.data for e in events if e.type == "metrics" and "valid_loss" in e.data]
    assert {f"valid_{name}" for name in names} <= validated.keys()

    last = next(iter(client.fine_tuning.jobs.checkpoints.list(job.id)))
    measured = next(data for data in steps if data["step"] == last.step_number)
    assert last.metrics.model_dump()["train_accuracy"] == measured["train_accuracy"]
    content = client.files.content(job.result_files[0]).read().decode()
    rows = list(csv.DictReader(io.StringIO(content)))
    assert {f"train_{name}" for name in names} < rows[0].keys()
    assert float(rows[-1]["valid_margin"]) == validated["valid_margin"]


@pytest.mark.parametrize(("kind", "expected"), [("dpo", 0.1), ("simpo", 2.0)], ids=["dpo", "simpo"])
def test_beta_is_chosen_by_default(client, kind, expected):
    method = {"type": kind, kind: {"hyperparameters": {"beta": "auto", "n_epochs": 1}}}
    job = wait(client, create(client, upload_pairs(client, 4), method), "succeeded")
    shown = job.model_dump()["method"]
    assert shown["type"] == kind and shown[kind]["hyperparameters"]["beta"] == expected


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"type": "reinforcement"}, "reinforcement is missing, with the grader"),
        ({"type": "ppo"}, "'supervised', 'dpo'"),
        ({"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}, "beta"),
        ({"type": "dpo", "dpo": {"hyperparameters": {"beta": -1}}}, "greater than 0"),
        ({"type": "dpo", "supervised": {}}, "supervised is given, and type is dpo"),
        ({"type": "dpo", "dpo": {"hyperparameters": {"gamma": 1}}}, "gamma"),
    ],
)
def test_what_is_no_method_is_refused_by_name(client, method, says):
    with pytest.raises(openai.BadRequestError) as error:
        create(client, "file-absent", method)
    assert says in error.value.message and "\n" not in error.value.message


def test_everything_cannot_be_trained_on(client):
    with pytest.raises(openai.BadRequestError, match="train_on: all is not for method dpo"):
        create(client, "file-absent", {"type": "dpo"}, extra={"train_on": "all"})


def failed(client, job):
    while (now := client.fine_tuning.jobs.retrieve(job.id)).status != "failed":
        assert now.status in ("validating_files", "queued"), now
    return now.error


def test_rows_of_the_other_kind_fail_the_job_in_one_line(client):
    pairs, single = upload_pairs(client, 4), upload(client)
    error = failed(client, create(client, pairs, {"type": "supervised"}))
    assert error.code == "invalid_training_file" and "\n" not in error.message
    assert f"{pairs}: preference rows are pairs of answers" in error.message
    error = failed(client, create(client, single, {"type": "dpo"}))
    assert f"{single}: prompt_completion rows have one answer each" in error.message
    assert "\n" not in error.message
