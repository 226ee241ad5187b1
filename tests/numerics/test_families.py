"""Every family beside transformers and PEFT: logits, LoRA's gradients for every size of a unit, and
what is exported.

The engine's own programs run on two packed sequences that are longer than the windows and than the
original contexts, in steps that cut them. `test_gradients` has whole engines for some families.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from flexllm_jax.config import Config
from flexllm_jax.engine.programs import layer_program, list_programs
from flexllm_jax.engine.sizes import EngineSizes
from flexllm_jax.engine.step_inputs import StepInputs
from flexllm_jax.finetune.buffers import saved_columns
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import Datum, PackedMicrobatch
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.hf_weights import load_parameters
from flexllm_jax.peft.bank import BankShape, to_row
from flexllm_jax.peft.hf_peft import load_adapter, save_adapter, save_merged
from kernels_pallas.backend import XLA
from tests import checkpoints
from tests.engines import SHORT, load_with_adapter, reference_logits, save_random_adapter

FAMILIES = ("mistral", "smollm3", "seed_oss", "granite", "olmo2", "olmo3", "gemma3")
LENGTHS, STEP, SLOTS, PAGE, PAGES = (29, 14), 16, 80, 8, 8
UNITS = (1, 5, 16, SLOTS)  # which divide the slots


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A checkpoint of the family, an adapter on all seven projections, and both loaded."""
    folder = tmp_path_factory.mktemp(request.param)
    path = getattr(checkpoints, f"make_{request.param}")(folder / "model")
    saved = save_random_adapter(path, folder / "adapter", r=3, lora_alpha=5)
    model = ModelConfig.from_hf(path)
    dtype = jnp.dtype(jnp.float32)
    params, adapter = load_parameters(path, model, dtype), load_adapter(saved, model, path)
    bank = BankShape(rows=1, rank=3, modules=tuple(SHORT.values()))
    random = np.random.default_rng(0)
    own = SimpleNamespace(
        path=path,
        saved=saved,
        model=model,
        params=params,
        adapter=adapter,
        row=jax.tree.map(jnp.asarray, to_row(adapter, model, bank, "own")),
        tokens=[random.integers(3, model.vocab_size, n) for n in LENGTHS],
        sizes=EngineSizes(
            model=model,
            dtype=dtype,
            backend=XLA,
            max_model_len=SLOTS,
            page_size=PAGE,
            rows=2,
            finetune_slots=SLOTS,
            unit_tokens=16,
            buckets=(STEP,),
            bank=bank,
            columns=saved_columns(Decoder(model, dtype), ("attended", "query", "residual")),
        ),
    )
    own.forward, own.expected = forward(own), peft_gradients(own)
    return own


def zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def packed(case):
    """The microbatch, its table, and the steps that bring it forward: the first cuts a sequence,
    the last has the rest of one and of the other."""
    starts = np.concatenate([[0], np.cumsum(LENGTHS)])
    position = np.concatenate([np.arange(n) for n in LENGTHS])
    tables = [np.array([5, 2, 7, 0]), np.array([1, 6])]
    kv_slot = np.concatenate(
        [
            t[np.arange(n) // PAGE] * PAGE + np.arange(n) % PAGE
            for t, n in zip(tables, LENGTHS, strict=True)
        ]
    )
    batch = PackedMicrobatch(
        tuple(Datum.following(t, np.ones(len(t), np.float32)) for t in case.tokens), Loss.of()
    )
    flat, vectors = np.concatenate(case.tokens), []
    for pieces in ([(0, 0, 16)], [(0, 16, 29), (1, 0, 3)], [(1, 3, 14)]):
        shape = case.sizes.step_shapes[STEP]
        inputs, vector = StepInputs.empty(shape, PAGES * PAGE, SLOTS)
        at = 0
        for s, (which, first, last) in enumerate(pieces):
            rows = starts[which] + np.arange(first, last)
            where = slice(at, at + last - first)
            inputs.token[where], inputs.position[where] = flat[rows], position[rows]
            inputs.kv_slot[where], inputs.saved_row[where] = kv_slot[rows], rows
            inputs.adapter[where] = 0
            inputs.kv_lengths[s] = last
            inputs.table[s] = which
            at += last - first
            inputs.query_starts[s + 1 :] = at
        inputs.num_sequences[...] = len(pieces)
        vectors.append(vector)
    page_tables = np.zeros(case.sizes.request_arrays["page_tables"].shape, np.int32)
    for row, own in enumerate(tables):
        page_tables[row, : len(own)] = own
    return batch, jnp.asarray(batch.table(SLOTS, 0, kv_slot)), vectors, page_tables


def forward(case):
    """Pages and training buffers after the microbatch went forward with its adapter."""
    programs = {p.name: p.function for p in list_programs(case.sizes, PAGES)}
    run = jax.jit(programs[f"forward/adapters/{STEP}"])
    bank = jax.tree.map(lambda w: w[:, None], case.row._asdict())
    pages, finetune = zeros(case.sizes.pages(PAGES)), zeros(case.sizes.finetune_arrays)
    *_, vectors, page_tables = packed(case)
    for vector in vectors:
        last = jnp.zeros(case.sizes.rows, jnp.int32)
        pages, finetune, *_ = run(case.params, bank, pages, finetune, last, page_tables, vector)
    return pages, finetune


def heads(case):
    return {name: case.params[name] for name in ("embed", "norm", "head") if name in case.params}


def test_logits_are_those_of_transformers_with_peft(case):
    _, finetune = case.forward
    own = Decoder(case.model, case.sizes.dtype)
    ours = np.asarray(own.logits(heads(case), finetune["flow"]["stream"]))[: sum(LENGTHS)]
    theirs = load_with_adapter(case.path, case.saved, attn_implementation="eager")
    expected = np.concatenate([reference_logits(theirs, t) for t in case.tokens])
    assert np.abs(ours - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("unit", UNITS)
def test_gradients_are_those_of_peft(case, unit):
    batch, table, *_ = packed(case)
    pages, finetune = case.forward
    sizes = replace(case.sizes, unit_tokens=unit)
    programs = {p.name: jax.jit(p.function) for p in list_programs(sizes, PAGES)}
    flow, starts = finetune["flow"], list(reversed(range(0, SLOTS, unit)))
    for start in starts:
        flow, _, _ = programs["unit/loss"](
            heads(case), None, flow, None, table, batch.loss.packed(), start
        )
    (gradients,) = zeros(sizes.job_state["gradients"])
    adapter = {"weights": case.row.weights[0], "scales": case.row.scales[0]}
    for layer in reversed(range(case.model.num_layers)):
        program = programs[layer_program(case.model.kind_of[layer])]
        for start in starts:
            flow, gradients, _ = program(
                case.params["layers"][layer],
                adapter,
                pages[layer],
                finetune["saved"][layer],
                flow,
                gradients,
                table,
                layer,
                start,
            )
    loss, expected = case.expected
    assert batch.evaluate(flow["logprob"][: sum(LENGTHS)])[0].sum() == pytest.approx(loss, rel=1e-5)
    for (layer, module, factor), theirs in expected.items():
        ours = np.asarray(gradients[module][factor][layer])
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-4, (layer, module, factor, error)


def peft_gradients(case):
    """Loss, and gradients of all factors in float64."""
    model = load_with_adapter(case.path, case.saved, torch.float64, is_trainable=True)
    total, gradients = 0.0, {}
    for tokens in map(torch.tensor, case.tokens):
        logits = model(tokens[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum")
        loss.backward()
        total += loss.item()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts = name.split(".layers.")[1].split(".")
            key = int(parts[0]), SHORT[parts[2]], parts[3][-1].lower()
            gradients[key] = parameter.grad.T.numpy()
    return total, gradients


def test_exports_load_in_peft_and_transformers(case, tmp_path):
    tokens = case.tokens[0]
    expected = reference_logits(load_with_adapter(case.path, case.saved), tokens)
    save_adapter(case.adapter, case.model, case.path, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(case.path, dtype=torch.float32)
    returned = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    np.testing.assert_allclose(reference_logits(returned, tokens), expected, atol=1e-5)
    save_merged(case.params, case.adapter, case.model, case.path, tmp_path / "merged")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    merged, report = loaded
    assert not any(report.values()), report
    error = np.abs(reference_logits(merged.eval(), tokens) - expected).max()
    assert error < 1e-4 * np.abs(expected).max()


def test_prefixes_are_refused_beside_windows(tmp_path):
    path = checkpoints.make_mistral(tmp_path)
    config = Config.model_validate({"model": {"path": path}, "adapters": {"kinds": ["prefix"]}})
    with pytest.raises(ValueError, match=r"adapters.kinds: this model has a sliding window.*drop"):
        EngineSizes.from_config(config, ModelConfig.from_hf(path), "cpu", XLA)
