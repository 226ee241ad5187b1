"""Adapters that a client trains call by call: what it is answered, what its steps do, and that a
call which fails is the only one."""

import math

import numpy as np
import pytest
import torch

from flexllm_jax import SamplingParams
from flexllm_jax.finetune.calls.source import ModelGone, NotFinite
from flexllm_jax.peft.hf.peft import load_adapter
from tests.engine.calls.client import datum, distance, random_data
from tests.engines import (
    job_config,
    load_with_adapter,
    random_prompts,
    reference_logprobs,
    write_rows,
)

LENGTHS = (20, 33, 7, 11, 40, 25)


@pytest.fixture(scope="module")
def reference(llama, start):
    return load_with_adapter(llama, start, torch.float64, is_trainable=True)


def policy_data(model, seed=0, mask=False):
    """Data of policies near the model's own."""
    random = np.random.default_rng(seed)
    data = []
    for length in LENGTHS:
        tokens, targets = random.integers(3, 260, (2, length))
        known = reference_logprobs(model, tokens)[np.arange(length), targets]
        inputs = {
            "target_tokens": targets,
            "logprobs": known + random.normal(0, 0.3, length),
            "advantages": random.choice([-1.0, 0.0, 0.5, 2.0], length),
        }
        if mask:
            inputs["sequence_ratio_mask"] = random.integers(0, 2, length)
        data.append(datum(tokens, **inputs))
    return data


def loss_by_hand(name, lp, inputs):
    """The documented formulas."""
    if name == "cross_entropy":
        return -(inputs["weights"] * lp).sum()
    q, a = (inputs[key].astype(np.float64) for key in ("logprobs", "advantages"))
    ratio = np.exp(lp - q)
    if name == "importance_sampling":
        return -(ratio * a).sum()
    if name == "cispo":
        return -(np.clip(ratio, 0, 4) * lp * a).sum()
    if name == "dro":
        return -(lp * a - 0.5 * 0.05 * (lp - q) ** 2).sum()
    if name == "gspo":
        mask = inputs["sequence_ratio_mask"]
        mean = (mask * (lp - q)).sum() / max(1, mask.sum())
        ratio = np.full_like(lp, np.exp(mean))
    return -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a).sum()


@pytest.mark.parametrize(
    "name", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"]
)
def test_logprobs_and_losses_are_those_of_the_formulas(client, start, reference, name):
    model = client.create_from(start, optimizer=False)
    data = random_data(LENGTHS)
    if name != "cross_entropy":
        data = policy_data(reference, mask=name == "gspo")
    forward = client.forward(model, data, name, backward=False)
    both = client.forward(model, data, name).result(60)
    forward = forward.result(60)
    total = 0.0
    for own, other, given in zip(both.logprobs, forward.logprobs, data, strict=True):
        targets = given.inputs["target_tokens"]
        expected = reference_logprobs(reference, given.tokens)[np.arange(len(targets)), targets]
        np.testing.assert_allclose(own[:, 0], expected, atol=2e-5)
        np.testing.assert_allclose(own, other, atol=1e-6)
        total += loss_by_hand(name, expected, given.inputs)
    assert math.isclose(both.loss_sum, total, rel_tol=1e-4)
    assert both.loss_sum == pytest.approx(forward.loss_sum, rel=1e-6)
    assert both.tokens == sum(LENGTHS)
    assert client.step(model, learning_rate=0.0).result(60)["gradient_norm"] > 0


