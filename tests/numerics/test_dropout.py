"""LoRA's dropout: gradients and log-probabilities are those of torch and PEFT with the same masks,
in whatever microbatches, units, steps and runs the tokens fall; nothing else drops anything."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flexllm_jax import SamplingParams
from flexllm_jax.finetune.checkpoint import JobCheckpoints
from flexllm_jax.finetune.create import create_job
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import PackedMicrobatch
from flexllm_jax.finetune.reinforcement.make import Play
from flexllm_jax.peft.dropout import kept, token_keys
from tests.checkpoints import make_llama, save_tokenizer
from tests.engine.test_reinforcement_jobs import prompt_rows, reinforcement, uneven
from tests.engines import (
    SEVEN,
    job_config,
    letter_rows,
    load_with_adapter,
    random_prompts,
    save_random_adapter,
    start_engine,
    write_rows,
)
from tests.finetune.test_losses import reference
from tests.numerics.test_loss_curve import batches
from tests.numerics.test_losses import (
    NAMES,
    assert_same,
    make_data,
    pack,
    run,
    step,
    torch_gradients,
    torch_logprobs,
)

P, SEED, MODULES = 0.3, 0, [*SEVEN, "lm_head"]  # the seed of `job_config`
LARGEST = 80


class SameMask(torch.nn.Module):
    """In the place of PEFT's dropout: the engine's masks for the sequence of that name."""

    name: tuple[int, ...] | None = None

    def __init__(self, layer, module):
        super().__init__()
        self.layer, self.module = layer, module

    def forward(self, x):
        if SameMask.name is None:
            return x
        key = token_keys((SEED, *SameMask.name), x.shape[1])
        rate = np.full(x.shape[1], P, np.float32)
        mask = kept(key, self.layer, self.module, np.arange(x.shape[2]), rate, np)
        return x * torch.tensor(mask)[None] / (1 - P)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model, LoRA of it on all modules, the head too, and the same in PEFT with our masks."""
    folder = tmp_path_factory.mktemp("dropout")
    path = save_tokenizer(make_llama(folder / "model", vocab=272))
    options = {"r": 3, "lora_alpha": 5, "target_modules": MODULES, "lora_dropout": P}
    adapter = save_random_adapter(path, folder / "adapter", **options)
    theirs = load_with_adapter(path, adapter, torch.float64, is_trainable=True)
    for name, module in theirs.named_modules():
        if name.endswith("lora_dropout"):
            *_, short, _ = name.split(".")
            layer = int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else 2
            module["default"] = SameMask(layer, NAMES[short])
    rows = write_rows(folder / "rows.jsonl", letter_rows(16, longest=40))
    return SimpleNamespace(path=path, adapter=adapter, model=theirs, rows=rows, folder=folder)


@pytest.fixture(scope="module")
def engine(model):
    """Engines by the size of a unit; one bucket, so that the same tokens give the same bits."""
    started = {}

    def of(unit_tokens):
        if unit_tokens not in started:
            saved = "all" if unit_tokens == 5 else "attention"
            finetune = {"max_tokens": LARGEST, "unit_tokens": unit_tokens, "saved": saved}
            started[unit_tokens] = start_engine(
                model.path,
                model.folder / f"runs{unit_tokens}",
                adapter_bank={"target_modules": MODULES},
                finetune=finetune | {"dropout": True, "idle_step_ms": 10.0, "checkpoint_every": 2},
                compile={"token_buckets": [48]},
            )
        return started[unit_tokens]

    yield of
    for llm in started.values():
        llm.close()


def with_names(microbatches, names):
    names = iter(names)
    return [
        replace(packed, names=tuple(itertools.islice(names, len(packed.data))))
        for packed in microbatches
    ]


def masked_logprobs(model, data, names):
    found = []
    for datum, name in zip(data, names, strict=True):
        SameMask.name = name
        found += torch_logprobs(model, [datum])
    SameMask.name = None
    return found


