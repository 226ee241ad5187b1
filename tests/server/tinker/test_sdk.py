"""The unmodified `tinker` SDK against a server that is started as users do: what it is told is what
torch and PEFT, or the formulas, say."""

import json
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch

from tests.engines import load_with_adapter, reference_logprobs
from tests.server.running import RunningServer
from tests.server.tinker.conftest import KEYS

tinker = pytest.importorskip("tinker")
types = tinker.types

BASE, LENGTHS = "Qwen/Qwen3-8B", (12, 25, 7, 18)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """No telemetry, and no hub."""
    kept = {name: os.environ.get(name) for name in ("TINKER_TELEMETRY", "HF_HUB_OFFLINE")}
    os.environ |= {"TINKER_TELEMETRY": "0", "HF_HUB_OFFLINE": "1"}
    yield
    for name, value in kept.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture
def service(tinker_server):
    return tinker.ServiceClient(api_key=KEYS["one"], base_url=tinker_server.url)


@pytest.fixture
def other_service(tinker_server):
    return tinker.ServiceClient(api_key=KEYS["two"], base_url=tinker_server.url)


def datum(tokens, **inputs):
    """Of a text whose next tokens are its targets, unless others are given."""
    if "target_tokens" not in inputs:
        inputs["target_tokens"], tokens = tokens[1:], tokens[:-1]
    arrays = {
        name: np.asarray(v, np.int64 if name == "target_tokens" else np.float32)
        for name, v in inputs.items()
    }
    return types.Datum(
        model_input=types.ModelInput.from_ints([int(t) for t in tokens]),
        loss_fn_inputs={n: types.TensorData.from_numpy(v) for n, v in arrays.items()},
    )


def texts(seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(3, 260, length).tolist() for length in LENGTHS]


def weighted(seed=0):
    random = np.random.default_rng(seed + 100)
    return [
        datum(text, weights=random.choice([0.0, 1.0, 0.5], len(text) - 1)) for text in texts(seed)
    ]


def logprobs(output):
    """Of each datum."""
    return [own["logprobs"].to_numpy() for own in output.loss_fn_outputs]


def trained(service, steps=2, rank=4):
    """A model that is no longer what it began as."""
    model = service.create_lora_training_client(BASE, rank=rank, seed=1).result()
    for number in range(steps):
        model.forward_backward(weighted(number), "cross_entropy")
        model.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return model


def norm(model):
    """Of the gradient since the last step, which moves nothing."""
    told = model.optim_step(types.AdamParams(learning_rate=0.0)).result()
    return told.metrics["grad_norm"]


def in_torch(chat_llama, service, model, tmp_path, name="external"):
    """The model in PEFT, in float64, from the files that it is exported to."""
    path = model.save_weights_external(name).result().path
    urls = service.create_rest_client().get_external_weights_urls(path).result()
    folder = tmp_path / name
    folder.mkdir()
    for file, url in urls.urls.items():
        with urllib.request.urlopen(url) as answer:
            (folder / file).write_bytes(answer.read())
    return load_with_adapter(chat_llama, folder, torch.float64, is_trainable=True)


def torch_logprobs(model, own):
    tokens = torch.tensor(own.model_input.to_ints())
    targets = torch.tensor(own.loss_fn_inputs["target_tokens"].to_numpy())
    every = torch.log_softmax(model(tokens[None]).logits[0], -1)
    return every.gather(1, targets.reshape(len(tokens), -1)).reshape(targets.shape)


def torch_norm(model, loss):
    model.zero_grad()
    loss.backward()
    return math.sqrt(
        sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)
    )


def test_what_it_is_told_of_the_server_and_what_it_is_refused(service, tinker_server):
    rest = tinker.RestClient(api_key=KEYS["one"], base_url=tinker_server.url)
    offered = rest.get_server_capabilities().result().supported_models
    assert BASE in [m.model_name for m in offered]
    model = service.create_lora_training_client(BASE, rank=4).result()
    info = model.get_info()
    assert info.lora_rank == 4 and info.model_data.model_name == BASE
    for fields, message in (
        ({"base_model": "nobody/none"}, "nobody/none"),
        ({"base_model": BASE, "rank": 64}, "adapters.max_rank"),
    ):
        began = time.monotonic()
        with pytest.raises(Exception, match=re.escape(message)):
            service.create_lora_training_client(**fields).result()
        assert time.monotonic() - began < 20


