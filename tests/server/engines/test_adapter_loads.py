"""Slots that are never free by themselves are handed on, on a real engine; what a job's grader asks
has one to the job's end."""

import time

import pytest

from flexllm_jax import ReinforcementConfig
from flexllm_jax.models.text.tokenizer import load_tokenizer
from flexllm_jax.server.engines import adapter_loads
from flexllm_jax.server.engines.adapter_loads import AdapterLoads
from flexllm_jax.server.engines.calls import EngineCalls
from tests.engines import job_config, save_random_adapter, write_rows

TURN_S = 0.1


class World:
    """Adapters that fill every slot, each used by a request that does not end by itself."""

    def __init__(self, llm, folder):
        self.llm, self.folder = llm, folder
        self.directory = llm.engine.adapters.directory
        self.calls = EngineCalls(llm.config, llm.engine, llm._loop, llm.tokenizer)
        self.refused, self.users = {}, {}
        self.loads = AdapterLoads(
            llm._loop,
            self.calls,
            self.add,
            lambda requests, text, **_: self.refused.update(dict.fromkeys(requests, text)),
            lambda function, *arguments: function(*arguments),
            wait_s=30.0,
        )
        for i in range(self.directory.num_free):
            name = f"busy-{i}"
            assert self.calls.load_adapter(name, str(folder)) > 0
            llm._loop.call(self.add, {i: name})
        self.busy = list(self.users)

    def add(self, requests):
        self.users |= {name: self.directory.acquire(name) for name in requests.values()}

    def want(self, name):
        self.llm._loop.call(self.loads.want, name, str(self.folder), {len(name): name})

    def end(self, name):
        self.llm._loop.call(self.directory.release, self.users.pop(name))

    def go_on(self, seconds):
        """As the engine does between its steps."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.llm._loop.call(self.loads.go_on)
            time.sleep(TURN_S / 10)

    def close(self):
        for name in list(self.users):
            self.end(name)


@pytest.fixture
def shared(llm, monkeypatch):
    """The shared engine, which is given back what EngineCalls sets."""
    directory, writer = llm.engine.adapters.directory, llm.engine.trainer.writer
    monkeypatch.setattr(directory, "rooms", [*directory.rooms])
    for holder, name in (
        (llm.engine.trainer, "turns"),
        (writer, "on_checkpoint"),
        (writer, "keep_trying_s"),
    ):
        monkeypatch.setattr(holder, name, getattr(holder, name))
    return llm


@pytest.fixture
def world(shared, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_loads, "_TURN_S", TURN_S)
    world = World(shared, save_random_adapter(llama, tmp_path / "adapter"))
    yield world
    world.close()


def test_slots_that_are_always_in_use_are_handed_on(world):
    """The one that has had its slot the longest gives it up, one for each adapter that waits, and
    the first that waits gets the first that is free."""
    assert len(world.busy) > 2
    world.want("first")
    world.want("second")
    assert not world.directory.retired, "nobody has had its turn yet"
    world.go_on(3 * TURN_S)
    assert [published.name for published in world.directory.retired] == ["busy-0", "busy-1"]
    assert list(world.users) == world.busy, "their requests have not finished"
    world.end("busy-1")
    world.go_on(2 * TURN_S)
    assert list(world.loads.waiting) == ["second"]
    world.end("busy-0")
    world.go_on(2 * TURN_S)
    assert list(world.users) == [*world.busy[2:], "first", "second"] and not world.loads.waiting
    assert set(world.users) == set(world.directory.current), "others gave up their slots, too"
    assert not world.refused


def test_what_a_grader_asks_is_loaded_and_stays_while_its_job_runs(shared, chat_llama, tmp_path):
    """Others fill all slots, and the grader's adapter has none; then they ask for its slot."""
    llm, directory = shared, shared.engine.adapters.directory
    calls = EngineCalls(llm.config, llm.engine, llm._loop, load_tokenizer(chat_llama))
    folder = str(save_random_adapter(chat_llama, tmp_path / "adapter"))
    for name in ("judge", *(f"idle-{i}" for i in range(directory.num_free))):
        calls.load_adapter(name, folder)
    assert not directory.num_free and "judge" not in directory.current
    grader = {
        "type": "label_model",
        "name": "judge",
        "model": "judge",
        "input": [{"role": "user", "content": "{{ sample.output_text }}"}],
        "labels": ["a", "b"],
        "passing_labels": ["a", "b"],
        "sampling_params": {"max_completions_tokens": 40},
    }
    method = {"batch_size": 2, "num_generations": 2, "max_tokens": 4} | {
        "type": "reinforcement",
        "grader": {"type": "multi", "graders": {"judge": grader}, "calculate_output": "3 * judge"},
    }
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "ab"}, {"prompt": "cd"}])
    config = job_config("judged", rows, method=method, steps=3).model_dump(mode="json")
    calls.start_job(config, 0, {"judge": folder})
    job, asked = llm.engine.trainer.jobs["judged"], 0
    while not job.ended.is_set():
        assert job.running is False or directory.current["judge"].pins == 1
        calls.load_adapter(f"other-{asked}", folder)
        asked += 1
    assert job.status.value == "succeeded" and asked > 1, job.reason
    assert [sample["reward"] for sample in job.samples] == [3.0] * 4
    assert directory.current.get("judge") is None or not directory.current["judge"].users
    with pytest.raises(ValueError, match="adapter 'judge' is not loaded"):
        calls.unload_adapter("judge")
        calls.start_job(config, 0, {})
    assert not directory.training


def test_answers_of_a_job_make_room_for_an_adapter_that_is_asked_for(
    shared, llama, tmp_path, monkeypatch
):
    """They have the last slot; when it is theirs again the job goes on."""
    monkeypatch.setattr(adapter_loads, "_TURN_S", TURN_S)
    llm, directory = shared, shared.engine.adapters.directory
    calls = EngineCalls(llm.config, llm.engine, llm._loop, llm.tokenizer)
    loaded, folder = [], str(save_random_adapter(llama, tmp_path / "adapter"))
    add = lambda requests: loaded.append((requests, "asked" in directory.current))  # noqa: E731
    now = lambda function, *arguments: function(*arguments)  # noqa: E731
    loads = AdapterLoads(llm._loop, calls, add, pytest.fail, now, wait_s=10.0)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "ab"}, {"prompt": "cd"}])
    method = ReinforcementConfig(batch_size=2, num_generations=4, max_tokens=30)
    job = llm.finetune(
        job_config("answers", rows, method=method, steps=10_000),
        reward=lambda samples: [float(len(s.text)) for s in samples],
    )
    for i in range(directory.num_slots - 3):
        llm._loop.call(directory.start_training, f"taken-{i}")
    while not job.steps:
        time.sleep(0.001)
    llm._loop.call(loads.want, "asked", folder, {7: "asked"})
    while not loaded:
        llm._loop.call(loads.go_on)
        assert job.status == "running", job.reason
    assert loaded == [({7: "asked"}, True)]
    steps = job.steps
    while job.steps < steps + 2:  # nobody uses it: answers take the slot again
        assert job.status == "running", job.reason
        time.sleep(0.001)
    assert "asked" not in directory.current
    job.cancel()
    for name in list(directory.training):
        llm._loop.call(directory.stop_training, name)
