"""Finetuning through the unmodified openai SDK: files, jobs, events, checkpoints, adapters."""

import contextlib
import csv
import io
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import openai
import pytest
from transformers import AutoTokenizer

from flexllm_jax import FinetuneConfig
from flexllm_jax.config import Config
from flexllm_jax.server.finetuning.schema import CreateJob
from flexllm_jax.server.http.errors import ApiError
from tests.engines import letter_rows, load_with_adapter, random_prompts, reference_greedy
from tests.server.running import KEY

PROMPT = random_prompts([12])[0]
LORA = {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2, "batch_tokens": 150}
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def rows_file(count=20, seed=0, bad=()):
    lines = [json.dumps(row) for row in letter_rows(count, seed=seed)]
    for line, text in bad:
        lines.insert(line - 1, text)
    return ("rows.jsonl", ("\n".join(lines) + "\n").encode())


def upload(client, **rows):
    return client.files.create(file=rows_file(**rows), purpose="fine-tune").id


def wait(client, job, *statuses, timeout_s=60):
    end = time.monotonic() + timeout_s
    while (now := client.fine_tuning.jobs.retrieve(job.id)).status not in statuses:
        assert time.monotonic() < end and now.status not in ("failed", "succeeded"), now.error
        time.sleep(0.05)
    return now


def create(client, file_id, **fields):
    extra = LORA | fields.pop("extra", {})
    return client.fine_tuning.jobs.create(
        model="tiny", training_file=file_id, seed=3, extra_body=extra, **fields
    )


def test_files_are_kept_listed_read_and_deleted(client):
    name, data = rows_file()
    file = client.files.create(file=(name, data), purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose) == (name, len(data), "fine-tune")
    assert file.id in [f.id for f in client.files.list()]
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == data
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


@pytest.mark.parametrize("file_id", ["file-absent", "..%2f..%2fserver.sqlite", "..", "a/b"])
def test_only_files_that_exist_are_shown(server, file_id):
    assert server.get(f"/v1/files/{file_id}/content", KEY)[0] == 404


def test_bad_uploads_are_refused_and_leave_nothing(server, client):
    def files():
        return sorted(Path(server.output_dir, "server", "files").iterdir())

    before = files()
    large = ("rows.jsonl", b"x" * 200_001)
    with pytest.raises(openai.APIStatusError, match="larger than") as error:
        client.files.create(file=large, purpose="fine-tune")
    assert error.value.status_code == 413
    with pytest.raises(openai.BadRequestError, match="is empty"):
        client.files.create(file=("rows.jsonl", b""), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=rows_file(), purpose="assistants")
    form = "multipart/form-data; boundary=x"
    for body, kind in (
        (b"not a form", form),
        (b"--x\r\nnonsense", form),
        (b"{}", "application/json"),
    ):
        status, _, answer = server.post("/v1/files", body, **{"Content-Type": kind})
        assert status == 400, answer
        assert json.loads(answer)["error"]["message"]
    assert files() == before


def test_many_uploads_at_once(client):
    _, data = rows_file(count=200)
    with ThreadPoolExecutor(60) as pool:
        ask = partial(client.files.create, purpose="fine-tune")
        files = list(pool.map(lambda i: ask(file=(f"{i}.jsonl", data)), range(120)))
    assert len({file.id for file in files}) == 120
    assert {client.files.content(file.id).read() for file in files[:3]} == {data}
    for file in files:
        client.files.delete(file.id)


@pytest.fixture(scope="module")
def trained(client):
    """A whole job: an upload with two bad rows, validation, training to the end."""
    training = upload(client, bad=[(3, '{"prompt": 5, "completion": "x"}'), (7, "{not json")])
    validation = upload(client, seed=1)
    job = create(
        client,
        training,
        validation_file=validation,
        suffix="mine",
        metadata={"owner": "tests"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        extra={"learning_rate": 2e-3, "lora_init": "olora", "b_lr_ratio": 2},
    )
    assert job.status in ("validating_files", "queued", "running")
    return wait(client, job, "succeeded")


def expected_text(client, llama, name, count):
    """What peft says with the adapter that the server says it serves as `name`."""
    reference = load_with_adapter(llama, client.models.retrieve(name).root)
    tokens = reference_greedy(reference, PROMPT, count)
    return AutoTokenizer.from_pretrained(llama).decode(tokens, skip_special_tokens=True)


def test_a_job_runs_to_a_served_adapter(client, trained, llama):
    short = trained.id.removeprefix("ftjob-")
    assert trained.fine_tuned_model == f"ft:tiny:org:mine:{short}"
    assert trained.organization_id == "org"
    assert trained.seed == 3
    assert trained.metadata == {"owner": "tests"}
    assert trained.hyperparameters.n_epochs == 2
    assert trained.trained_tokens > 0 and trained.finished_at >= trained.created_at
    assert trained.fine_tuned_model in [model.id for model in client.models.list()]
    name = trained.fine_tuned_model
    answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=10, **GREEDY)
    assert answer.choices[0].text == expected_text(client, llama, name, 10)


