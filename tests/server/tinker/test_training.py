"""Training over the Tinker API, as bytes: order, failures, checkpoints, tenants."""

import io
import json
import random
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pytest
import zstandard

from tests.server.running import RunningServer
from tests.server.tinker.speaking import Failed, Model, Refused, Speaker, datum, next_tokens

TEXTS = [[1, 5, 20, 33, 40, 12], [1, 7, 9, 11], [1, 30, 31, 32, 33, 34, 35, 36]]
DATA = [next_tokens(text) for text in TEXTS]


def curve(model, steps=4):
    """Losses of steps that are sent before any result is read. Those of the same steps differ by
    rounding alone: other traffic decides in which windows they are computed."""
    promises = []
    for _ in range(steps):
        promises.append(model.send(DATA))
        model.call("optim_step", adam_params={"learning_rate": 1e-2})
    return [model.output(promise).metrics["loss:sum"] for promise in promises]


def test_steps_lower_the_loss_and_samplers_stay_as_they_are(one):
    model = Model.make(one)
    before = model.train(*DATA)
    np.testing.assert_allclose(
        before.metrics["loss:sum"], -sum(map(np.sum, before.logprobs)), rtol=1e-4
    )
    assert model.step()["grad_norm"] > 0
    first = model.sampler()
    after = model.train(*DATA, forward_only=True)
    assert after.metrics["loss:sum"] < before.metrics["loss:sum"]
    assert [len(a) for a in after.logprobs] == [len(t) - 1 for t in TEXTS]
    scored = one.logprobs(first, TEXTS[0], 0)
    np.testing.assert_allclose(scored[1:], after.logprobs[0], atol=1e-5)
    model.train(*DATA)
    model.step()
    second = model.sampler()
    moved = model.train(*DATA, forward_only=True)
    np.testing.assert_array_equal(one.logprobs(first, TEXTS[0], 1), scored)
    np.testing.assert_allclose(one.logprobs(second, TEXTS[0], 0)[1:], moved.logprobs[0], atol=1e-5)
    assert np.abs(moved.logprobs[0] - after.logprobs[0]).max() > 1e-3


def test_requests_are_done_in_the_order_of_their_numbers(one):
    """Shuffled, each sent twice, one of them failing: as one after the other."""
    serial, steps = Model.make(one), 50
    expected = curve(serial, steps)
    shuffled = Model.make(one)
    bodies = {}
    for step in range(steps):
        seq = 2 * step + 1 + (step > 2)
        bodies[seq] = shuffled.body(DATA, "cross_entropy", False, seq)
        bodies[seq + 1] = {"model_id": shuffled.id, "seq_id": seq + 1}
        bodies[seq + 1]["adam_params"] = {"learning_rate": 1e-2}
    bodies[7] = shuffled.body([next_tokens([1, 10**6, 2])], "cross_entropy", False, 7)
    order = [*bodies, *bodies]
    random.Random(1).shuffle(order)
    promises = {}
    for seq in order:
        body = bodies[seq]
        path = "forward_backward" if isinstance(body, bytes) else "optim_step"
        promise = one.ask("POST", path, body)
        assert promises.setdefault(seq, promise) == promise
    with pytest.raises(Failed) as error:
        one.result(promises[7])
    assert error.value.category == "user"
    seqs = [s for s, body in sorted(bodies.items()) if isinstance(body, bytes) and s != 7]
    losses = [shuffled.output(promises[s]).metrics["loss:sum"] for s in seqs]
    # Which of them share a step is chance, and a step of another size rounds otherwise: an update
    # too early or too late would change a loss by 1e-4 and more.
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ({"data": [next_tokens([1, 10**6, 2])]}, "1000000"),
        ({"data": DATA, "loss": "nonsense"}, "nonsense"),
        ({"data": DATA, "loss": "stable_reinforce"}, "not published"),
        ({"data": [next_tokens([1, 2] * 100)]}, "96"),
        ({"data": []}, "data: is empty"),
        ({"data": DATA, "loss": "ppo"}, "advantages|logprobs"),
        ({"data": [datum([1, 2], target_tokens=[2, 3], mask=[1.0, 1.0])]}, "mask"),
        ({"data": DATA, "nonsense": 2.0}, "nonsense"),
        ({"data": [datum([1, 2], target_tokens=[2])]}, "a row for each of the 2 tokens"),
    ],
)
def test_a_failed_future_says_why_and_the_next_request_answers(one, shared_model, what, says):
    model = shared_model(one)
    data = what.pop("data")
    promise = model.send(data, **what)
    following = model.send(DATA, forward_only=True)
    with pytest.raises(Failed, match=says) as error:
        one.result(promise)
    assert error.value.category == "user"
    assert model.output(following).metrics["loss:sum"] > 0


@pytest.fixture(scope="module")
def shared_model(tinker_server):
    """One model for requests that change nothing."""
    made = {}

    def get(speaker):
        if not made:
            made["model"] = Model.make(speaker)
        made["model"].speaker = speaker
        return made["model"]

    return get


