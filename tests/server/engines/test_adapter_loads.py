"""Slots that are never free by themselves are handed on, on a real engine."""

import time

import pytest

from flexllm_jax.server.engines import adapter_loads
from flexllm_jax.server.engines.adapter_loads import AdapterLoads
from flexllm_jax.server.engines.calls import EngineCalls
from tests.engines import save_random_adapter

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
def world(llm, llama, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter_loads, "_TURN_S", TURN_S)
    writer = llm.engine.trainer.writer
    for holder, name in (  # what EngineCalls sets: given back to the shared engine
        (llm.engine.adapters.directory, "evict"),
        (llm.engine.adapters.directory, "num_evictable"),
        (llm.engine.trainer, "turns"),
        (writer, "on_checkpoint"),
        (writer, "keep_trying_s"),
    ):
        monkeypatch.setattr(holder, name, getattr(holder, name))
    world = World(llm, save_random_adapter(llama, tmp_path / "adapter"))
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