def test_its_losses_are_those_of_the_python_api(client, trained, llm, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows_file()[1])
    config = FinetuneConfig(
        name="same",
        dataset=path,
        peft={"r": 4, "alpha": 8.0, "init": "olora"},
        optimizer={"lr": 2e-3, "b_lr_ratio": 2.0},
        batch_tokens=150,
        epochs=2,
        seed=3,
        resume=False,
    )
    expected = llm.finetune(config).wait(120).losses
    content = client.files.content(trained.result_files[0]).read().decode()
    rows = list(csv.DictReader(io.StringIO(content)))
    assert list(rows[0]) == ["step", "train_loss", "train_gradient_norm", "valid_loss"]
    assert [int(row["step"]) for row in rows] == list(range(1, len(expected) + 1))
    np.testing.assert_allclose([float(row["train_loss"]) for row in rows], expected, rtol=1e-4)
    assert [row["step"] for row in rows if row["valid_loss"]] == [rows[-1]["step"]]


def test_its_tokens_and_loss_are_metrics(server, client, trained):
    labels = f'{{job="{trained.id}",phase="%s"}}'
    forward = server.metric("flexllm:finetune_tokens_total" + labels % "forward", KEY)
    backward = server.metric("flexllm:finetune_tokens_total" + labels % "backward", KEY)
    assert backward == trained.trained_tokens
    assert forward > backward  # validation goes forward only
    content = client.files.content(trained.result_files[0]).read().decode()
    last = float(content.splitlines()[-1].split(",")[1])
    assert server.metric(f'flexllm:finetune_loss{{job="{trained.id}"}}', KEY) == pytest.approx(last)
    assert server.metric('flexllm:finetune_jobs{state="succeeded"}') >= 1


def test_events_tell_the_rows_and_every_step(client, trained):
    events = list(client.fine_tuning.jobs.list_events(trained.id, limit=10))  # several pages
    events.reverse()
    messages = [event.message for event in events]
    assert messages[0] == f"Created fine-tuning job: {trained.id}"
    assert messages[-1] == "The job has successfully completed" or "Checkpoint" in messages[-1]
    warnings = {
        event.data["line"]: event.data["reason"] for event in events if event.level == "warn"
    }
    assert warnings.keys() == {3, 7}
    assert "`prompt` must be text" in warnings[3] and "not JSON" in warnings[7]
    steps = [e.data["step"] for e in events if e.type == "metrics" and "train_loss" in e.data]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 4
    assert [e for e in events if e.type == "metrics" and "valid_loss" in e.data]


def test_checkpoints_are_served_too(client, trained, llama):
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(trained.id))
    steps = [checkpoint.step_number for checkpoint in checkpoints]
    assert steps == sorted(steps, reverse=True) and 2 in steps
    second = checkpoints[steps.index(2)]
    assert second.fine_tuned_model_checkpoint == f"{trained.fine_tuned_model}:ckpt-step-2"
    assert second.metrics.train_loss > 0
    name = second.fine_tuned_model_checkpoint
    answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=12, **GREEDY)
    expected = expected_text(client, llama, name, 12)
    assert answer.choices[0].text == expected
    assert expected != expected_text(client, llama, trained.fine_tuned_model, 12)


def test_more_adapters_than_slots_are_served(client, trained):
    """Six slots; idle adapters make room, and come back when they are asked for."""
    names = [m.id for m in client.models.list() if m.id.startswith("ft:")]
    assert len(names) > 5
    for name in [*names, *names[:2]]:
        answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=1)
        assert answer.model == name


def test_a_job_is_paused_resumed_and_cancelled(client):
    job = create(client, upload(client), extra={"max_steps": 5000})
    wait(client, job, "running")
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"

    def steps():
        events = client.fine_tuning.jobs.list_events(job.id, limit=100).data
        return max((e.data["step"] for e in events if e.type == "metrics"), default=0)

    time.sleep(0.5)
    paused_at = steps()
    time.sleep(1.0)
    assert steps() == paused_at
    assert client.fine_tuning.jobs.resume(job.id).status == "running"
    end = time.monotonic() + 30
    while steps() <= paused_at:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        client.fine_tuning.jobs.resume(job.id)