@pytest.mark.parametrize("unit_tokens", [1, 5, 16, LARGEST])
@pytest.mark.parametrize("name", ["cross_entropy", "dpo"])
def test_gradients_are_those_of_peft_with_the_same_masks(model, engine, name, unit_tokens):
    loss = Loss.of(name)
    data = make_data(model, loss)
    names = [(2, 10 + number // 2, number % 2) for number in range(len(data))]
    model.model.zero_grad()
    logprobs = masked_logprobs(model.model, data, names)
    masked = [
        torch.where(torch.tensor(d.label >= 0), lp, torch.tensor(d.reference).double())
        for d, lp in zip(data, logprobs, strict=True)
    ]
    pairs = tuple(i ^ 1 for i in range(len(data)))
    reference(PackedMicrobatch(tuple(data), loss, pairs), masked).backward()
    expected = torch_gradients(model.model)

    alone = (2, 2, 2) if name == "dpo" else (1,) * 6
    scored = pack(data, loss, (2, 2, 2), backward=False)
    packed, unpacked = pack(data, loss, (4, 2)), pack(data, loss, alone)
    case = SimpleNamespace(**vars(model), llm=engine(unit_tokens))
    items = (*scored, *with_names(packed, names), step(), *with_names(unpacked, names), step())
    source, (together, each), job = run(case, f"{name}-{unit_tokens}", *items)
    assert job.lora_dropout == pytest.approx(P)
    assert_same(together, expected)
    assert_same(each, expected)
    scores, ours = (list(itertools.chain(*source.logprobs[at])) for at in (slice(3), slice(3, 5)))
    plain = torch_logprobs(model.model, data)
    for score, own, exact, dropped in zip(scores, ours, plain, logprobs, strict=True):
        np.testing.assert_allclose(score, exact.detach().numpy(), atol=2e-5)
        np.testing.assert_allclose(own, dropped.detach().numpy(), atol=2e-5)
    assert np.abs(np.concatenate(ours) - np.concatenate(scores)).max() > 0.05, "nothing dropped"


def test_a_resumed_job_is_an_undisturbed_one_and_validates_without_dropout(model, engine):
    llm = engine(16)
    fields = {"init_adapter": model.adapter, "steps": 6, "seed": SEED, "validation": model.rows}
    whole = llm.finetune(job_config("whole", model.rows, **fields)).wait(60)
    assert whole.status == "succeeded", whole.reason
    checkpoints = Path(llm.config.output_dir) / "killed" / "checkpoints"
    shutil.copytree(Path(llm.config.output_dir) / "whole" / "checkpoints", checkpoints)
    shutil.rmtree(checkpoints / "6")
    again = llm.finetune(job_config("killed", model.rows, resume=True, **fields)).wait(60)
    assert JobCheckpoints(checkpoints).steps()[0] == again._job.resumed_from == 4
    assert again.metrics == whole.metrics
    ours, theirs = (job.adapter_dir / "adapter_model.safetensors" for job in (again, whole))
    assert ours.read_bytes() == theirs.read_bytes()

    items = whole._job.source.dataset.items
    trained = load_with_adapter(model.path, whole.adapter_dir)
    assert trained.peft_config["default"].lora_dropout == pytest.approx(P)
    total = sum(masked_loss(trained, item) for item in items)
    ((_, validated),) = whole._job.validation_losses
    assert validated == pytest.approx(total / sum(i.weights[1:].sum() for i in items), rel=1e-5)

    undropped = job_config("undropped", model.rows, peft={"lora_dropout": 0.0}, **fields)
    plain = llm.finetune(undropped).wait(60)
    assert plain._job.lora_dropout == 0 and plain.losses[0] != whole.losses[0]
    (batch,) = itertools.islice(batches(items, 150, SEED), 1)
    order = np.random.default_rng([SEED, 0]).permutation(len(items))
    total = 0.0
    for place in range(len(batch)):
        SameMask.name = (0, place, 0)
        total += masked_loss(model.model, items[order[place]])
    SameMask.name = None
    expected = total / sum(row.weights[1:].sum() for row in batch)
    assert whole.losses[0] == pytest.approx(expected, rel=1e-5)


def masked_loss(model, item):
    tokens = torch.tensor(item.tokens, dtype=torch.long)
    with torch.no_grad():
        logits = model(tokens[None]).logits[0, :-1]
    losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
    return (losses * torch.tensor(item.weights[1:])).sum().item()


def test_nothing_beside_a_job_with_dropout_drops_anything(model, engine):
    llm = engine(16)
    prompts = random_prompts([5, 21, 33])
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    llm.load_adapter("served", model.adapter)
    alone = [o.token_ids for o in llm.generate(prompts, params, adapter="served")]
    fields = {"init_adapter": model.adapter, "steps": 12, "peft": {"lora_dropout": 0}}
    quiet = llm.finetune(job_config("quiet", model.rows, **fields)).wait(60)
    dropping = llm.finetune(job_config("dropping", model.rows, **fields | {"peft": {}}))
    beside = llm.finetune(job_config("beside", model.rows, **fields))
    assert [o.token_ids for o in llm.generate(prompts, params, adapter="served")] == alone
    assert beside.wait(60).metrics == quiet.metrics
    assert dropping.wait(60).status == "succeeded"
    assert dropping.losses[0] != quiet.losses[0]


def test_answers_are_sampled_without_masks_and_trained_with_new_ones_each_time(model, engine):
    llm, seen = engine(16), []
    rows = write_rows(model.folder / "prompts.jsonl", prompt_rows(6))
    twice = {"num_iterations": 2}
    config = reinforcement("rewarded", rows, twice, steps=2, init_adapter=model.adapter)
    runner = llm.engine.runner
    path, section, longest = model.path, llm.config.finetune, runner.sizes.max_model_len
    job = create_job(config, runner.model, path, llm.tokenizer, section, longest, Play(uneven))
    scored = job.source.scored

    def keep(packed, logprob):
        seen.append((packed, packed.split(logprob)))
        return scored(packed, logprob)

    job.source.scored = keep
    llm.start_job(job).wait(60)
    assert job.status.value == "succeeded", job.reason
    names = [name for packed, _ in seen for name in packed.names]
    assert len(names) == len(set(names)) and {step for step, _ in names} == {0, 1}
    for packed, logprobs in seen:
        if packed.names[0][0] == 0:  # before anything is trained
            with torch.no_grad():
                expected = masked_logprobs(model.model, packed.data, packed.names)
                plain = torch_logprobs(model.model, packed.data)
            for datum, own, dropped, exact in zip(
                packed.data, logprobs, expected, plain, strict=True
            ):
                counted = datum.label >= 0
                np.testing.assert_allclose(own, dropped.numpy(), atol=2e-5)
                sampled = exact.numpy()[counted]
                np.testing.assert_allclose(datum.reference[counted], sampled, atol=2e-5)


def test_masks_are_as_random_as_they_should_be():
    tokens, width, layers, modules = 300, 64, 3, ("q", "k", "down", "head")
    key = np.concatenate([token_keys((5, 0, row, 0), tokens // 3) for row in range(3)])
    assert len(set(key.tolist())) == tokens
    feature = np.arange(width)
    for rate in (0.05, 0.5):
        rates = np.full(tokens, rate, np.float32)
        masks = {
            (layer, module): kept(key, layer, module, feature, rates, np).astype(float)
            for layer in range(layers)
            for module in modules
        }
        spread = np.sqrt(rate * (1 - rate))
        for mask in masks.values():
            for axis, count in ((None, tokens * width), (0, tokens), (1, width)):
                errors = np.abs(mask.mean(axis) - (1 - rate)) / (spread / np.sqrt(count))
                assert np.max(errors) < 5, "a token, a feature or all of a mask is not of its rate"
        centred = [(mask - (1 - rate)) / spread for mask in masks.values()]
        pairs = list(itertools.combinations(centred, 2))
        for one in centred:  # with itself, moved by a token or a feature
            pairs += [(one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[1:, 1:], one[:-1, :-1])]
        for one, other in pairs:
            assert abs(np.mean(one * other)) < 5 / np.sqrt(one.size), "masks are alike"


def test_an_engine_without_dropout_refuses_such_a_job(llm, llama, model, tmp_path):
    adapter = save_random_adapter(llama, tmp_path / "adapter", lora_dropout=P)
    names = ["dropout" in name for name in llm.engine.runner.programs]
    assert not any(names)
    for fields in ({"init_adapter": adapter}, {"peft": {"r": 4, "lora_dropout": P}}):
        with pytest.raises(ValueError, match=f"lora_dropout={P}: .* finetune.dropout") as error:
            llm.finetune(job_config("dropping", model.rows, **fields))
        assert "\n" not in str(error.value)
    fields = {"init_adapter": adapter, "peft": {"lora_dropout": 0.0}, "steps": 1}
    assert llm.finetune(job_config("told", model.rows, **fields)).wait(60).status == "succeeded"
