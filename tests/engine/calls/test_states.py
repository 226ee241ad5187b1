"""States that a client saves and loads, and models that share too few slots: each goes on with the
numbers that it would have had alone."""

import json
import threading

import numpy as np
import pytest

from flexllm_jax import SamplingParams
from tests.engine.calls.client import Client, distance, random_data
from tests.engines import random_prompts, start_engine

LENGTHS = (20, 33, 7)


def train(client, name, steps, first=0):
    """So many steps, all handed over at once; answers to come."""
    answers = []
    for number in range(first, first + steps):
        answers.append(client.forward(name, random_data(LENGTHS, seed=number)))
        answers.append(client.step(name, learning_rate=1e-2 / (1 + number)))
    return answers


def told(answers):
    """Losses and gradient norms."""
    results = [answer.result(120) for answer in answers]
    return [r["gradient_norm"] if isinstance(r, dict) else r.loss_sum for r in results]


def test_a_saved_state_goes_on_exactly_and_weights_alone_begin_anew(client, tmp_path):
    name = client.create(rank=4)
    train(client, name, 3)
    saved = client.save_state(name, tmp_path / "state")
    undisturbed = told(train(client, name, 3, first=3))
    assert saved.result(60) == sum(p.stat().st_size for p in (tmp_path / "state").iterdir())
    info = json.loads((tmp_path / "state" / "state.json").read_text())
    assert info == {
        "rank": 4,
        "alpha": 32.0,
        "train_attn": True,
        "train_mlp": True,
        "train_unembed": False,
        "step": 3,
    }
    weights = client.weights(name, tmp_path / "end")

    again = client.create_from(tmp_path / "state", optimizer=True)
    assert told(train(client, again, 3, first=3)) == undisturbed
    assert distance(client.weights(again, tmp_path / "again"), weights)[0] == 0
    # The live model goes back to it, and what it had begun of a gradient is gone.
    client.forward(name, random_data(LENGTHS, seed=99))
    assert client.load(name, tmp_path / "state", optimizer=True).result(60) == 3
    assert told(train(client, name, 3, first=3)) == undisturbed
    assert distance(client.weights(name, tmp_path / "back"), weights)[0] == 0

    anew = client.create_from(tmp_path / "state", optimizer=False)
    loaded = client.load(name, tmp_path / "state", optimizer=False)
    answers = train(client, anew, 3, first=3)
    own = told(answers)
    assert own != undisturbed and own[:2] == undisturbed[:2]
    assert answers[-1].result(60)["step"] == 3 and loaded.result(60) == 0
    assert told(train(client, name, 3, first=3)) == own
    for model in (name, again, anew):
        client.delete(model)


def test_a_state_of_another_model_is_refused_and_the_calls_after_it_run(client, start, tmp_path):
    name, other = client.create(rank=4), client.create(rank=3)
    client.save_state(other, tmp_path / "other").result(60)
    loaded = client.load(name, tmp_path / "other", optimizer=True)
    answers = train(client, name, 1)
    with pytest.raises(ValueError, match=r"'rank': 3.*'rank': 4.*create a model from the state"):
        loaded.result(60)
    assert len(told(answers)) == 2
    with pytest.raises(ValueError, match=r"no optimizer's state .*load its weights alone"):
        client.models.read(start, optimizer=True)
    with pytest.raises(ValueError, match="nowhere"):
        client.models.read(tmp_path / "nowhere", optimizer=False)
    client.delete(name)
    client.delete(other)


def test_calls_after_a_load_wait_for_its_files(client, tmp_path):
    name = client.create()
    client.save_state(name, tmp_path / "state").result(60)
    call = client.models.load_call()
    client.add(name, call)
    after = client.forward(name, random_data(LENGTHS))
    other = client.create(seed=2)
    assert len(told(train(client, other, 2))) == 4  # others go on meanwhile
    assert not after.done() and not call.future.done()
    client.call(client.models.loaded, name, call, OSError("the disk is gone"))
    assert after.result(60).loss_sum
    with pytest.raises(OSError, match="disk is gone"):
        call.future.result(60)
    client.delete(name)
    client.delete(other)


def test_a_folder_that_cannot_be_written_fails_that_call_alone(client, tmp_path):
    (tmp_path / "file").write_text("")
    name = client.create()
    saved = client.save_state(name, tmp_path / "file" / "state")
    answers = train(client, name, 1)
    with pytest.raises(RuntimeError, match=r"file"):
        saved.result(60)
    assert len(told(answers)) == 2
    client.delete(name)


