"""What one key makes is not there for another; without several keys everything is everybody's."""

import json
import sqlite3

import openai
import pytest
from sqlalchemy import select

from flexllm_jax.config import ServerSection, build_config
from flexllm_jax.server.database import Database, File, JobRow
from flexllm_jax.server.http.access import ApiKeys
from tests.engines import letter_rows
from tests.server.running import KEY, LIMITED_KEY

ROWS = "".join(json.dumps(row) + "\n" for row in letter_rows(20)).encode()


@pytest.fixture(scope="module")
def other(server):
    """The SDK's client with another key."""
    return server.client(LIMITED_KEY)


@pytest.fixture(scope="module")
def job(server, client):
    """A job of the tests' key that has ended."""
    file = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    extra = {"lora_rank": 4, "batch_tokens": 150, "max_steps": 2}
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, extra_body=extra)

    def ended():
        jobs = client.fine_tuning.jobs  # its last checkpoint may come after its end
        return jobs.retrieve(job.id).status == "succeeded" and jobs.checkpoints.list(job.id).data

    server.wait(ended)
    return client.fine_tuning.jobs.retrieve(job.id)


def test_files_of_another_key_are_not_there(client, other, job):
    for file_id in (job.training_file, *job.result_files):
        assert file_id in [file.id for file in client.files.list()]
        assert file_id not in [file.id for file in other.files.list()]
        for ask in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError, match="no such file"):
                ask(file_id)
        assert client.files.content(file_id).read()
    with pytest.raises(openai.BadRequestError, match="no such file"):
        other.fine_tuning.jobs.create(model="tiny", training_file=job.training_file)


def test_jobs_of_another_key_are_not_there(client, other, job):
    assert job.id in [each.id for each in client.fine_tuning.jobs.list()]
    assert job.id not in [each.id for each in other.fine_tuning.jobs.list()]
    jobs = other.fine_tuning.jobs
    for ask in (
        jobs.retrieve,
        jobs.cancel,
        jobs.pause,
        jobs.resume,
        jobs.list_events,
        jobs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError, match="no such fine-tuning job"):
            ask(job.id)


def test_adapters_of_another_key_are_not_there(client, other, job):
    (checkpoint, *_) = client.fine_tuning.jobs.checkpoints.list(job.id)
    mine = [model.id for model in client.models.list()]
    theirs = [model.id for model in other.models.list()]
    file = other.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    for name in (job.fine_tuned_model, checkpoint.fine_tuned_model_checkpoint):
        assert name in mine and name not in theirs
        client.completions.create(model=name, prompt="a", max_tokens=1)
        for ask in (
            lambda name=name: other.models.retrieve(name),
            lambda name=name: other.completions.create(model=name, prompt="a", max_tokens=1),
            lambda name=name: other.fine_tuning.jobs.create(model=name, training_file=file),
        ):
            with pytest.raises(openai.NotFoundError) as error:
                ask()
            assert error.value.code == "model_not_found"
    assert {"tiny", "random"} <= set(theirs)  # the base model, and what the configuration loads


def test_metrics_name_a_keys_own_jobs_and_adapters(server, client, job):
    (checkpoint, *_) = client.fine_tuning.jobs.checkpoints.list(job.id)
    client.completions.create(model=checkpoint.fine_tuned_model_checkpoint, prompt="a")
    client.completions.create(model="random", prompt="a")
    server.wait(lambda: 'adapter="random"' in server.get("/metrics")[1], 10)
    server.wait(lambda: f"{job.id}.step-" in server.get("/metrics", KEY)[1], 10)
    tokens = server.metric("flexllm:finetune_tokens_total", KEY)
    loss = f'flexllm:finetune_loss{{job="{job.id}"}}'
    assert tokens > 0 and loss in server.get("/metrics", KEY)[1]
    for key in (None, LIMITED_KEY):
        status, text = server.get("/metrics", key)
        assert status == 200 and job.id not in text and "ft:" not in text
        assert 'adapter="random"' in text  # the configuration's
        assert server.metric("flexllm:finetune_tokens_total", key) == tokens
    assert server.get("/metrics", "no-key-of-it")[0] == 401


def test_loaded_adapters_are_their_keys_too(server, client, other, adapter):
    def ask(key, action, **fields):
        body = json.dumps({"lora_name": "private", **fields}).encode()
        authorization = f"Bearer {key}"
        path = f"/v1/{action}_lora_adapter"
        return server.post(path, body, Authorization=authorization)[0]

    path = {"lora_path": str(adapter)}
    assert ask(KEY, "load", **path) == 200
    assert "private" not in [model.id for model in other.models.list()]
    assert ask(LIMITED_KEY, "load", **path, load_inplace=True) == 400
    assert ask(LIMITED_KEY, "unload") == 404
    assert client.models.retrieve("private")
    assert ask(KEY, "unload") == 200


@pytest.mark.parametrize(
    ("keys", "sees_all"),
    [
        ([], [True]),
        ([{"name": "a", "key": "key-of-a"}], [True]),
        (
            [
                {"name": "a", "key": "key-of-a"},
                {"name": "b", "key": "key-of-b"},
                {"name": "c", "key": "key-of-c", "admin": True},
            ],
            [False, False, True],
        ),
    ],
)
def test_only_several_keys_are_kept_apart(keys, sees_all):
    configured = ApiKeys(build_config({"api_keys": keys}, "test", ServerSection))
    clients = [configured.client(f"Bearer {key['key']}") for key in keys or [{"key": "none"}]]
    assert [client.may_see("b") for client in clients] == [
        everything or client.owner == "b"
        for client, everything in zip(clients, sees_all, strict=True)
    ]
    assert all(client.may_see(None) for client in clients)
    assert [client.owner for client in clients] == ([key["name"] for key in keys] or [None])


def test_a_database_from_before_owners_is_everybodys(tmp_path):
    path = tmp_path / "server.sqlite"
    url = f"sqlite:///{path}"
    Database(url).close()
    with sqlite3.connect(path) as old:
        for table in ("files", "jobs"):
            old.execute(f"ALTER TABLE {table} DROP COLUMN owner")
        columns = "id, filename, purpose, bytes, created_at"
        values = "'file-old', 'rows.jsonl', 'fine-tune', 3, 1"
        old.execute(f"INSERT INTO files ({columns}) VALUES ({values})")
    old.close()
    database = Database(url)
    keys = [{"name": name, "key": f"key-of-{name}"} for name in ("a", "b")]
    a, b = (
        ApiKeys(build_config({"api_keys": keys}, "test", ServerSection)).client(f"Bearer {key}")
        for key in ("key-of-a", "key-of-b")
    )
    new = File(id="file-new", filename="x", purpose="fine-tune", bytes=1, owner=a.owner)
    database.run_now(lambda session: session.add(new))

    def seen(client):
        query = select(File.id).where(client.visible(File.owner)).order_by(File.id)
        return database.run_now(lambda session: list(session.scalars(query)))

    assert (seen(a), seen(b)) == (["file-new", "file-old"], ["file-old"])
    assert database.run_now(lambda session: list(session.scalars(select(JobRow.owner)))) == []
    database.close()
