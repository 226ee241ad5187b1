"""Every loss through the engine: gradients, log-probabilities and steps are those of the same
formula in torch and PEFT, in whatever microbatches, units and steps the tokens fall."""

import itertools
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from flexllm_jax import SamplingParams
from flexllm_jax.engine.device.programs import list_programs
from flexllm_jax.finetune import loss
from flexllm_jax.finetune.buffers import MicrobatchTable
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.losses import LOSSES, Loss
from flexllm_jax.finetune.microbatch import Datum, PackedMicrobatch
from flexllm_jax.finetune.optimizer import HYPERPARAMETERS
from flexllm_jax.finetune.source import Step
from flexllm_jax.peft.hf.peft import load_adapter
from tests.checkpoints import make_llama, save_tokenizer
from tests.engines import (
    SEVEN,
    SHORT,
    job_config,
    load_with_adapter,
    random_prompts,
    save_random_adapter,
    start_engine,
    write_rows,
)
from tests.finetune.test_losses import reference

LENGTHS = (20, 33, 7, 11, 40, 25)
PROMPTS = {1: (0, 17), 5: (4, 10)}  # a sequence begins like another, as far as so many tokens
PAIR_LOSSES = ("dpo", "ipo", "simpo")
NAMES = SHORT | {"lm_head": "head"}


class Given:
    """A source of microbatches and steps that are given beforehand."""

    waiting, page = False, 0

    def __init__(self, *items):
        self.items, self.logprobs, self.steps = list(items), [], 0
        self.count = len(items)
        self.total_steps = sum(isinstance(item, Step) for item in items)

    @property
    def finished(self):
        return self.steps + len(self.logprobs) == self.count

    def next(self):
        return self.items.pop(0) if self.items else None

    def scored(self, packed, logprob):
        self.logprobs.append(packed.split(logprob))

    def stepped(self, measured):
        self.steps += 1
        return {"loss": 0.0} | measured

    def position(self):
        return {"stream": {"fingerprint": 0}}