def test_steps_are_those_of_torch_with_parameters_that_change(client, start, llama, tmp_path):
    model = load_with_adapter(llama, start, torch.float64, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, eps=1e-6)
    name = client.create_from(start, optimizer=False)
    # And from the engine's own gradients, which leaves the optimizer alone to be compared.
    alike = {
        (site, factor): torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))
        for site, factors in client.models.read(start, optimizer=False).adapter.weights.items()
        for factor, value in factors.items()
    }
    same = torch.optim.AdamW(list(alike.values()), eps=1e-6)
    steps = (
        {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1},
        {"learning_rate": 3e-2, "beta1": 0.8, "beta2": 0.99, "grad_clip_norm": 0.5},
        {"learning_rate": 5e-3},
    )
    answers = []
    for number, fields in enumerate(steps):
        data = random_data(LENGTHS[:3], seed=number) if number != 2 else []
        if data:
            client.forward(name, data)
        gradient = client.gradient(name) if data else None
        answers.append(client.step(name, eps=1e-6, **fields))
        adam.zero_grad(set_to_none=False)
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for given in data:
            logits = model(torch.tensor(given.tokens)[None]).logits[0]
            own = torch.log_softmax(logits, -1)
            own = own.gather(1, torch.tensor(given.inputs["target_tokens"])[:, None])[:, 0]
            (-(torch.tensor(given.inputs["weights"]) * own).sum()).backward()
        norm = math.sqrt(
            sum(p.grad.square().sum().item() for p in parameters if p.grad is not None)
        )
        for (site, factor), p in alike.items():
            p.grad = torch.tensor(gradient[site][factor]).double() if data else torch.zeros_like(p)
        for optimizer in (adam, same):
            group = optimizer.param_groups[0]
            clip = fields.get("grad_clip_norm", math.inf)
            torch.nn.utils.clip_grad_norm_(group["params"], clip)
            group |= {
                "lr": fields["learning_rate"],
                "betas": (fields.get("beta1", 0.9), fields.get("beta2", 0.95)),
                "weight_decay": fields.get("weight_decay", 0.0),
            }
            optimizer.step()
        measured = answers[-1].result(60)
        assert measured["gradient_norm"] == pytest.approx(norm, rel=1e-4, abs=1e-9)
        assert measured["step"] == number + 1
    found = client.weights(name, tmp_path / "trained")
    for (site, factor), p in alike.items():
        np.testing.assert_allclose(found[site][factor], p.detach().numpy(), rtol=0, atol=1e-6)
    trained = load_with_adapter(llama, tmp_path / "trained", torch.float64)
    before = load_with_adapter(llama, start, torch.float64)
    ours, first = dict(trained.named_parameters()), dict(before.named_parameters())
    moved = 0.0
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            own = (parameter - first[key]).norm()
            moved += own.item()
            # Gradients that nearly cancel are known to float32's digits of what they are the sum
            # of, and Adam divides by them: such weights, one in a hundred, make the difference.
            assert (ours[key] - parameter).norm() < 3e-4 * own, key
            assert ((ours[key] - parameter).abs() < 1e-6).double().mean() > 0.95, key
    assert moved > 0.1


def test_gradients_add_up_however_calls_are_cut(client, start, tmp_path):
    data = random_data(LENGTHS)
    cuts = {
        "whole": [data],
        "apart": [[own] for own in data],
        "three": [data[:1], data[1:4], data[4:]],
    }
    found = {}
    for cut, calls in cuts.items():
        name = client.create_from(start, optimizer=False)
        for call in calls:
            client.forward(name, call)
        client.step(name, learning_rate=1e-2)
        client.forward(name, data[:2], backward=False)  # adds nothing
        client.step(name, learning_rate=1e-2)
        found[cut] = client.weights(name, tmp_path / cut)
    first = client.models.read(start, optimizer=False).adapter.weights
    moved, _ = distance(found["whole"], first)
    for cut in ("apart", "three"):
        assert distance(found[cut], found["whole"])[0] <= 1e-4 * moved
    assert moved > 0.1