def test_jobs_beyond_the_limit_wait_their_turn(client):
    file_id = upload(client)
    jobs = [create(client, file_id, extra={"max_steps": 5000}) for _ in range(3)]
    for job in jobs[:2]:
        wait(client, job, "running")
    assert wait(client, jobs[2], "queued").status == "queued"
    with pytest.raises(openai.ConflictError, match="still needs the file"):
        client.files.delete(file_id)
    told = [e.message for e in client.fine_tuning.jobs.list_events(jobs[2].id)]
    waits = "Waiting for the end of one of the jobs that run: server.max_running_jobs=2"
    assert told.count(waits) == 1
    client.fine_tuning.jobs.cancel(jobs[0].id)
    wait(client, jobs[2], "running")
    for job in jobs[1:]:
        client.fine_tuning.jobs.cancel(job.id)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{not json\n", "no row in it can be read"),
        (b'{"a": 1}\n', "rows have the fields a"),
        (b'{"prompt": "a", "completion": ""}\n', "`completion` is empty"),
        (b"\xff\xfe\n", "no row in it can be read"),
    ],
)
def test_a_file_of_which_nothing_can_be_used_fails_the_job(client, data, says):
    file = client.files.create(file=("rows.jsonl", io.BytesIO(data)), purpose="fine-tune")
    job = create(client, file.id)
    end = time.monotonic() + 30
    while client.fine_tuning.jobs.retrieve(job.id).status != "failed":
        assert time.monotonic() < end
        time.sleep(0.05)
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert says in failed.error.message
    assert failed.error.param == "training_file"
    if says.startswith("no row"):
        events = client.fine_tuning.jobs.list_events(job.id).data
        assert [event.data["line"] for event in events if event.level == "warn"] == [1]


def test_reading_a_file_holds_up_nobody(server, client):
    """Its rows come from a pipe: reading them takes as long as the test wants it to."""
    file = client.files.create(file=("rows.jsonl", b"no JSON\n"), purpose="fine-tune")
    path = server.output_dir / "server" / "files" / file.id
    path.unlink()
    os.mkfifo(path)
    job, reads = create(client, file.id), 0

    def fed():
        nonlocal reads
        assert client.with_options(timeout=5).fine_tuning.jobs.retrieve(job.id)
        with contextlib.suppress(OSError):  # nobody reads now
            pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            assert client.with_options(timeout=5).files.list(limit=1)  # while the reader waits
            os.write(pipe, b"no JSON\n")
            os.close(pipe)
            reads += 1
        return client.fine_tuning.jobs.retrieve(job.id).status == "failed"

    try:
        server.wait(fed, 20)
    finally:
        os.close(os.open(path, os.O_RDWR))  # nobody waits for it any more
    assert reads == 2, "to use its rows, and to tell which are bad"


def test_lists_of_files_are_read_page_by_page(client):
    ids = [upload(client, count=1, seed=seed) for seed in range(5)]
    for order in ("asc", "desc"):
        whole = [f.id for f in client.files.list(limit=10_000, order=order) if f.id in ids]
        pages = [f.id for f in client.files.list(limit=2, order=order) if f.id in ids]
        assert len(whole) == 5 and pages == whole
    for file_id in ids:
        client.files.delete(file_id)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model": "absent"}, "does not exist"),
        ({"training_file": "file-absent"}, "no such file"),
        ({"suffix": "a b"}, "suffix"),
        ({"method": {"type": "reinforcement"}}, "reinforcement is missing"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs"),
        ({"extra_body": {"lora_rank": 9}}, "adapters.max_rank"),
        ({"extra_body": {"lora_rank": 5, "lora_init": "pissa"}}, "at most 4 with lora_init"),
        ({"extra_body": {"lora_init": "pisa"}}, "lora_init"),
        ({"extra_body": {"lora_dropout": 0.1}}, "trains without dropout"),
        ({"extra_body": {"lora_dropout": 1}}, "lora_dropout"),
        ({"extra_body": {"b_lr_ratio": 0}}, "b_lr_ratio"),
        ({"extra_body": {"lora_target_modules": ["x_proj"]}}, "lora_target_modules"),
    ],
)
def test_a_job_that_makes_no_sense_is_refused(client, trained, fields, says):
    with pytest.raises(openai.APIStatusError) as error:
        client.fine_tuning.jobs.create(
            **({"model": "tiny", "training_file": trained.training_file} | fields)
        )
    assert error.value.status_code in (400, 404)
    assert says in error.value.message


def test_a_server_with_dropout_trains_with_what_is_asked_for():
    fields = {"model": {"path": "model"}, "finetune": {"dropout": True}}
    config = Config.model_validate(fields)
    asked = CreateJob.model_validate({"model": "m", "training_file": "f", "lora_dropout": 0.1})
    asked.check(config)
    tree, _ = asked.tree(config, "job", seed=0, mean_tokens=10.0)
    job = FinetuneConfig.model_validate(tree | {"dataset": "rows.jsonl"})
    assert job.peft.lora_dropout == 0.1
    both = CreateJob.model_validate({**asked.model_dump(exclude_unset=True), "lora_init": "olora"})
    with pytest.raises(ApiError, match="leave one of them out"):
        both.check(config)


def test_text_that_is_none_is_refused(server):
    body = b'{"model": "tiny", "training_file": "x", "metadata": {"a": "\\ud800"}}'
    status, _, answer = server.post("/v1/fine_tuning/jobs", body)
    assert status == 400 and "surrogate" in answer