def step(**values):
    """An AdamW step; by default one that moves nothing."""
    named = {"learning_rate": 0.0, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    named |= {"momentum": 0.95, "b_lr_ratio": 1.0, "max_norm": math.inf, "scale": 1.0} | values
    return Step(np.array([named[name] for name in HYPERPARAMETERS], np.float32))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """An engine with LoRA on all modules, the head too, and the same adapter in PEFT."""
    folder = tmp_path_factory.mktemp("losses")
    path = save_tokenizer(make_llama(folder / "model", vocab=272))
    modules = [*SEVEN, "lm_head"]
    llm = start_engine(
        path,
        folder / "runs",
        adapter_bank={"target_modules": modules},
        finetune={"unit_tokens": 16, "idle_step_ms": 10.0, "checkpoint_every": 0},
    )
    adapter = save_random_adapter(
        path, folder / "adapter", r=3, lora_alpha=5, target_modules=modules
    )
    model = load_with_adapter(path, adapter, torch.float64, is_trainable=True)
    rows = write_rows(folder / "rows.jsonl", [{"text": "unused"}])
    yield SimpleNamespace(llm=llm, path=path, adapter=adapter, model=model, rows=rows)
    llm.close()


def run(case, name, *items):
    """Carry items out beside requests: the source, and the gradient before every step by (layer,
    module), and the job."""
    runner, seen = case.llm.engine.runner, []
    optimizer_step = runner.optimizer_step

    def spy(state, *arguments):
        gradients = jax.tree.map(np.array, state["gradients"])
        seen.append(runner.sizes.stacks.by_layer(gradients))
        return optimizer_step(state, *arguments)

    start = load_adapter(case.adapter, runner.model, case.path)
    config = job_config(name, case.rows, steps=1, init_adapter=case.adapter)
    job = FinetuneJob(config, start.config, start, Given(*items))
    futures = [
        future
        for prompt in random_prompts([5, 21])
        for future in case.llm.submit(prompt, SamplingParams(max_tokens=20, temperature=1))
    ]
    runner.optimizer_step = spy
    try:
        case.llm.start_job(job).wait(120)
    finally:
        runner.optimizer_step = optimizer_step
    for future in futures:
        future.result(60)
    assert job.status.value == "succeeded", job.reason
    return job.source, seen, job


def torch_logprobs(model, data):
    """Of the labels of each sequence, differentiable; 0 where there is none."""
    found = []
    for datum in data:
        logits = model(torch.tensor(datum.token, dtype=torch.long)[None]).logits[0]
        label = torch.tensor(datum.label, dtype=torch.long)
        own = torch.log_softmax(logits, -1).gather(1, label.clamp(min=0)[:, None])[:, 0]
        found.append(torch.where(label >= 0, own, 0.0))
    return found


def torch_gradients(model):
    gradients = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            *_, module, factor, _, _ = name.split(".")
            layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else -1
            key = layer, NAMES[module]
            gradients.setdefault(key, {})[factor[-1].lower()] = parameter.grad.T.numpy()
    return gradients


def make_data(case, loss, seed=0):
    """Sequences whose labels need not be their next tokens, with references near the model's
    log-probabilities. Some are answers to the same prompt; one's tokens have labels."""
    random = np.random.default_rng(seed)
    data = []
    for number, length in enumerate(LENGTHS):
        token = random.integers(3, 260, length).astype(np.int32)
        label = random.integers(3, 260, length).astype(np.int32)
        label[: length // 3] = -1
        counted = (label >= 0).astype(np.float32)
        weight, advantage = counted, random.choice([-1.0, 0.0, 0.5, 2.0], length)
        if not loss.of_sequences:
            weight = counted * random.choice([1.0, 0.5, 0.0, -1.5], length)
        if loss.name in PAIR_LOSSES:
            advantage = np.full(length, 1.0 - 2 * (number % 2))
        for asked, (first, count) in PROMPTS.items():
            if number in (asked, first):
                label[:count] = np.arange(100, 100 + count) if count < 16 else -1
                weight[:count] = 0
                advantage[:count] *= loss.name in PAIR_LOSSES
            if number == asked:
                token[:count] = data[first].token[:count]
        data.append(Datum(token, label, weight, 0 * weight, advantage.astype(np.float32)))
    if loss.name in ("cross_entropy", "simpo"):
        return data
    with torch.no_grad():
        logprobs = [x.numpy() for x in torch_logprobs(case.model, data)]
    spread = 0.02 if loss.of_sequences else 0.3
    return [
        Datum(
            d.token,
            d.label,
            d.weight,
            np.where(d.label >= 0, lp + random.normal(0, spread, len(d)), 0).astype(np.float32),
            d.advantage,
        )
        for d, lp in zip(data, logprobs, strict=True)
    ]


def pack(data, loss, groups, backward=True, page=0):
    """Microbatches of so many sequences each, pairs side by side."""
    made, at = [], 0
    for count in groups:
        pairs = tuple(i ^ 1 for i in range(count)) if loss.name in PAIR_LOSSES else ()
        own = tuple(data[at : at + count])
        made.append(PackedMicrobatch(own, loss, pairs, 0, backward, page=page))
        at += count
    return made


def assert_same(own, expected, tolerance=1e-4):
    checked = 0
    for (layer, module), factors in expected.items():
        rank = factors["a"].shape[1]
        ours = own[layer][module]
        assert not ours["a"][:, rank:].any() and not ours["b"][rank:].any()
        for name, mine in (("a", ours["a"][:, :rank]), ("b", ours["b"][:rank])):
            error = np.linalg.norm(mine - factors[name]) / np.linalg.norm(factors[name])
            assert error < tolerance, (layer, module, name, error)
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_of_every_loss_are_those_of_torch_and_peft(case, name):
    loss = Loss.of(name)
    data = make_data(case, loss)
    case.model.zero_grad()
    logprobs = torch_logprobs(case.model, data)
    masked = [
        torch.where(torch.tensor(d.label >= 0), lp, torch.tensor(d.reference).double())
        for d, lp in zip(data, logprobs, strict=True)
    ]
    whole = PackedMicrobatch(tuple(data), loss, tuple(i ^ 1 for i in range(len(data))))
    reference(whole, masked).backward()
    expected = torch_gradients(case.model)

    page = case.llm.engine.runner.sizes.page_size
    scored = pack(data, loss, (4, 2), backward=False, page=page)
    two, others = pack(data, loss, (4, 2)), pack(data, loss, (2, 4), page=page)
    shared = 16 + 8 if loss.name != "dro" else 0
    assert sum(own.tokens for own in others) == sum(LENGTHS) - shared
    source, (together, split), _ = run(case, f"loss-{name}", *scored, *two, step(), *others, step())
    assert_same(together, expected)
    assert_same(split, expected)
    scores, ours = (list(itertools.chain(*source.logprobs[at : at + 2])) for at in (0, 2))
    for score, own, exact in zip(scores, ours, logprobs, strict=True):
        np.testing.assert_allclose(score, own, atol=1e-6, rtol=1e-6)
        np.testing.assert_allclose(own, exact.detach().numpy(), atol=2e-5)


def test_doubled_data_doubles_the_gradient_and_a_weight_of_zero_changes_nothing(case):
    loss = Loss.of("cross_entropy")
    data = make_data(case, loss)[:4]
    silent = [Datum(d.token, d.label, 0 * d.weight, d.reference, d.advantage) for d in data[:2]]
    _, (once, twice, padded), _ = run(
        case,
        "weights",
        *(*pack(data, loss, (4,)), step()),
        *(*pack(data * 2, loss, (2, 3, 3)), step()),
        *(*pack([data[0], *silent, *data[1:]], loss, (3, 3)), step()),
    )
    assert jax.tree.leaves(once), "no gradient"
    for one, two, same in zip(*map(jax.tree.leaves, (once, twice, padded)), strict=True):
        size = np.linalg.norm(one)
        assert np.linalg.norm(two - 2 * one) <= 1e-5 * size
        assert np.linalg.norm(same - one) <= 1e-5 * size


def test_several_weighted_targets_a_token(case):
    random = np.random.default_rng(3)
    token, target = (random.integers(3, 260, shape) for shape in (17, (17, 3)))
    weight = random.choice([0.0, 0.2, 0.7, -0.3], (17, 3))
    case.model.zero_grad()
    logits = case.model(torch.tensor(token)[None]).logits[0]
    logprobs = torch.log_softmax(logits, -1).gather(1, torch.tensor(target))
    (-(torch.tensor(weight) * logprobs).sum()).backward()
    expected = torch_gradients(case.model)
    data = Datum.of_targets(token, target, weight)
    source, (gradient,), _ = run(
        case, "targets", *pack(data, Loss.of("cross_entropy"), (2, 1)), step()
    )
    assert_same(gradient, expected)
    ours = np.stack(list(itertools.chain(*source.logprobs)), axis=1)
    np.testing.assert_allclose(ours, logprobs.detach().numpy(), atol=2e-5)


def test_gradients_that_add_up_make_the_same_step(case):
    loss = Loss.of("cross_entropy")
    data = make_data(case, loss)
    fields = {"learning_rate": 1e-2, "max_norm": 1.0, "scale": 0.1}
    one, many = (
        run(case, name, *pack(data, loss, groups), step(**fields))
        for name, groups in (("together", (4, 2)), ("apart", (1, 2, 1, 1, 1)))
    )
    for a, b in zip(*(jax.tree.leaves(seen[0]) for _, seen, _ in (one, many)), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)
    trained = [load_file(job.adapter_dir / "adapter_model.safetensors") for *_, job in (one, many)]
    before = load_file(case.adapter / "adapter_model.safetensors")
    for name, value in trained[0].items():
        moved = np.linalg.norm(value - before[name])
        assert moved > 0 and np.linalg.norm(value - trained[1][name]) <= 1e-4 * moved, name


def test_steps_are_those_of_torch_also_without_a_gradient(case):
    loss = Loss.of("cross_entropy")
    data = make_data(case, loss)
    model = load_with_adapter(case.path, case.adapter, torch.float64, is_trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for own, rate, norm in ((data[:3], 1e-2, 1.0), ([], 3e-2, math.inf), (data[3:], 5e-3, 0.5)):
        optimizer.zero_grad(set_to_none=False)
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for d, lp in zip(own, torch_logprobs(model, own), strict=True):
            (-(torch.tensor(d.weight) * lp).sum() / 7).backward()
        torch.nn.utils.clip_grad_norm_(parameters, norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    fields = {"weight_decay": 0.1, "scale": 1 / 7}
    source, seen, job = run(
        case,
        "steps",
        *(*pack(data, loss, (3,)), step(learning_rate=1e-2, max_norm=1.0, **fields)),
        step(learning_rate=3e-2, **fields),
        *(*pack(data[3:], loss, (3,)), step(learning_rate=5e-3, max_norm=0.5, **fields)),
    )
    assert source.steps == 3 and len(seen) == 3
    assert job.gradient_norms[1] == 0.0
    ours = load_with_adapter(case.path, job.adapter_dir, torch.float64)
    moved = 0.0
    start = load_with_adapter(case.path, case.adapter, torch.float64)
    trained, before = dict(ours.named_parameters()), dict(start.named_parameters())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            distance = (parameter - before[name]).norm()
            moved += distance.item()
            assert (trained[name] - parameter).norm() < 1e-4 * distance, name
    assert moved > 0.1


def test_logits_of_some_tokens_at_once_give_the_same(case, monkeypatch):
    """As on a GPU: all of the head for a piece of a unit, not a part of the head for all of it."""
    sizes, rng = case.llm.engine.runner.sizes, np.random.default_rng(0)
    (unit,) = (p for p in list_programs(sizes, 1) if p.name == "unit/loss")
    arguments = [
        jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)
        for shapes in unit.arguments[:4]
    ]
    table, packed = MicrobatchTable.empty(sizes.finetune_slots)
    table.label[:13], table.sequence_start[:13], table.weight[:13] = range(13), 0, 1.0
    results = []
    for at_once in ((sizes.unit_tokens, 48), (sizes.unit_tokens // 4, sizes.model.vocab_size)):
        monkeypatch.setattr(loss, "logits_at_once", lambda *_, at_once=at_once: at_once)
        results.append(jax.jit(unit.function)(*arguments, packed, Loss.of().packed(), 0))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        assert np.abs(one).max() > 0
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * np.abs(one).max())
