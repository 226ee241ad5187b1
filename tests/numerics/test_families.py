"""Every family beside transformers and PEFT: logits, LoRA's gradients for every size of a unit, and
what is exported.

The engine's own programs run on two packed sequences that are longer than the windows and than the
original contexts, in steps that cut them. `test_gradients` has whole engines for some families.
"""

import json
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from flexllm_jax.config import Config
from flexllm_jax.engine.device.programs import head_parameters, layer_program, list_programs
from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.finetune import loss
from flexllm_jax.finetune.buffers import saved_columns
from flexllm_jax.models.checkpoints.hf_weights import load_parameters
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.families import FAMILIES as TABLE
from flexllm_jax.peft.adapter import TARGET_MODULES, LoraConfig, named_modules
from flexllm_jax.peft.bank import BankShape, to_row
from flexllm_jax.peft.hf.peft import load_adapter, save_adapter, save_merged
from kernels_pallas.backend import XLA
from tests import checkpoints
from tests.engines import SEVEN, load_base, load_with_adapter, reference_logits, save_random_adapter
from tests.numerics import by_fields
from tests.numerics.mutants import ARRAYS, CHANGES, mutants
from tests.packing import pack

# Every checkpoint that the tests can make, but of those whose whole engines `test_gradients` has.
FAMILIES = tuple(
    name.removeprefix("make_")
    for name in vars(checkpoints)
    if name.startswith("make_") and name not in ("make_llama", "make_qwen2", "make_qwen3")
)
LENGTHS, STEP, SLOTS, PAGE, PAGES = (29, 14), 16, 80, 8, 8
TABLES = ([5, 2, 7, 0], [1, 6])
# The first cuts a sequence, the last has the rest of one and of the other.
STEPS = ([(0, 0, 16)], [(0, 16, 29), (1, 0, 3)], [(1, 3, 14)])
SAVED = (
    *("attended", "query", "residual", "value", "token_gate", "attention_gate"),
    *("delta", "delta_gate"),
)
UNITS = (1, 5, 16, SLOTS)  # which divide the slots


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """A checkpoint of the family, an adapter on all it can be on, and both loaded."""
    folder = tmp_path_factory.mktemp(request.param)
    path = getattr(checkpoints, f"make_{request.param}")(folder / "model")
    model = ModelConfig.from_hf(path)
    names = {m: n for n, m in TARGET_MODULES.items() if m in model.projections}
    targets = list(names.values())
    if model.names.root != "model":  # other parts have modules of these names, too
        targets = rf".*language_model\..*\.({'|'.join(targets)})|lm_head"
    saved = save_random_adapter(path, folder / "adapter", r=3, lora_alpha=5, target_modules=targets)
    dtype = jnp.dtype(jnp.float32)
    params, adapter = load_parameters(path, model, dtype), load_adapter(saved, model, path)
    bank = BankShape(rows=1, rank=3, modules=tuple(names))
    random = np.random.default_rng(0)
    own = SimpleNamespace(
        path=path,
        saved=saved,
        model=model,
        params=params,
        adapter=adapter,
        row=jax.tree.map(jnp.asarray, to_row(adapter, model, bank, "own")),
        tokens=[random.integers(3, model.vocab_size, n) for n in LENGTHS],
        sizes=small_sizes(
            model,
            dtype,
            bank,
            saved_columns(Decoder(model, dtype), SAVED),
        ),
    )
    own.packed = pack(own.sizes, PAGES, own.tokens, TABLES, STEPS)
    own.forward = forward(own, own.sizes)
    reference = load_with_adapter(own.path, own.saved, torch.float64, is_trainable=True)
    own.expected = peft_gradients(own, reference)
    with reference.disable_adapter():
        own.base_logits = reference_logits(reference, own.tokens[0])
    return own


def small_sizes(model, dtype, bank, columns):
    return EngineSizes(
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
        columns=columns,
    )


def test_every_family_is_compared():
    """Here, or by whole engines in test_gradients."""
    table = {family.model_type.removesuffix("_text") for family in TABLE.values()}
    assert table - set(FAMILIES) == {"llama", "qwen2", "qwen3"}


def zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def forward(case, sizes):
    """Pages and training buffers after the microbatch went forward with its adapter."""
    programs = {p.name: p.function for p in list_programs(sizes, PAGES)}
    run = jax.jit(programs[f"forward/adapters/{STEP}"])
    bank = jax.tree.map(lambda w: w[:, None], case.row._asdict())
    pages, finetune = zeros(sizes.pages(PAGES)), zeros(sizes.finetune_arrays)
    for vector in case.packed.vectors:
        last = jnp.zeros(sizes.rows, jnp.int32)
        pages, finetune, *_ = run(
            case.params, bank, pages, finetune, last, case.packed.page_tables, vector
        )
    return pages, finetune