def test_requests_with_a_number_are_never_refused(one, shared_model):
    model = shared_model(one)
    for what, fields in (
        ("optim_step", {"adam_params": {"learning_rate": "fast"}}),
        ("optim_step", {"adam_params": None, "optimizer_params": {"type": "dimuon"}}),
        ("save_weights", {"path": "a/b"}),
        ("save_weights", {"path": "ok", "ttl_seconds": 5}),
        ("save_weights", {}),
        ("load_weights", {"path": "nonsense"}),
        ("load_weights", {"path": "tinker://a/weights/b"}),
        ("save_weights_external", {"path": "x", "age_encryption_recipients": ["k"]}),
    ):
        with pytest.raises(Failed) as error:
            one.result(model.call(what, **fields))
        assert error.value.category == "user"
    assert model.train(*DATA, forward_only=True).metrics["loss:sum"] > 0


def test_compressed_bodies_are_taken(one, shared_model):
    model = shared_model(one)
    plain = model.train(*DATA, forward_only=True)
    model.seq += 1
    body = zstandard.ZstdCompressor().compress(model.body(DATA, "cross_entropy", True, model.seq))
    promise = one.ask("POST", "forward_backward", body, Content_Encoding="zstd")
    again = model.output(promise).metrics
    np.testing.assert_allclose(again["loss:sum"], plain.metrics["loss:sum"], rtol=1e-6)
    with pytest.raises(Refused) as error:
        one.ask("POST", "forward_backward", b"garbage", Content_Encoding="zstd")
    assert error.value.status == 400


def test_a_model_that_cannot_be_made_says_how_it_can(one):
    for lora, says in (({"rank": 64}, "max_rank"), ({"rank": 4, "seed": 3}, None)):
        if says is None:
            assert Model.make(one, **lora).id
            continue
        with pytest.raises(Failed, match=says):
            Model.make(one, **lora)
    for fields, says in (
        ({"base_model": "Qwen/Qwen3-32B"}, "this server has Qwen/Qwen3-8B, tiny"),
        ({"base_model": "tiny", "optimizer_config": {"type": "dimuon"}}, "adamw"),
    ):
        promise = one.post(
            "create_model", session_id=one.session_id, model_seq_id=next(one.numbers), **fields
        )
        with pytest.raises(Failed, match=says):
            one.result(promise)
        with pytest.raises(Refused) as error:
            one.post("get_info", model_id=promise["model_id"])
        assert error.value.status == 400


def test_a_state_goes_on_as_if_nothing_had_been(one):
    model = Model.make(one)
    curve(model, 2)
    path = model.save("half", user_metadata={"renderer_name": "qwen3"})
    expected = curve(model, 3)
    with pytest.raises(Failed, match="is there already") as error:
        model.save("half")
    assert error.value.category == "user"

    other = Speaker(one.server, one.key).begin()
    again = Model.load(other, path, optimizer=True)
    assert again.id == f"{other.session_id}:train:0"
    assert other.post("get_info", model_id=again.id)["lora_rank"] == 4
    np.testing.assert_allclose(curve(again, 3), expected, rtol=1e-6)

    weights = Model.load(other, path, optimizer=False)
    fresh = curve(weights, 3)
    np.testing.assert_allclose(fresh[0], expected[0], rtol=1e-6)
    assert abs(fresh[2] - expected[2]) > 1e-2

    other.result(again.call("load_weights", path=path, optimizer=True))
    np.testing.assert_allclose(curve(again, 3), expected, rtol=1e-6)

    info = one.post("weights_info", tinker_path=path)
    assert (info["base_model"], info["lora_rank"], info["train_mlp"]) == ("tiny", 4, True)
    model.save("half", overwrite=True)
    assert abs(curve(Model.load(other, path, optimizer=True), 1)[0] - expected[0]) > 1e-2


