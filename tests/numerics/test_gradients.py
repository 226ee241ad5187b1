"""Adapter gradients (invariant 2), training log-probabilities (9) and serving (1), exact.

A job's gradient is taken from the engine's own accumulators, after forwards and backwards in
whatever pieces the scheduler chose, and compared in float64 with a dense decoder's `jax.grad` and
with PEFT's on torch.
"""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flexllm_jax import SamplingParams
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import Datum, PackedMicrobatch
from flexllm_jax.peft.adapter import LoraConfig, init_adapter
from flexllm_jax.peft.hf.peft import load_adapter
from scheduler.choice import Allowance
from tests.checkpoints import make_llama, make_mistral, make_qwen2, make_qwen3, save_tokenizer
from tests.engines import (
    SHORT,
    job_config,
    letter_rows,
    load_with_adapter,
    prompt_logprob_errors,
    random_prompts,
    reference_greedy,
    reference_logprobs,
    save_random_adapter,
    start_engine,
    write_rows,
)
from tests.numerics import dense
from tests.numerics.test_losses import Given, step

# Grouped-query ratios 1, 4 and 7; head dimensions 64 and 80; units of 1, 7 and 64 tokens; odd
# token buckets cut the forward at odd places.
CASES = {
    "llama": (
        make_llama,
        {"num_heads": 2, "num_kv_heads": 2, "head_dim": 64, "rope_scaling": "llama3"},
        {"unit_tokens": 1, "max_tokens": 105, "saved": "attention", "idle_step_ms": 20.0},
        [19],
    ),
    "qwen2": (
        make_qwen2,
        {"num_heads": 7, "num_kv_heads": 1, "head_dim": 80, "tie": True},
        {"unit_tokens": 7, "max_tokens": 105, "saved": "all", "idle_step_ms": 5.0},
        [13],
    ),
    "qwen3": (
        make_qwen3,
        {"num_heads": 4, "num_kv_heads": 1, "head_dim": 64, "sharded": True},
        {"unit_tokens": 64, "max_tokens": 128, "saved": ["query", "up"]},
        [37],
    ),
    "mistral": (
        make_mistral,
        {"num_heads": 4, "num_kv_heads": 1, "head_dim": 64},
        {"unit_tokens": 5, "max_tokens": 105, "saved": "attention"},
        [19],
    ),
    "qwen3-with-windows": (
        make_qwen3,
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        {"unit_tokens": 16, "max_tokens": 112, "saved": "attention"},
        [19],
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """An engine for a model, an adapter of it, and rows of odd lengths."""
    make, options, finetune, buckets = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    path = save_tokenizer(make(folder / "model", vocab=272, **options))
    llm = start_engine(
        path,
        folder / "runs",
        finetune=finetune,
        compile={"token_buckets": buckets},
        scheduler={"max_tokens_per_step": buckets[-1]},
    )
    adapter = save_random_adapter(path, folder / "adapter", r=3, lora_alpha=5)
    rows = write_rows(folder / "rows.jsonl", letter_rows(16, longest=80, seed=4))
    yield SimpleNamespace(llm=llm, path=path, adapter=adapter, rows=rows, slots=set())
    llm.close()


def run_one_step(case, monkeypatch, name, beside=()):
    """One optimizer step's microbatches: sequences, summed gradients by (layer, module), and each
    label's log-probability; with requests running beside it."""
    runner, trainer = case.llm.engine.runner, case.llm.engine.trainer
    seen = []
    finish = trainer.finish_microbatch

    def spy(microbatch):
        in_work = trainer.in_work[microbatch.microbatch_id]
        pending = runner.sizes.stacks.by_layer(jax.tree.map(np.array, runner.pending))
        logprob = np.array(runner.finetune["flow"]["logprob"])[in_work.first_token_slot :]
        case.slots.add(in_work.first_token_slot)
        seen.append((in_work.packed, pending, logprob))
        return finish(microbatch)

    futures = [
        f for p in beside for f in case.llm.submit(p, SamplingParams(max_tokens=40, temperature=1))
    ]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "finish_microbatch", spy)
        config = job_config(
            name, case.rows, init_adapter=case.adapter, steps=1, batch_tokens=10_000, seed=3
        )
        job = case.llm.finetune(config).wait(120)
    for future in futures:
        future.result(60)
    assert job.status == "succeeded", job.reason
    assert len(seen) > 1, "one microbatch: nothing is accumulated"
    return seen


def sequences_of(packed):
    """(tokens, loss mask) of each packed sequence."""
    ends = np.cumsum(packed.lengths)
    for start, end in zip(ends - packed.lengths, ends, strict=True):
        mask = np.zeros(end - start, bool)
        mask[1:] = packed.label[start : end - 1] >= 0
        yield packed.token[start:end], mask


def peft_gradients(model, sequences):
    """Summed loss, and gradients of A [d_in, r] and B [r, d_out] by (layer, module)."""
    model.zero_grad()
    total = 0.0
    for tokens, mask in sequences:
        tokens = torch.tensor(tokens, dtype=torch.long)
        logits = model(tokens[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        loss = losses[torch.tensor(mask[1:])].sum()
        loss.backward()
        total += loss.item()
    gradients = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parts = name.split(".layers.")[1].split(".")
            key = int(parts[0]), SHORT[parts[2]]
            gradients.setdefault(key, {})[parts[3][-1].lower()] = parameter.grad.T.numpy()
    return total, gradients


def dense_gradients(case, sequences):
    """The same by jax.grad through the dense decoder, in float64."""
    runner = case.llm.engine.runner
    tensors = load_file(case.adapter / "adapter_model.safetensors")
    adapter = {}
    for name, tensor in tensors.items():
        parts = name.split(".layers.")[1].split(".")
        key = int(parts[0]), SHORT[parts[2]]
        adapter.setdefault(key, {})[parts[3][-1].lower()] = tensor.T.double().numpy()
    scales = dict.fromkeys(adapter, 5 / 3)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: np.asarray(w, np.float64), runner.params)
        value, gradients = jax.jit(
            jax.value_and_grad(lambda own: dense.loss(runner.model, params, scales, sequences, own))
        )(adapter)
        return float(value), jax.tree.map(np.asarray, gradients)


def assert_same_gradients(pending, expected, rank=3):
    """Each factor's gradient within 1e-5 of its norm; nothing in the padding."""
    for (layer, module), factors in expected.items():
        ours = pending[layer][module]
        for name, mine in (("a", ours["a"][:, :rank]), ("b", ours["b"][:rank])):
            error = np.linalg.norm(mine - factors[name]) / np.linalg.norm(factors[name])
            assert error < 1e-5, (layer, module, name, error)
        assert not ours["a"][:, rank:].any() and not ours["b"][rank:].any()


@pytest.mark.parametrize("mode", ["alone", "co-served", "overlapping"])
def test_gradients_are_those_of_the_whole_sequences(case, mode, monkeypatch):
    prompts = [] if mode == "alone" else random_prompts([5, 31, 18, 44, 7])
    if mode == "overlapping":  # few tokens and units a step: a microbatch always joins another
        few = Allowance(math.inf, tokens=12, units=1)
        monkeypatch.setattr(case.llm.engine.scheduler.policy, "allowance", lambda step: few)
    case.slots.clear()
    seen = run_one_step(case, monkeypatch, f"gradients-{mode}", prompts)
    model = load_with_adapter(case.path, case.adapter, torch.float64, is_trainable=True)
    for packed, pending, logprob in seen:
        sequences = list(sequences_of(packed))
        loss, gradients = peft_gradients(model, sequences)
        assert_same_gradients(pending, gradients)
        assert packed.evaluate(logprob[: packed.tokens])[0].sum() == pytest.approx(loss, rel=1e-5)
    packed, pending, logprob = max(seen, key=lambda one: len(one[0].lengths))
    assert len(packed.lengths) > 1, "one sequence: nothing is packed"
    if mode == "overlapping":
        assert max(case.slots) > 0, "no microbatch went forward beside one that went backward"
    loss, gradients = dense_gradients(case, list(sequences_of(packed)))
    assert_same_gradients(pending, gradients)
    assert packed.evaluate(logprob[: packed.tokens])[0].sum() == pytest.approx(loss, rel=1e-5)


def test_bits_do_not_depend_on_how_tokens_fall_into_steps(case, monkeypatch):
    """In one token bucket: the same program computes a token, wherever in it the token is."""
    quiet = run_one_step(case, monkeypatch, "quiet")
    few = Allowance(math.inf, tokens=11, units=1)
    monkeypatch.setattr(case.llm.engine.scheduler.policy, "allowance", lambda step: few)
    beside = run_one_step(case, monkeypatch, "few-at-a-time", random_prompts([5, 31, 18, 44, 7]))
    for (packed, pending, logprob), (same, others, other) in zip(quiet, beside, strict=True):
        np.testing.assert_array_equal(packed.token, same.token)
        jax.tree.map(np.testing.assert_array_equal, pending, others)
        np.testing.assert_array_equal(logprob[: packed.tokens], other[: packed.tokens])


def test_logprobs_in_training_are_those_of_serving(case, monkeypatch):
    seen = run_one_step(case, monkeypatch, "logprobs", random_prompts([9]))
    case.llm.load_adapter("served", case.adapter)
    checked = 0
    for packed, _, trained in seen:
        end = 0
        for tokens, mask in sequences_of(packed):
            start, end = end, end + len(tokens)
            params = SamplingParams(max_tokens=1, prompt_logprobs=0)
            (output,) = case.llm.generate(tokens.tolist(), params, adapter="served")
            served = output.prompt_logprobs
            assert served is not None
            for i in np.flatnonzero(mask):
                (logprob,) = served[i].values()
                assert trained[start + i - 1] == pytest.approx(logprob, abs=2e-5)
                checked += 1
    assert checked > 50


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
def test_logprobs_of_samples_are_those_of_training(case, adapted):
    """On-policy training is on-policy: whatever the steps were in which a token was sampled, also
    from pages of an earlier request, and in which it is trained."""
    llm = case.llm
    params = SamplingParams(max_tokens=25, temperature=1.0, logprobs=0, ignore_eos=True)
    if adapted:
        llm.load_adapter("sampled", case.adapter)
    prompts, outputs = random_prompts([3, 24, 41, 24], seed=8), []
    for _ in range(2):  # the second time prompts are in the cache
        beside = [f for p in random_prompts([30, 9]) for f in llm.submit(p, params)]
        outputs += llm.generate(prompts, params, adapter="sampled" if adapted else None)
        for future in beside:
            future.result(60)
    data = []
    for output in outputs:
        tokens = np.array([*output.prompt_token_ids, *output.outputs[0].token_ids])
        weight = np.float32([0] * len(output.prompt_token_ids) + [1] * 25)
        data.append(Datum.following(tokens, weight))
    passes = [PackedMicrobatch((d,), Loss.of(), backward=b) for b in (False, True) for d in data]
    model = llm.engine.runner.model
    lora = LoraConfig(r=3, alpha=5, target_modules=("q_proj", "down_proj"))  # changes nothing yet
    start = (
        load_adapter(case.adapter, model, case.path) if adapted else init_adapter(lora, model, 0)
    )
    config, source = job_config(f"scored-{adapted}", case.rows, steps=1), Given(*passes, step())
    job = FinetuneJob(config, start.config, start, source)
    llm.start_job(job).wait(60)
    assert job.status.value == "succeeded", job.reason
    differences = []
    for output, datum, (logprob,) in zip(outputs * 2, data * 2, source.logprobs, strict=True):
        sampled = [next(iter(one.values())) for one in output.outputs[0].logprobs]
        differences.append(logprob[datum.label >= 0] - np.array(sampled))
    log_ratio = np.concatenate(differences)
    assert np.abs(log_ratio).max() < 1e-5
    assert np.mean(np.exp(log_ratio) - 1 - log_ratio) < 1e-6, "the divergence is not 0"


@pytest.fixture(scope="module")
def reference(case):
    return AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32).eval()


class TestServing:
    """The same engines serve what transformers computes (invariant 1)."""

    def test_logits(self, case, reference):
        prompts = random_prompts([2, 9, 14, 40, 101, 150])
        params = SamplingParams(max_tokens=1, prompt_logprobs=20)
        for prompt, output in zip(prompts, case.llm.generate(prompts, params), strict=True):
            expected = reference_logprobs(reference, prompt)
            errors = prompt_logprob_errors(output, expected)
            assert errors.max() < 1e-4 * np.abs(expected).max()

    def test_greedy_text(self, case, reference):
        prompts = random_prompts([1, 6, 13, 14, 33, 90], seed=1)
        params = SamplingParams(max_tokens=45, ignore_eos=True)
        for prompt, output in zip(prompts, case.llm.generate(prompts, params), strict=True):
            assert output.token_ids == reference_greedy(reference, prompt, 45)
            assert output.text == case.llm.tokenizer.decode(
                output.token_ids, skip_special_tokens=True
            )