def heads(case):
    return head_parameters(case.params)


def test_logits_are_those_of_transformers_with_peft(case):
    _, finetune = case.forward
    last = case.model.num_layers
    factors = {n: jnp.asarray(w) for n, w in case.adapter.weights[last, "head"].items()}

    def bypass(x, outputs):
        low = x @ factors["a"] * case.adapter.config.scale(last, "head")
        return {"head": outputs["head"] + low @ factors["b"]}

    own = Decoder(case.model, case.sizes.dtype)
    ours = own.logits(heads(case), finetune["flow"]["stream"][: sum(LENGTHS)], bypass)
    theirs = load_with_adapter(case.path, case.saved, attn_implementation="eager")
    expected = np.concatenate([reference_logits(theirs, t) for t in case.tokens])
    assert np.abs(np.asarray(ours) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("family", ["granite", "olmo3", "gemma2", "phi3"])
def test_bfloat16_is_as_near_to_the_truth_as_transformers(family, tmp_path):
    """Both round, and not at the same places: what each is measured by is float64."""
    path = getattr(checkpoints, f"make_{family}")(tmp_path, dtype="bfloat16")
    model, dtype = ModelConfig.from_hf(path), jnp.dtype(jnp.bfloat16)
    decoder = Decoder(model, dtype)
    sizes = small_sizes(model, dtype, BankShape(1, 1, ()), saved_columns(decoder, ("attended",)))
    random = np.random.default_rng(0)
    tokens = [random.integers(3, model.vocab_size, n) for n in LENGTHS]
    packed, params = pack(sizes, PAGES, tokens, TABLES, STEPS), load_parameters(path, model, dtype)
    programs = {p.name: p.function for p in list_programs(sizes, PAGES)}
    run, pages, outputs = jax.jit(programs[f"forward/base/{STEP}"]), zeros(sizes.pages(PAGES)), []
    for vector, pieces in zip(packed.vectors, STEPS, strict=True):
        last = jnp.zeros(sizes.rows, jnp.int32)
        pages, _, x, _ = run(params, None, pages, None, last, packed.page_tables, vector)
        outputs.append(x[: sum(end - start for _, start, end in pieces)])
    ours = np.asarray(decoder.logits(head_parameters(params), jnp.concatenate(outputs)))

    def theirs(dtype):
        reference = load_base(path, dtype, attn_implementation="eager")
        return np.concatenate([reference_logits(reference, own.tolist()) for own in tokens])

    truth = theirs(torch.float64)
    own, other = (np.linalg.norm(x - truth) for x in (ours, theirs(torch.bfloat16)))
    assert own < 1.1 * other


@pytest.mark.parametrize("unit", UNITS)
def test_gradients_are_those_of_peft(case, unit, monkeypatch):
    monkeypatch.setattr(loss, "_VOCABULARY_CHUNK", 48)  # which overlap
    batch, table, *_ = case.packed
    sizes, (pages, finetune) = replace(case.sizes, unit_tokens=unit), case.forward
    if sizes.finetune_arrays != case.sizes.finetune_arrays:  # some keep states by unit
        pages, finetune = forward(case, sizes)
    programs = {p.name: jax.jit(p.function) for p in list_programs(sizes, PAGES)}
    flow, starts = finetune["flow"], list(reversed(range(0, SLOTS, unit)))
    gradients = zeros(sizes.job_state["gradients"])
    adapters = [
        {"weights": weights, "scales": scales}
        for weights, scales in zip(case.row.weights, case.row.scales, strict=True)
    ]
    packed_loss = batch.loss.packed()
    for start in starts:
        flow, gradients[-1], _ = programs["unit/loss"](
            heads(case), adapters[-1], flow, gradients[-1], table, packed_loss, start
        )
    for layer in reversed(range(case.model.num_layers)):
        program = programs[layer_program(case.model.kind_of[layer])]
        stack, at = sizes.stacks.place(layer)
        for start in starts:
            flow, gradients[stack], _ = program(
                case.params["layers"][layer],
                adapters[stack],
                pages[case.model.cache_of[layer]],
                finetune["saved"][layer],
                flow,
                gradients[stack],
                table,
                at,
                start,
            )
    total, expected = case.expected
    ours = batch.evaluate(flow["logprob"][: sum(LENGTHS)])[0].sum()
    assert ours == pytest.approx(total, rel=1e-5)
    by_layer = sizes.stacks.by_layer(gradients)
    assert len(expected) == 2 * len(case.adapter.weights)
    for (layer, module, factor), theirs in expected.items():
        ours = np.asarray(by_layer[layer][module][factor])
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-4, (layer, module, factor, error)


def peft_gradients(case, model=None):
    """Loss, and gradients of all factors in float64."""
    model = model or load_with_adapter(case.path, case.saved, torch.float64, is_trainable=True)
    total, gradients = 0.0, {}
    for tokens in map(torch.tensor, case.tokens):
        logits = model(tokens[None]).logits[0, :-1]
        own = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="sum")
        own.backward()
        total += own.item()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            path, factor = name.removeprefix("base_model.model.").split(".lora_")
            site = next(s for s in case.adapter.weights if case.model.names.module_path(*s) == path)
            gradients[*site, factor[0].lower()] = parameter.grad.T.numpy()
    return total, gradients