@pytest.fixture(scope="module")
def narrow(llama, tmp_path_factory):
    """An engine with slots for two models, and one for a sampler."""
    engine = start_engine(
        llama,
        tmp_path_factory.mktemp("narrow"),
        adapter_bank={"slots": 4},
        server={"tinker": {"enabled": True}},
    )
    yield Client(engine)
    engine.close()


def test_more_models_than_slots_train_as_each_would_alone(client, narrow, tmp_path):
    names = [narrow.create(seed=seed) for seed in range(3)]
    together = [train(narrow, name, 4) for name in names]
    with_turns = [told(answers) for answers in together]
    # A gradient that is begun is kept while its model waits.
    halves = [narrow.forward(name, random_data(LENGTHS, seed=50)) for name in names]
    told(halves)
    last = [told([narrow.step(name)]) for name in names]
    assert sum(m.parked is not None for m in narrow.models.models.values()) >= 1
    for seed, (name, own, end) in enumerate(zip(names, with_turns, last, strict=True)):
        alone = client.create(seed=seed)
        assert told(train(client, alone, 4)) == own
        told([client.forward(alone, random_data(LENGTHS, seed=50))])
        assert told([client.step(alone)]) == end
        client.delete(alone)
        narrow.delete(name)
    assert not narrow.llm.engine.adapters.directory.training


def test_models_that_are_always_busy_take_turns(narrow, monkeypatch):
    monkeypatch.setattr("flexllm_jax.engine.calls.turns._TURN_S", 0.2)
    names = [narrow.create(seed=seed) for seed in range(3)]
    done, stop = dict.fromkeys(names, 0), threading.Event()

    def busy(name):  # two calls ahead, always
        ahead = train(narrow, name, 2)
        while not stop.is_set():
            after = train(narrow, name, 2)
            told(ahead)
            ahead, done[name] = after, done[name] + 1
        told(ahead)

    threads = [threading.Thread(target=busy, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for _ in range(200):
        if min(done.values()) >= 3:
            break
        stop.wait(0.1)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "calls without an answer"
    assert min(done.values()) >= 3, done
    for name in names:
        narrow.delete(name)


def test_a_model_that_need_not_make_room_any_more_goes_on(narrow):
    name = narrow.create()
    told(train(narrow, name, 1))
    model = narrow.models.models[name]
    assert model.parked is None
    narrow.call(setattr, model.source, "held", True)  # for one that has got another slot meanwhile
    for answer in train(narrow, name, 1):
        answer.result(20)
    narrow.delete(name)


def test_two_models_get_tokens_by_their_weights_beside_requests(narrow):
    client, llm = narrow, narrow.llm
    one, two = client.create(weight=1.0), client.create(weight=3.0, seed=2)
    prompts = random_prompts([9, 14])
    futures = [f for p in prompts for f in llm.submit(p, SamplingParams(max_tokens=40))]
    data = random_data([40] * 4)
    order = []

    def note(name):
        return lambda _: order.append(name)

    def hand_over():
        for _ in range(30):
            for name in (one, two):
                call = client.models.forward_call(data, "cross_entropy", {}, backward=True)
                call.future.add_done_callback(note(name))
                client.models.add(name, call)
        return call.future

    client.call(hand_over).result(120)
    for future in futures:
        future.result(60)
    first = order[: len(order) // 2]
    share = first.count(two) / len(first)
    assert 0.68 < share < 0.82, order
    client.delete(one)
    client.delete(two)


def test_a_sampler_without_a_slot_is_on_disk_alone(narrow, tmp_path):
    llm = narrow.llm
    name = narrow.create(seed=7)
    told(train(narrow, name, 1))
    held = [f"held-{i}" for i in range(3)]
    for sampler in held:
        narrow.save_adapter(name, tmp_path / sampler, sampler).result(60)
    served = llm.adapters
    assert 1 <= len(served) < 3  # one slot is the model's
    loaded = narrow.models.read(tmp_path / held[-1], optimizer=False).adapter.weights
    assert distance(loaded, narrow.weights(name, tmp_path / "now"))[0] == 0
    assert np.isfinite(distance(loaded, loaded)[1])
    narrow.delete(name)