def test_gradients_and_losses_are_those_of_torch_and_peft(service, chat_llama, tmp_path):
    model = trained(service)
    reference = in_torch(chat_llama, service, model, tmp_path)
    random = np.random.default_rng(1)
    policy = []
    for text in texts(5):
        known = reference_logprobs(reference, text)[np.arange(len(text) - 1), text[1:]]
        fields = {
            "logprobs": known + random.normal(0, 0.3, len(known)),
            "advantages": random.choice([-1.0, 0.0, 0.5, 2.0], len(known)),
        }
        policy.append(datum(text, **fields))
    ones = [np.ones(len(own.loss_fn_inputs["logprobs"].to_numpy())) for own in policy]
    masked = [
        datum(
            own.model_input.to_ints(),
            target_tokens=own.loss_fn_inputs["target_tokens"].to_numpy(),
            sequence_ratio_mask=mask,
            **{k: own.loss_fn_inputs[k].to_numpy() for k in ("logprobs", "advantages")},
        )
        for own, mask in zip(policy, ones, strict=True)
    ]

    def of_sequences(r, a, lp, q):  # the gradient goes through a token's own lp alone
        r = (lp - q).detach().mean().exp() * (lp - lp.detach()).exp()
        return -torch.minimum(r * a, r.clip(0.8, 1.2) * a)

    for name, config, formula in (
        ("gspo", None, of_sequences),
        ("importance_sampling", None, lambda r, a, lp, q: -(r * a)),
        ("ppo", None, lambda r, a, lp, q: -torch.minimum(r * a, r.clip(0.8, 1.2) * a)),
        (
            "ppo",
            {"clip_low_threshold": 0.9, "clip_high_threshold": 1.05},
            lambda r, a, lp, q: -torch.minimum(r * a, r.clip(0.9, 1.05) * a),
        ),
        ("cispo", None, lambda r, a, lp, q: -(r.detach().clip(0, 4) * lp * a)),
        ("dro", {"beta": 0.3}, lambda r, a, lp, q: -(lp * a - 0.15 * (lp - q) ** 2)),
    ):
        data = masked if name == "gspo" else policy
        forward = model.forward(data, name, config).result()
        both = model.forward_backward(data, name, config).result()
        for one, two in zip(logprobs(forward), logprobs(both), strict=True):
            np.testing.assert_allclose(one, two, atol=1e-6)
        total = torch.tensor(0.0, dtype=torch.float64)
        for own in policy:
            lp = torch_logprobs(reference, own)
            q, a = (
                torch.tensor(own.loss_fn_inputs[key].to_numpy(), dtype=torch.float64)
                for key in ("logprobs", "advantages")
            )
            total = total + formula((lp - q).exp(), a, lp, q).sum()
        assert both.metrics["loss:sum"] == pytest.approx(total.item(), rel=1e-4, abs=1e-5)
        assert norm(model) == pytest.approx(torch_norm(reference, total), rel=1e-4), name


def test_a_gradient_is_a_sum_however_it_is_asked_for(service, monkeypatch):
    model, data = trained(service), weighted(3)
    whole = model.forward_backward(data, "cross_entropy")
    told = whole.result().metrics["loss:sum"], norm(model)
    for own in data:
        model.forward_backward([own], "cross_entropy")
    assert norm(model) == pytest.approx(told[1], rel=1e-5)
    with monkeypatch.context() as patch:  # as chunks, which the SDK sends with the first one last
        small = model.holder._client_config.model_copy(update={"fwdbwd_max_chunk_len": 2})
        patch.setattr(model.holder, "_client_config", small)
        chunks = model.forward_backward(data, "cross_entropy").result()
    assert chunks.metrics["loss:sum"] == pytest.approx(told[0], rel=1e-5)
    assert len(chunks.loss_fn_outputs) == len(data)
    assert norm(model) == pytest.approx(told[1], rel=1e-5)
    padding = datum([5, 6, 7, 8], weights=[0.0] * 3)
    padded = model.forward_backward([padding, *data, padding], "cross_entropy").result()
    assert padded.metrics["loss:sum"] == pytest.approx(told[0], rel=1e-5)
    assert norm(model) == pytest.approx(told[1], rel=1e-5)
    model.forward_backward([*data, *data], "cross_entropy")
    assert norm(model) == pytest.approx(2 * told[1], rel=1e-5)
    assert norm(model) == 0  # nothing has come since