def test_it_is_what_a_native_job_of_the_same_rows_trains(client, llm, start, tmp_path):
    rows = [{"prompt": "abc", "completion": "defgh"}, {"prompt": "xy", "completion": "zzz zz"}]
    config = job_config(
        "native",
        write_rows(tmp_path / "rows.jsonl", rows),
        init_adapter=start,
        steps=3,
        batch_tokens=1000,
        optimizer={"lr": 1e-2, "warmup": 0, "schedule": "constant", "clip": None},
    )
    job = llm.finetune(config).wait(60)
    assert job.status == "succeeded", job.reason
    items = job._job.source.dataset.items
    counted = sum(item.loss_mask[1:].sum() for item in items)
    data = [datum(item.tokens, weights=item.loss_mask[1:] / counted) for item in items]
    name, o = client.create_from(start, optimizer=False), config.optimizer
    answers = []
    for _ in range(3):
        answers.append(client.forward(name, data))
        client.step(
            name,
            learning_rate=1e-2,
            beta1=o.beta1,
            beta2=o.beta2,
            eps=o.eps,
            weight_decay=o.weight_decay,
        )
    assert [a.result(60).loss_sum for a in answers] == pytest.approx(job.losses, abs=1e-5)
    native = load_adapter(job.adapter_dir, llm.engine.runner.model).weights
    ours = client.weights(name, tmp_path / "ours")
    moved, _ = distance(native, client.models.read(start, optimizer=False).adapter.weights)
    assert distance(native, ours)[0] <= 1e-4 * moved and moved > 0.1


def test_several_targets_a_token_beside_single_ones(client, start):
    random = np.random.default_rng(4)
    tokens, targets = random.integers(3, 260, 9), random.integers(3, 260, (9, 3))
    weights = random.choice([0.0, 0.3, -0.5], (9, 3))
    name = client.create_from(start, optimizer=False)
    several = datum(tokens, target_tokens=targets, weights=weights)
    one = datum(tokens, target_tokens=targets[:, 0], weights=weights[:, 0])
    both = client.forward(name, [one, several]).result(60)
    assert [own.shape for own in both.logprobs] == [(9, 1), (9, 3)]
    np.testing.assert_allclose(both.logprobs[0][:, 0], both.logprobs[1][:, 0], atol=1e-6)
    counted = (weights * both.logprobs[1]).sum() + (weights[:, 0] * both.logprobs[0][:, 0]).sum()
    assert both.loss_sum == pytest.approx(-counted, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "stable_reinforce"}, "loss_fn='stable_reinforce' is not to be had here; use cr"),
        ({"settings": {"beta": 1.0}}, "beta is no setting of cross_entropy, which has none"),
        ({"loss": "ppo", "settings": {"clip_low_threshold": "x"}}, "'x' must be a number"),
        ({"loss": "ppo"}, "datum 0: weights is no input of ppo, which takes target_tokens, logp"),
        ({"tokens": []}, "model_input has no tokens"),
        ({"tokens": [5] * 97}, "model_input has 97 tokens, and 96 can be trained at once"),
        ({"tokens": [5, 272, 7]}, "model_input has token 272, and the vocabulary has 0 to 271"),
        ({"tokens": [5, 6]}, "target_tokens has shape [3], and must have [2] or [2, K]"),
        ({"target_tokens": [1, -1, 3]}, "target_tokens has token -1"),
        ({"target_tokens": [1.0, 2.0, 3.0]}, "must be of whole numbers"),
        ({"weights": [1.0, 2.0]}, "weights has shape [2], and must have [3]"),
        ({"weights": [1.0, math.nan, 1.0]}, "weights has values that are not finite numbers"),
        ({"mask": [1, 1, 1]}, "mask is no input of cross_entropy"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name(client, start, change, message):
    name = client.create_from(start, optimizer=False)
    change = dict(change)
    loss, settings = change.pop("loss", "cross_entropy"), change.pop("settings", {})
    inputs = {"tokens": [4, 5, 6], "target_tokens": [5, 6, 7], "weights": [1.0, 1.0, 1.0]} | change
    tokens = np.array(inputs.pop("tokens"), np.int32)
    with pytest.raises(ValueError) as error:
        client.forward(name, [datum(tokens, **inputs)], loss, **settings)
    assert message in str(error.value)


def test_a_step_that_is_not_finite_changes_nothing_and_ends_nothing(client, start, tmp_path):
    name = client.create_from(start, optimizer=False)
    data = random_data(LENGTHS[:2])
    client.forward(name, data)
    client.step(name, learning_rate=1e-2).result(60)
    before = client.weights(name, tmp_path / "before")
    client.forward(name, data)
    broken = client.step(name, learning_rate=3e38, weight_decay=3e38)
    after = client.save_adapter(name, tmp_path / "after")
    zero = client.step(name, learning_rate=1e-2)
    with pytest.raises(NotFinite, match=r"the step was not done: .*inf|nan"):
        broken.result(60)
    after.result(60)
    assert (
        distance(before, client.models.read(tmp_path / "after", optimizer=False).adapter.weights)[0]
        == 0
    )
    answer = zero.result(60)  # its gradient is dropped
    assert answer["gradient_norm"] == 0 and answer["step"] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 9}, "rank=9: this server trains ranks from 1 to 8; choose one of them, or raise"),
        ({"rank": 0}, "rank=0"),
        (
            {"train_unembed": True},
            "train_unembed=True: this server has no room for LoRA on lm_head; create the model "
            "with train_unembed=False, or add them to adapters.target_modules",
        ),
        ({"train_mlp": False, "train_attn": False}, "are all false: choose at least one"),
    ],
)
def test_a_model_that_the_bank_cannot_hold_is_refused_with_both_ways_out(client, fields, message):
    with pytest.raises(ValueError) as error:
        client.create(**fields)
    assert message in str(error.value)