def test_no_field_could_be_another(case):
    """What the tests of a family compare with tells it from all that differ in one field."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), case.params)
    expected = case.base_logits

    def error(model):
        ours = by_fields.logits(model, params, case.tokens[0])
        return np.abs(ours - expected).max() / np.abs(expected).max()

    assert error(case.model) < 1e-5
    for name, model in mutants(case.model):
        assert error(model) > 1e-3, name  # ten times what it may be wrong by


def test_every_field_of_a_layer_is_changed_or_says_where_arrays_are():
    for kind, named in ARRAYS.items():
        assert {field.name for field in fields(kind)} == named | CHANGES[kind].keys(), kind
        assert not named & CHANGES[kind].keys()


def clear(module):
    """Zeros for all that it holds."""
    for parameter in module.parameters():
        parameter.zero_()


def test_exports_load_in_peft_and_transformers(case, tmp_path):
    tokens = case.tokens[0]
    expected = reference_logits(load_with_adapter(case.path, case.saved), tokens)
    save_adapter(case.adapter, case.model, case.path, tmp_path / "adapter")
    base = load_base(case.path, torch.float32)
    returned = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    np.testing.assert_allclose(reference_logits(returned, tokens), expected, atol=1e-5)
    of_layers = {s: w for s, w in case.adapter.weights.items() if s[1] != "head"}
    own = replace(case.adapter, weights=of_layers)
    save_merged(case.params, own, case.model, case.path, tmp_path / "merged")
    returned.get_submodule("base_model.model.lm_head.lora_B").requires_grad_(False).apply(clear)
    expected = reference_logits(returned, tokens)
    loaded = load_base(tmp_path / "merged", torch.float32, output_loading_info=True)
    merged, report = loaded
    assert not any(report.values()), report
    error = np.abs(reference_logits(merged.eval(), tokens) - expected).max()
    assert error < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("family", "adapters", "named"),
    [
        ("mistral", {"kinds": ["prefix"]}, "adapters.kinds: this model has a sliding window.*drop"),
        ("glm4", {"kinds": ["prefix"]}, "has rotary embeddings of some elements or of neighbours"),
        ("phi3", {"kinds": ["ia3"]}, "adapters.kinds: ia3 scales keys.* are fused.*; drop it"),
        ("qwen3_5", {"kinds": ["ia3"]}, "adapters.kinds: ia3 .* not in every layer; drop it"),
        ("qwen3_5", {"kinds": ["prefix"]}, "adapters.kinds: this model has layers that do not"),
        ("phi3", {"target_modules": ["q_proj"]}, "no such module; use one or more of o_proj, "),
    ],
)
def test_what_has_no_place_in_a_model_is_refused(tmp_path, family, adapters, named):
    path = getattr(checkpoints, f"make_{family}")(tmp_path)
    config = Config.model_validate({"model": {"path": path}, "adapters": adapters})
    with pytest.raises(ValueError, match=named):
        EngineSizes.from_config(config, ModelConfig.from_hf(path), "cpu", XLA)


@pytest.mark.parametrize("family", ["llama", "phi3", "glm4"])
def test_the_usual_seven_are_all_projections_of_every_model(tmp_path, family):
    model = ModelConfig.from_hf(getattr(checkpoints, f"make_{family}")(tmp_path))
    assert set(named_modules(SEVEN, model)) == model.kernel_shapes(0).keys()
    job = LoraConfig(r=2, alpha=2, target_modules=SEVEN)
    assert {module for _, module in job.targets(model)} == model.kernel_shapes(0).keys()


def test_an_adapter_of_the_text_alone_is_one_of_the_whole_model(case, tmp_path):
    """PEFT names modules as the class does that it was trained through; here either is read."""
    for file in case.saved.iterdir():
        shutil.copy(file, tmp_path)
    root, other = case.model.names.root, {"model": "model.language_model"}
    other = other.get(root, "model")
    file = tmp_path / "adapter_model.safetensors"
    renamed = {
        n.replace(f"base_model.model.{root}.", f"base_model.model.{other}."): t
        for n, t in load_file(file).items()
    }
    save_file(renamed, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    names = [n for n, m in TARGET_MODULES.items() if m in case.model.projections]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": names}))
    read = load_adapter(tmp_path, case.model, case.path)
    jax.tree.map(np.testing.assert_array_equal, dict(read.weights), dict(case.adapter.weights))