def test_custom_losses_and_several_targets(service, chat_llama, tmp_path):
    model = trained(service)
    reference = in_torch(chat_llama, service, model, tmp_path)
    data = [datum(text) for text in texts(6)]

    def squared(data, found):
        loss = torch.stack([(own**2).sum() for own in found]).sum()
        return loss, {"squares": loss.item()}

    told = model.forward_backward_custom(data, squared).result()
    expected = torch.stack([(torch_logprobs(reference, own) ** 2).sum() for own in data]).sum()
    assert told.metrics["squares"] == pytest.approx(expected.item(), rel=1e-4)
    assert told.metrics["loss:sum"] == pytest.approx(expected.item(), rel=1e-4)
    assert "surrogate_loss:sum" in told.metrics
    assert norm(model) == pytest.approx(torch_norm(reference, expected), rel=1e-4)

    random = np.random.default_rng(2)
    several = []
    for text, count in zip(texts(7), (3, 3, 2, 1), strict=True):
        shape = (len(text), count)
        targets = random.integers(3, 260, shape)
        weights = random.choice([0.0, 0.0, 0.0, 0.7, -0.3], shape)
        several.append(datum(text, target_tokens=targets, weights=weights))
    both = model.forward_backward(several, "cross_entropy").result()
    total = torch.tensor(0.0, dtype=torch.float64)
    for own, found in zip(several, logprobs(both), strict=True):
        lp = torch_logprobs(reference, own)
        weights = own.loss_fn_inputs["weights"].to_numpy()
        np.testing.assert_allclose(
            found[weights != 0], lp.detach().numpy()[weights != 0], atol=2e-5
        )
        total = total - (torch.tensor(weights, dtype=torch.float64) * lp).sum()
    assert both.metrics["loss:sum"] == pytest.approx(total.item(), rel=1e-4)
    assert norm(model) == pytest.approx(torch_norm(reference, total), rel=1e-4)