def test_weights_with_a_name_outlive_their_session(one, adapter_logprobs):
    model = Model.make(one)
    curve(model, 2)
    path = model.save("named", "save_weights_for_sampler")
    external = model.save("files", "save_weights_external", ttl_seconds=3600)
    here = one.logprobs(one.sampler(model_path=path), TEXTS[0], 0)
    one.post(f"sessions/{one.session_id}/finish", reason={"type": "success"})

    other = Speaker(one.server, one.key).begin()
    sampler = other.sampler(model_path=path)
    assert other.get(f"samplers/{sampler}")["model_path"] == path
    np.testing.assert_array_equal(other.logprobs(sampler, TEXTS[0], 0), here)

    listed = {c["tinker_path"]: c for c in other.get("checkpoints")["checkpoints"]}
    assert listed[path]["checkpoint_type"] == "sampler" and listed[path]["size_bytes"] > 0
    assert listed[external]["expires_at"] is not None
    run, kind, name = external.removeprefix("tinker://").split("/")
    at = f"training_runs/{run}/checkpoints/{kind}/{name}"
    urls = other.get(f"{at}/external_weights_urls")["urls"]
    assert urls.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    files = {n: urllib.request.urlopen(url, timeout=20).read() for n, url in urls.items()}
    assert json.loads(files["adapter_config.json"])["r"] == 4
    np.testing.assert_allclose(adapter_logprobs(files, TEXTS[0]), here[1:], atol=2e-5)
    with tarfile.open(fileobj=io.BytesIO(other.get(f"{at}/archive"))) as tar:
        assert {*tar.getnames()} == {*files, "checkpoint_complete"}
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(urls["adapter_config.json"].replace("files/1", "files/2"))

    # It is a model of OpenAI's interfaces, too.
    told = one.server.client(one.key).completions.create(
        model=path, prompt=TEXTS[0], max_tokens=1, temperature=0
    )
    assert told.model == path
    run_told = other.get(f"training_runs/{run}")
    assert run_told["last_sampler_checkpoint"]["tinker_path"] == path

    other.ask("PUT", f"{at}/ttl", {"ttl_seconds": None})
    assert other.get(f"training_runs/{run}/checkpoints")["checkpoints"][0]["expires_at"] is None
    other.ask("DELETE", at)
    with pytest.raises(Refused) as error:
        other.ask("DELETE", at)
    assert error.value.status == 404
    with pytest.raises(Refused) as error:
        other.get(f"{at}/external_weights_urls")
    assert error.value.status == 404


def test_tenants_train_side_by_side_and_do_not_meet(one, two):
    """Three models of two keys give what each gives alone."""
    alone = curve(Model.make(one))
    models = [Model.make(one), Model.make(two), Model.make(two)]
    promises = [[], [], []]
    for _ in range(4):
        for model, own in zip(models, promises, strict=True):
            own.append(model.send(DATA))
            model.call("optim_step", adam_params={"learning_rate": 1e-2})
    for model, own in zip(models, promises, strict=True):
        losses = [model.output(p).metrics["loss:sum"] for p in own]
        np.testing.assert_allclose(losses, alone, rtol=1e-5)  # steps are shared by chance
    path = models[0].save("mine")
    stranger = Model(two, models[0].id, 100)
    for ask in (
        lambda: stranger.send(DATA),
        lambda: stranger.call("optim_step"),
        lambda: two.result(promises[0][0]),
        lambda: two.post("get_info", model_id=models[0].id),
        lambda: two.get(f"training_runs/{models[0].id}"),
        lambda: two.post("weights_info", tinker_path=path),
        lambda: two.sampler(model_path=path),
        lambda: two.ask("DELETE", f"training_runs/{models[0].id}/checkpoints/weights/mine"),
    ):
        with pytest.raises(Refused) as error:
            ask()
        assert error.value.status == 404
    with pytest.raises(Failed, match="no checkpoint"):
        Model.load(two, path, optimizer=True)
    with pytest.raises(Failed, match="no checkpoint"):
        two.result(models[1].call("load_weights", path=path, optimizer=False))
    mine = [run["training_run_id"] for run in two.get("training_runs")["training_runs"]]
    assert models[1].id in mine and models[0].id not in mine


def test_a_missing_number_holds_up_its_model_alone(one):
    waiting, going = Model.make(one), Model.make(one)
    waiting.seq = 1
    held = waiting.send(DATA)
    assert going.train(*DATA).metrics["loss:sum"] > 0
    with pytest.raises(Refused) as error:
        one.ask("POST", "retrieve_future", {"request_id": held["request_id"]})
    assert error.value.status == 408
    told = json.loads(error.value.body)
    assert (told["type"], told["queue_state"]) == ("try_again", "active")
    waiting.seq = 0
    waiting.send(DATA)
    assert waiting.output(held).metrics["loss:sum"] > 0


def test_usage_and_metrics_count(one, tinker_server: RunningServer):
    before = tinker_server.metric('flexllm:tinker_tokens_total{use="training"}', one.key)
    model = Model.make(one)
    model.train(*DATA)
    failed = 'flexllm:tinker_failures_total{category="user"}'
    so_far = tinker_server.metric(failed, one.key)
    with pytest.raises(Failed):
        model.train(*DATA, loss="nonsense")
    assert tinker_server.metric(failed, one.key) == so_far + 1
    usage = one.get("usage")["usage"]
    assert {row["key"] for row in usage} == {"one"}
    assert sum(row["training_tokens"] for row in usage) >= sum(len(t) - 1 for t in TEXTS)
    after = tinker_server.metric('flexllm:tinker_tokens_total{use="training"}', one.key)
    assert after - before == sum(len(t) - 1 for t in TEXTS)
    assert tinker_server.metric('flexllm:tinker_models{state="on_engine"}', one.key) >= 1
    assert tinker_server.metric("flexllm:tinker_sessions", one.key) >= 1
