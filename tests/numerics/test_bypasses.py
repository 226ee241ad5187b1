"""IA3, bottleneck adapters, prefix tuning and LoRA on the output head are what PEFT makes of them
on torch (bottlenecks: the formula, as modules on torch): served in one batch, trained over 20
steps, exported and imported."""

import json
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, get_scheduler

from flexllm_jax import SamplingParams
from tests.checkpoints import make_qwen2, save_tokenizer
from tests.engines import (
    SEVEN,
    job_config,
    letter_rows,
    prompt_logprob_errors,
    random_prompts,
    reference_logprobs,
    save_random_adapter,
    start_engine,
    write_rows,
)
from tests.numerics.test_loss_curve import OPTIMIZER, STEPS, batches

KINDS = ("ia3", "bottleneck", "prefix", "head")
PREFIX, SIZE = 5, 6


class Bottleneck(torch.nn.Module):
    """y + relu(y D + d) U + u after a linear layer."""

    def __init__(self, base, size):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(base.out_features, size)
        self.up = torch.nn.Linear(size, base.out_features)

    def forward(self, x):
        y = self.base(x)
        return y + self.up(torch.relu(self.down(y)))


def tensor_name(layer, module, name):
    return f"base_model.model.model.layers.{layer}.{module}.bottleneck_{name}"


def with_bottlenecks(model):
    """The model with bottlenecks, and their parameters by the name they have in files."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    named = {}
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj = Bottleneck(layer.self_attn.o_proj, SIZE)
        layer.mlp.down_proj = Bottleneck(layer.mlp.down_proj, SIZE)
        for path, own in (
            ("self_attn.o_proj", layer.self_attn.o_proj),
            ("mlp.down_proj", layer.mlp.down_proj),
        ):
            for side in ("down", "up"):
                for name, parameter in getattr(own, side).named_parameters():
                    named[tensor_name(i, path, f"{side}.{name}")] = parameter
    return model, named


def make_peft(base, kind):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if kind == "bottleneck":
        return with_bottlenecks(model)
    if kind == "ia3":
        config = peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        )
    elif kind == "head":
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["lm_head", "up_proj"]
        )
    else:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)
    return peft.get_peft_model(model, config), None


def save_random(base, kind, path):
    """An adapter with random weights, written by PEFT (bottlenecks: by hand)."""
    torch.manual_seed(KINDS.index(kind))
    model, named = make_peft(base, kind)
    for name, parameter in (named or dict(model.named_parameters())).items():
        if named:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "ia3_l" in name:
            torch.nn.init.uniform_(parameter, 0.3, 1.7)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
        elif "prompt_encoder" in name:
            torch.nn.init.normal_(parameter)
    if named is None:
        model.save_pretrained(str(path))
        return path
    path.mkdir()
    save_file(
        {n: p.detach().contiguous() for n, p in named.items()}, path / "adapter_model.safetensors"
    )
    config = {"peft_type": "BOTTLENECK", "bottleneck_size": SIZE, "non_linearity": "relu"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def of_kind(kind):
    """What a job's configuration says of a kind."""
    if kind == "head":
        return {"type": "lora", "r": 3, "target_modules": ["lm_head", "up_proj"]}
    return {"type": kind}


def load_reference(base, kind, path, trainable=False):
    """The base model with the adapter of a folder, on torch."""
    if kind == "bottleneck":
        model, named = make_peft(base, kind)
        stored = load_file(path / "adapter_model.safetensors")
        assert stored.keys() == named.keys()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(stored[name])
        return model.eval()
    if kind == "prefix" and trainable:  # PEFT refuses to load a prefix to train it
        model, _ = make_peft(base, kind)
        stored = load_file(path / "adapter_model.safetensors")["prompt_embeddings"]
        with torch.no_grad():
            model.prompt_encoder["default"].embedding.weight.copy_(stored)
        return model.eval()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, str(path), is_trainable=trainable).eval()