def test_samples_are_scored_as_they_are_trained(service, other_service):
    model = trained(service)
    sampler = model.save_weights_and_get_sampling_client().result()
    prompt = texts(8)[1]
    params = types.SamplingParams(max_tokens=10, temperature=1.0, seed=4)
    said = sampler.sample(types.ModelInput.from_ints(prompt), 2, params).result().sequences
    again = sampler.sample(types.ModelInput.from_ints(prompt), 2, params).result().sequences
    assert [s.tokens for s in said] == [s.tokens for s in again]
    assert list(said[0].tokens) != list(said[1].tokens)
    # `max_tokens` left out: as far as the context goes.
    endless = types.SamplingParams(temperature=1.0, seed=4, stop=[])
    (long,) = sampler.sample(types.ModelInput.from_ints(prompt), 1, endless).result().sequences
    assert len(prompt) + len(long.tokens) in (159, 160) and long.stop_reason == "length"
    whole = [*prompt, *said[0].tokens]
    scored = sampler.compute_logprobs(types.ModelInput.from_ints(whole)).result()
    forward = logprobs(model.forward([datum(whole)], "cross_entropy").result())[0]
    np.testing.assert_allclose(scored[1:], forward, atol=1e-5)
    np.testing.assert_allclose(said[0].logprobs, forward[len(prompt) - 1 :], atol=1e-5)
    # Training goes on: the sampler stays, a new one moves.
    named = model.save_weights_for_sampler("frozen").result().path
    model.forward_backward(weighted(9), "cross_entropy")
    model.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    moved = model.save_weights_and_get_sampling_client().result()
    text = types.ModelInput.from_ints(whole)
    np.testing.assert_array_equal(sampler.compute_logprobs(text).result()[1:], scored[1:])
    assert np.abs(np.subtract(moved.compute_logprobs(text).result()[1:], scored[1:])).max() > 1e-3
    by_path = service.create_sampling_client(model_path=named).result()
    np.testing.assert_allclose(by_path.compute_logprobs(text).result()[1:], scored[1:], atol=1e-6)
    with pytest.raises(Exception, match=r"40[34]|not|unknown"):
        other_service.create_sampling_client(model_path=named).result()
    # A copy of a client in another process.
    program = (
        "import pickle, sys, tinker; client, text = pickle.load(sys.stdin.buffer)\n"
        "print(client.compute_logprobs(tinker.ModelInput.from_ints(text)).result()[1:])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps((sampler, whole)),
        capture_output=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr.decode()[-2000:]
    np.testing.assert_allclose(json.loads(ran.stdout), scored[1:], atol=1e-6)


def curve(model, first, last):
    """Steps handed over at once: their losses and norms. Those of the same steps differ by rounding
    alone, as the engine's steps follow the clock (tests/engine/calls/test_states.py: exactly)."""
    futures = []
    for number in range(first, last):
        futures.append(model.forward_backward(weighted(number), "cross_entropy"))
        futures.append(model.optim_step(types.AdamParams(learning_rate=1e-2 / (1 + number))))
    told = [future.result() for future in futures]
    return [t.metrics.get("loss:sum", t.metrics.get("grad_norm")) for t in told]


def test_a_saved_state_goes_on_exactly(service):
    model = trained(service)
    path = model.save_state("before").result().path
    undisturbed = curve(model, 3, 6)
    again = service.create_training_client_from_state_with_optimizer(path).result()
    np.testing.assert_allclose(curve(again, 3, 6), undisturbed, rtol=1e-6)
    weights_alone = service.create_training_client_from_state(path).result()
    own = curve(weights_alone, 3, 6)
    np.testing.assert_allclose(own[:2], undisturbed[:2], rtol=1e-6)
    assert abs(own[4] - undisturbed[4]) > 1e-3
    with pytest.raises(tinker.RequestFailedError, match="before"):
        model.save_state("before").result()


def test_two_tenants_get_what_each_gets_alone(service, other_service):
    alone = curve(service.create_lora_training_client(BASE, rank=4, seed=3).result(), 0, 4)
    one = service.create_lora_training_client(BASE, rank=4, seed=3).result()
    two = other_service.create_lora_training_client(BASE, rank=4, seed=3).result()
    futures = []
    for number in range(4):
        for model in (one, two):
            futures.append(model.forward_backward(weighted(number), "cross_entropy"))
            step = types.AdamParams(learning_rate=1e-2 / (1 + number))
            futures.append(model.optim_step(step))
    told = [f.result().metrics for f in futures]
    values = [t.get("loss:sum", t.get("grad_norm")) for t in told]
    for tenant in (0, 1):
        own = [v for i in range(tenant * 2, 16, 4) for v in values[i : i + 2]]
        np.testing.assert_allclose(own, alone, rtol=1e-5)


def test_a_client_survives_the_engine(service, tinker_server):
    expected = curve(service.create_lora_training_client(BASE, rank=4, seed=5).result(), 0, 20)
    model = service.create_lora_training_client(BASE, rank=4, seed=5).result()
    sampler = model.save_weights_and_get_sampling_client().result()
    endless = types.SamplingParams(temperature=1.0, seed=4, stop=[])
    prompt = types.ModelInput.from_ints([5, 6, 7])
    said = sampler.sample(prompt, 2, endless).result().sequences
    sampled = sampler.sample(prompt, 2, endless)  # in flight when the engine ends: sampled anew
    futures = []
    for number in range(20):
        futures.append(model.forward_backward(weighted(number), "cross_entropy"))
        futures.append(model.optim_step(types.AdamParams(learning_rate=1e-2 / (1 + number))))
    futures[12].result()
    os.kill(engine_pid(tinker_server), signal.SIGKILL)
    told = [future.result() for future in futures]
    values = [t.metrics.get("loss:sum", t.metrics.get("grad_norm")) for t in told]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert [s.tokens for s in sampled.result().sequences] == [s.tokens for s in said]


def engine_pid(server: RunningServer) -> int:
    """Of the newest engine."""
    found = re.findall(r"ready after .*? process (\d+)", server.output)
    return int(found[-1])