def test_calls_to_a_model_that_is_deleted_fail(client, llm):
    name = client.create()
    futures = [client.forward(name, random_data(LENGTHS)) for _ in range(20)]
    client.delete(name)
    outcomes = [future.exception(60) for future in futures]
    assert isinstance(outcomes[-1], ModelGone) and "deleted" in str(outcomes[-1])
    with pytest.raises(ValueError, match="is not there"):
        client.step(name)
    assert name not in llm.engine.trainer.jobs
    assert not llm.engine.adapters.directory.training


def test_what_a_sampler_says_is_what_training_sees(client, llm, start, tmp_path):
    name = client.create_from(start, optimizer=False)
    data = random_data(LENGTHS)
    client.save_adapter(name, tmp_path / "first", "first").result(60)
    client.forward(name, data)
    client.step(name, learning_rate=1e-2)
    client.save_adapter(name, tmp_path / "second", "second").result(60)
    client.forward(name, data)
    client.step(name, learning_rate=1e-2).result(60)
    prompt = random_prompts([19])[0]
    seen = {}
    for sampler in ("first", "second"):
        params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, logprobs=0)
        output = llm.generate(prompt, params, adapter=sampler)[0].outputs[0]
        tokens = [*prompt, *output.token_ids]
        said = [own[token] for token, own in zip(output.token_ids, output.logprobs, strict=True)]
        scored = llm.generate(
            tokens, SamplingParams(max_tokens=1, prompt_logprobs=0), adapter=sampler
        )[0].prompt_logprobs
        scored = [own[token] for token, own in zip(tokens[1:], scored[1:], strict=True)]
        at = client.create_from(tmp_path / sampler, optimizer=False)
        trained = client.forward(at, [datum(tokens)], backward=False).result(60).logprobs[0][:, 0]
        np.testing.assert_allclose(scored, trained, atol=1e-5)
        np.testing.assert_allclose(said, trained[len(prompt) - 1 :], atol=1e-5)
        model = load_with_adapter(llm.config.model.path, tmp_path / sampler)
        expected = reference_logprobs(model, tokens)[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(trained, expected, atol=2e-5)
        seen[sampler] = trained
        client.delete(at)
    assert np.abs(seen["first"][:18] - seen["second"][:18]).max() > 1e-3


def test_scoring_a_text_computes_its_tokens_and_no_more(llm):
    """The token that is sampled beside it is that of a row which is there anyway."""

    def computed():
        return sum(use.tokens for use in llm.engine.buckets.values())

    before = computed()
    (scored,) = llm.generate(
        random_prompts([50])[0], SamplingParams(max_tokens=1, prompt_logprobs=0)
    )
    assert len(scored.prompt_logprobs) == computed() - before == 50