def greedy(model, prompt, count):
    """Greedy tokens by whole forward passes: `generate` of transformers 5.24 does not hand on the
    prefix of PEFT 0.21, whose own forward does."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_logprobs(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bypasses")
    path = save_tokenizer(
        make_qwen2(folder / "model", vocab=272, num_heads=4, num_kv_heads=2, head_dim=64, tie=True)
    )
    llm = start_engine(
        path,
        folder / "runs",
        adapter_bank={
            "slots": 8,
            "max_rank": 4,
            "kinds": ["lora", "ia3", "bottleneck", "prefix"],
            "target_modules": [*SEVEN, "lm_head"],
            "max_bottleneck": SIZE + 2,
            "max_prefix": PREFIX + 3,
        },
        finetune={"unit_tokens": 16},
    )
    adapters = {kind: save_random(path, kind, folder / kind) for kind in KINDS}
    rows = write_rows(folder / "rows.jsonl", letter_rows(40, longest=60, seed=1))
    yield SimpleNamespace(llm=llm, path=path, folder=folder, adapters=adapters, rows=rows)
    llm.close()


def test_all_kinds_are_served_in_one_batch(case):
    llm = case.llm
    lora = save_random_adapter(case.path, case.folder / "lora", r=3)
    for name, path in {**case.adapters, "lora": lora}.items():
        llm.load_adapter(name, path)
    prompts = random_prompts([23, 9, 40], seed=7)
    params = SamplingParams(max_tokens=12, ignore_eos=True, prompt_logprobs=3)
    futures = [
        (name, prompt, llm.submit(prompt, params, adapter=name)[0])
        for prompt in prompts
        for name in (*KINDS, "lora", None)
    ]
    for name, prompt, future in futures:
        if name == "lora":
            model = load_reference(case.path, "lora", lora)
        elif name is None:
            model = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32).eval()
        else:
            model = load_reference(case.path, name, case.adapters[name])
        state = future.result(120)
        expected = reference_logprobs(model, prompt)
        output = SimpleNamespace(
            prompt_token_ids=list(state.prompt), prompt_logprobs=state.prompt_logprobs
        )
        assert prompt_logprob_errors(output, expected).max() < 2e-4, name
        assert state.output == greedy(model, prompt, 12), name


def reference_curve(case, kind, sequences):
    """Losses, gradient norms and the trained model."""
    model = load_reference(case.path, kind, case.adapters[kind], trainable=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=OPTIMIZER["lr"], weight_decay=OPTIMIZER["weight_decay"]
    )
    scheduler = get_scheduler("linear", optimizer, OPTIMIZER["warmup"], STEPS)
    losses, norms = [], []
    stream = batches(sequences, 150, 5)
    for _ in range(STEPS):
        batch = next(stream)
        labels = sum(int(s.loss_mask.sum()) for s in batch)
        optimizer.zero_grad()
        total = 0.0
        for sequence in batch:
            tokens = torch.tensor(sequence.tokens, dtype=torch.long)
            targets = torch.where(torch.tensor(sequence.loss_mask), tokens, -100)[1:]
            logits = model(input_ids=tokens[None]).logits[0, -len(tokens) : -1]
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / labels
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER["clip"]).item())
        optimizer.step()
        scheduler.step()
        losses.append(total)
    return losses, norms, model


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_is_that_of_peft_and_its_adapter_goes_back(case, kind):
    llm = case.llm
    config = job_config(
        f"train-{kind}",
        case.rows,
        init_adapter=case.adapters[kind],
        steps=STEPS,
        seed=5,
        optimizer=OPTIMIZER,
        peft={**of_kind(kind), "bottleneck_size": SIZE, "num_virtual_tokens": PREFIX},
    )
    job = llm.finetune(config)
    beside = [
        future
        for prompt in random_prompts([30, 12, 45, 7] * 3)
        for future in llm.submit(prompt, SamplingParams(max_tokens=30, temperature=1.0))
    ]
    assert job.wait(240).status == "succeeded", job.reason
    assert all(future.result(60).finished for future in beside)
    losses, norms, model = reference_curve(case, kind, job._job.source.dataset.sequences)
    np.testing.assert_allclose(job.losses, losses, rtol=5e-4)
    np.testing.assert_allclose(job._job.gradient_norms, norms, rtol=5e-3)
    assert np.mean(losses[-3:]) < 0.97 * np.mean(losses[:3]), "nothing was learnt"
    returned = load_reference(case.path, kind, job.adapter_dir)
    prompt = random_prompts([33], seed=3)[0]
    theirs, ours = (reference_logprobs(m.eval(), prompt) for m in (model, returned))
    start = reference_logprobs(load_reference(case.path, kind, case.adapters[kind]), prompt)
    assert np.abs(ours - theirs).max() < 0.01 * np.abs(start - theirs).max()
    served = llm.generate([prompt], SamplingParams(max_tokens=6, ignore_eos=True), adapter=job.name)
    assert served[0].outputs[0].token_ids == greedy(returned, prompt, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_of_each_kind_learns(case, kind):
    """Also from the weights that a job makes up, which change nothing (a prefix: much)."""
    config = job_config(
        f"new-{kind}",
        case.rows,
        steps=8,
        peft={**of_kind(kind), "bottleneck_size": 4, "num_virtual_tokens": 3},
        optimizer={"lr": 2e-2},
    )
    job = case.llm.finetune(config)
    assert job.wait(240).status == "succeeded", job.reason
    assert np.mean(job.losses[-2:]) < np.mean(job.losses[:2])
