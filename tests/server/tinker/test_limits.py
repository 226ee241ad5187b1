"""What clients of the Tinker API may take, and adapters that are both its and OpenAI's."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest
from sqlalchemy import update

from flexllm_jax.config import build_config
from flexllm_jax.server.database import Database
from flexllm_jax.server.tinker.tables import CheckpointRow
from tests.server.running import RunningServer
from tests.server.tinker.conftest import KEYS, tinker_config
from tests.server.tinker.speaking import Failed, Model, Refused, Speaker, next_tokens

TEXT = [1, 5, 20, 33, 40, 12]


@pytest.fixture(scope="module")
def small(chat_llama, adapter, tmp_path_factory):
    """A server with little of everything, and an adapter from the start."""
    limits = {
        "max_models": 4,
        "max_samplers": 8,
        "max_sessions": 5,
        "sampler_idle_s": 2.0,
        "session_timeout_s": 4.0,
        "result_s": 1.0,
        "max_checkpoint_bytes": 2**20,
    }
    output_dir = tmp_path_factory.mktemp("small")
    config = tinker_config(chat_llama, output_dir, tinker=limits)
    config["adapters"]["preload"] = [{"name": "random", "path": str(adapter)}]
    with RunningServer(config) as running:
        yield running.wait_ready()


@pytest.fixture
def one(small):
    """A session that is over when the test is."""
    yield from _session(small, "one")


@pytest.fixture
def two(small):
    yield from _session(small, "two")


def _session(server, name):
    speaker = Speaker(server, KEYS[name]).begin()
    yield speaker
    speaker.post(f"sessions/{speaker.session_id}/finish", reason={"type": "success"})


def refused(status, ask):
    with pytest.raises(Refused) as error:
        ask()
    assert error.value.status == status
    return str(error.value)


def test_a_key_has_of_models_what_it_leaves_to_others(one, two):
    made = [Model.make(one), Model.make(one)]
    assert "server.tinker.max_models" in refused(429, lambda: Model.make(one))
    Model.make(two)
    assert made[0].train(next_tokens(TEXT)).metrics["loss:sum"] > 0


def test_a_key_has_of_samplers_what_it_leaves_to_others(one, two):
    samplers = [one.sampler() for _ in range(4)]
    assert "server.tinker.max_samplers" in refused(429, one.sampler)
    assert two.sampler()
    assert np.isfinite(one.logprobs(samplers[0], TEXT, 0)[1:]).all()


def test_sessions_are_so_many(small, one):
    others = []
    said = ""
    for _ in range(6):
        try:
            others.append(Speaker(small, KEYS["two"]).begin())
        except Refused as error:
            said = str(error)
            break
    for each in others:
        each.post(f"sessions/{each.session_id}/finish", reason={"type": "success"})
    assert said.startswith("429") and "server.tinker.max_sessions" in said


def test_a_full_store_says_so_and_deleting_helps(one):
    model = Model.make(one)
    paths = []
    with pytest.raises(Failed, match=r"server\.tinker\.max_checkpoint_bytes") as error:
        for number in range(50):
            paths.append(model.save(f"n{number}"))
    assert error.value.category == "user" and paths
    for path in paths:
        run, kind, name = path.removeprefix("tinker://").split("/")
        one.ask("DELETE", f"training_runs/{run}/checkpoints/{kind}/{name}")
    assert model.save("again").endswith("/weights/again")


def test_folders_that_nobody_names_are_removed(small, one):
    def folders():
        return {p.name for p in (small.output_dir / "tinker").iterdir()}

    model = Model.make(one)
    before = folders()
    path = model.save("short", "save_weights_for_sampler", ttl_seconds=3600)
    model.sampler()
    assert len(folders() - before) == 2
    sampler = one.sampler(model_path=path)
    one.logprobs(sampler, TEXT, 0)
    database = Database(f"sqlite:///{small.output_dir / 'server' / 'server.sqlite'}")
    expired = update(CheckpointRow).where(CheckpointRow.name == "short")
    database.run_now(lambda s: s.execute(expired.values(expires_at=time.time() - 1)))
    database.close()
    assert "no checkpoint" in refused(404, lambda: one.sampler(model_path=path))
    # The sampler without a name is idle; the one of the path is used on.
    end = time.monotonic() + 30
    while len(folders() - before) > 1:
        assert time.monotonic() < end
        one.logprobs(sampler, TEXT, int(time.monotonic() * 1000) % 10**6 + 1)
        time.sleep(0.2)


def test_results_are_forgotten_some_time_after_they_were_fetched(small, one):
    sampler = one.sampler()
    future = one.ask_sample(sampler, TEXT, 1, params={"max_tokens": 1})
    one.result(future)
    one.result(future)  # a connection that broke fetches it again

    def gone():
        try:
            one.post("session_heartbeat", session_id=one.session_id)
            one.result(future)
        except Refused as error:
            return error.status == 410
        time.sleep(0.5)
        return False

    small.wait(gone, 30)


def test_any_adapter_of_the_server_starts_a_model(one):
    path = "tinker://adapters/weights/random"
    scored = one.logprobs(one.sampler(model_path=path), TEXT, 0)
    base = one.logprobs(one.sampler(), TEXT, 0)
    assert np.abs(scored[1:] - base[1:]).max() > 1e-3
    model = Model.load(one, path, optimizer=False)
    output = model.train(next_tokens(TEXT))
    np.testing.assert_allclose(output.logprobs[0], scored[1:], atol=1e-5)
    assert model.step()["grad_norm"] > 0
    with pytest.raises(Failed, match="no state of an optimizer"):
        Model.load(one, path, optimizer=True)
    with pytest.raises(Failed, match="'nobody' does not exist"):
        Model.load(one, "tinker://adapters/weights/nobody", optimizer=False)


def test_a_checkpoint_starts_a_job(small, one):
    model = Model.make(one)
    model.train(next_tokens(TEXT))
    model.step()
    path = model.save("start", "save_weights_for_sampler")
    client = small.client(KEYS["one"])
    rows = b'{"prompt": "a b", "completion": "c d"}\n' * 4
    file = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=path, training_file=file.id, hyperparameters={"n_epochs": 1}
    )

    def ended():
        return client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed")

    small.wait(ended, 60)
    told = client.fine_tuning.jobs.retrieve(job.id)
    assert told.status == "succeeded", told.error


def test_without_its_libraries_the_server_says_what_to_install(chat_llama, tmp_path):
    config = tinker_config(chat_llama, tmp_path)
    program = (
        "import sys, json; sys.modules['zstandard'] = None\n"
        "from flexllm_jax.config import build_config\n"
        "from flexllm_jax.server.app import Server\n"
        "Server(build_config(json.loads(sys.stdin.read()), 'stdin'))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(config), capture_output=True, text=True
    )
    last = ran.stderr.strip().splitlines()[-1]
    assert "server.tinker.enabled: zstandard is not installed" in last
    assert "pip install 'flexllm_jax[tinker]'" in last


def test_the_http_process_needs_neither_jax_nor_torch():
    program = (
        "import sys, flexllm_jax.server.run, flexllm_jax.server.tinker.parts\n"
        "print({'jax', 'torch', 'transformers', 'tinker'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.strip() == "set()", ran.stderr


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"snapshot_every": 0}, "snapshot_every"),
        ({"model_names": ["a", "a"]}, "'a' is given twice"),
        ({"model_names": [""]}, "a name is empty"),
    ],
)
def test_wrong_configurations_are_named(section, says):
    tree = {"model": {"path": "x"}, "server": {"tinker": section}}
    with pytest.raises(Exception, match=says) as error:
        build_config(tree, "test")
    assert "server.tinker" in str(error.value)
