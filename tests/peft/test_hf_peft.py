"""Adapters against PEFT: what it writes loads equal, what we write it loads equal, merged too."""

import json
import logging
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flexllm_jax.models.checkpoints.hf_tensors import read_kernel
from flexllm_jax.models.checkpoints.hf_weights import load_parameters
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import (
    Adapter,
    AdapterError,
    LoraConfig,
    init_adapter,
    merge_adapter,
)
from flexllm_jax.peft.bottleneck import BottleneckConfig
from flexllm_jax.peft.hf.peft import load_adapter, save_adapter, save_merged
from flexllm_jax.peft.ia3 import Ia3Config
from flexllm_jax.peft.prefix import PrefixConfig
from flexllm_jax.peft.principal import initialize_from_base
from tests.checkpoints import make_llama, make_olmo_hybrid, make_qwen2

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Names in the parameter tree, written out by hand.
SHORT = dict(zip(SEVEN, ["q", "k", "v", "o", "gate", "up", "down"], strict=True))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = make_llama(tmp_path_factory.mktemp("base"))
    return SimpleNamespace(path=path, config=ModelConfig.from_hf(path))


def peft_model(base, **options):
    """A PEFT model with random A and B."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def lora_layers(model):
    """{(layer, module): PEFT's LoRA layer} of a PEFT model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            parts = name.split(".layers.")[1].split(".")
            found[int(parts[0]), SHORT[parts[2]]] = module
    return found


def assert_same_adapter(adapter, model):
    theirs = lora_layers(model)
    assert adapter.weights.keys() == theirs.keys()
    for key, module in theirs.items():
        weights = adapter.weights[key]
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        np.testing.assert_array_equal(weights["a"], a.detach().float().numpy().T, err_msg=str(key))
        np.testing.assert_array_equal(weights["b"], b.detach().float().numpy().T, err_msg=str(key))
        assert adapter.config.scale(*key) == pytest.approx(module.scaling["default"])
        assert adapter.config.rank(*key) == module.r["default"]


CONFIGS = {
    "all seven": {"target_modules": SEVEN, "r": 4, "lora_alpha": 8},
    "one module": {"target_modules": ["down_proj"], "r": 2, "lora_alpha": 3, "lora_dropout": 0.1},
    "all-linear": {"target_modules": "all-linear", "r": 2},
    "suffixes": {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    "one full path": {"target_modules": ["model.layers.1.self_attn.q_proj", "up_proj"]},
    "regular expression": {"target_modules": r".*\.0\.self_attn\.[qv]_proj|.*\.1\.mlp\..*_proj"},
    "excluded": {"target_modules": SEVEN, "exclude_modules": ["layers.0.mlp.up_proj", "k_proj"]},
    "excluded by expression": {"target_modules": SEVEN, "exclude_modules": r".*layers\.1\..*"},
    "one layer": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": 0},
    "listed layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "layers under a pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "a full path in a layer that is not listed": {
        "target_modules": ["model.layers.1.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [0],
    },
    "names that match nothing": {"target_modules": ["q_proj", "c_attn", "layers.7.mlp.up_proj"]},
    "an excluded full path": {
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": ["model.layers.0.mlp.up_proj", "v_proj"],
    },
    "rslora": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "target_modules": SEVEN,
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6, "0.mlp.up_proj": 3},
        "alpha_pattern": {"layers.0.self_attn.k_proj": 3, "v_proj": 5, "j_proj": 9},
    },
    "patterns that overlap": {
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": True,
        "rank_pattern": {"0.self_attn.q_proj": 2, "q_proj": 3, r"u.*_proj": 5},
        "alpha_pattern": {r"layers\.1\..*": 4, r"model\.layers\.\d\.mlp\.up_proj": 7},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_peft_loads_and_goes_back(base, tmp_path, name):
    original = peft_model(base, **CONFIGS[name])
    original.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs", base.config, base.path)
    assert_same_adapter(adapter, original)

    save_adapter(adapter, base.config, base.path, tmp_path / "ours")
    exported = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert exported.base_model_name_or_path == str(base.path)
    assert exported.lora_dropout == CONFIGS[name].get("lora_dropout", 0.0)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    returned = peft.PeftModel.from_pretrained(model, tmp_path / "ours")
    assert_same_adapter(adapter, returned)
    ids = torch.arange(16)[None]
    assert torch.equal(returned(ids).logits, original.eval()(ids).logits)
    again = load_adapter(tmp_path / "ours", base.config)
    assert again.config.target_modules == adapter.config.target_modules
    assert again.weights.keys() == adapter.weights.keys()


def test_of_overlapping_patterns_the_first_counts_after_export_too(base, tmp_path):
    # PEFT itself sorts the patterns when it saves, so such an adapter can only come from here.
    config = LoraConfig(
        r=8,
        alpha=8,
        target_modules=("q_proj", "up_proj"),
        rank_pattern={"q_proj": 3, r"layers\.0\..*": 2, r".*_proj": 5},
        alpha_pattern={"up_proj": 7, "0.mlp.up_proj": 9, r".*": 4},
    )
    adapter = init_adapter(config, base.config, seed=0)
    save_adapter(adapter, base.config, base.path, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    assert_same_adapter(adapter, peft.PeftModel.from_pretrained(model, tmp_path))
    ranks = {key: weights["a"].shape[1] for key, weights in adapter.weights.items()}
    assert ranks == {(0, "q"): 3, (0, "up"): 2, (1, "q"): 3, (1, "up"): 5}


def test_a_name_that_two_kinds_of_mixers_share_means_both(tmp_path):
    """Also to patterns, by which they can be told apart."""
    path = make_olmo_hybrid(tmp_path / "model")
    config = ModelConfig.from_hf(path)
    ranks = {"linear_attn.q_proj": 2, "self_attn.q_proj": 3, r"layers\.0\.linear_attn\..*": 5}
    targets, names = ("q_proj", "v_proj"), config.names
    own = LoraConfig(8, 8, targets, rank_pattern=ranks, alpha_pattern=ranks, names=names)
    adapter = init_adapter(own, config, seed=0)
    found = {key: weights["a"].shape[1] for key, weights in adapter.weights.items()}
    assert found == {(0, "q"): 2, (0, "v"): 5, (1, "q"): 3, (1, "v"): 8}
    save_adapter(adapter, config, path, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(path)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    theirs = {n: m.r["default"] for n, m in theirs.named_modules() if hasattr(m, "lora_A")}
    layers = "base_model.model.model.layers"
    assert theirs == {
        f"{layers}.0.linear_attn.q_proj": 2,
        f"{layers}.0.linear_attn.v_proj": 5,
        f"{layers}.1.self_attn.q_proj": 3,
        f"{layers}.1.self_attn.v_proj": 8,
    }


def test_a_bfloat16_adapter_becomes_float32(base, tmp_path):
    model = peft_model(base, target_modules=["q_proj"]).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    adapter = load_adapter(tmp_path, base.config)
    assert_same_adapter(adapter, model)
    assert adapter.weights[0, "q"]["a"].dtype == np.float32


def test_a_new_adapter_is_distributed_as_pefts_and_changes_nothing(base, tmp_path):
    config = LoraConfig(r=32, alpha=8, target_modules=tuple(SEVEN), rank_pattern={"o_proj": 16})
    adapter = init_adapter(config, base.config, seed=3)
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base.path),
        peft.LoraConfig(r=32, target_modules=SEVEN, rank_pattern={"o_proj": 16}),
    )
    for key, module in lora_layers(theirs).items():
        ours, reference = adapter.weights[key], module.lora_A["default"].weight.detach().numpy().T
        assert ours["a"].shape == reference.shape
        assert np.abs(ours["a"]).max() == pytest.approx(np.abs(reference).max(), rel=0.02)
        assert ours["a"].std() == pytest.approx(reference.std(), rel=0.1)
        assert not ours["b"].any()
    assert adapter.weights.keys() == lora_layers(theirs).keys()
    save_adapter(adapter, base.config, base.path, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    ids = torch.arange(16)[None]
    expected = model(ids).logits
    assert torch.equal(peft.PeftModel.from_pretrained(model, tmp_path)(ids).logits, expected)


def test_a_new_adapter_depends_on_its_seed_only(base):
    both = LoraConfig(r=4, alpha=8, target_modules=("q_proj", "up_proj"))
    one = LoraConfig(r=4, alpha=8, target_modules=("up_proj",), layers_to_transform=(1,))
    wide, narrow = init_adapter(both, base.config, seed=1), init_adapter(one, base.config, seed=1)
    assert narrow.weights.keys() == {(1, "up")}
    np.testing.assert_array_equal(wide.weights[1, "up"]["a"], narrow.weights[1, "up"]["a"])
    other = init_adapter(one, base.config, seed=2)
    assert not np.array_equal(other.weights[1, "up"]["a"], narrow.weights[1, "up"]["a"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["patterns", "regular expression"])
def test_a_merged_checkpoint_is_pefts_merge_and_unload(tmp_path, dtype, name):
    path = make_qwen2(tmp_path / "base", tie=True, dtype=dtype)
    base = SimpleNamespace(path=path, config=ModelConfig.from_hf(path))
    model = peft_model(base, **CONFIGS[name])
    model.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", base.config)
    params = load_parameters(path, base.config, jnp.dtype(dtype))
    before = jax.tree.map(np.asarray, params)
    save_merged(params, adapter, base.config, path, tmp_path / "merged")

    expected = model.merge_and_unload().state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    original = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert merged.keys() == expected.keys()
    # Summation order differs; in bfloat16 that may round one value in many the other way.
    tolerance = {"float32": 1e-6, "bfloat16": 2**-7}[dtype]
    changed = 0
    for key, tensor in expected.items():
        assert merged[key].dtype == tensor.dtype
        torch.testing.assert_close(merged[key], tensor, rtol=tolerance, atol=1e-6)
        assert (merged[key] != tensor).float().mean() < 0.01 or dtype == "float32"
        changed += not torch.equal(merged[key], original[key])
    assert changed == len(adapter.weights)

    on_device = merge_adapter(params, adapter)
    for layer, module in adapter.weights:
        name = {short: name for name, short in SHORT.items()}[module]
        block = "self_attn" if name in SEVEN[:4] else "mlp"
        tensor = expected[f"model.layers.{layer}.{block}.{name}.weight"].float().numpy().T
        kernel = np.asarray(on_device["layers"][layer][module]["kernel"], np.float32)
        np.testing.assert_allclose(kernel, tensor, rtol=tolerance, atol=1e-6)
    assert on_device["embed"]["weight"] is params["embed"]["weight"]
    jax.tree.map(np.testing.assert_array_equal, params, before)


def starts(base, init, rank=4):
    """scale * (A, B) of an adapter that starts from the base weights, and the kernels' own."""
    config = LoraConfig(rank, 12, tuple(SEVEN), init=init).difference()

    def decaying(layer, module):
        """With singular values 1, 1/2, 1/4, ..."""
        u, _, v = np.linalg.svd(read_kernel(base.path, base.config, layer, module))
        size = min(len(u), len(v))
        return ((u[:, :size] * 0.5 ** np.arange(size)) @ v[:size]).astype(np.float32)

    for (layer, module), own in initialize_from_base(config, base.config, 3, decaying).items():
        a, b = own["a"], own["b"]
        np.testing.assert_array_equal(a[:, :rank], a[:, rank:])
        np.testing.assert_array_equal(b[:rank], -b[rank:])
        scale = config.scale(layer, module)
        assert scale == 12 / rank
        yield decaying(layer, module), scale, a[:, :rank], b[:rank]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8"])
def test_pissa_starts_from_the_largest_singular_values(base, init):
    for kernel, scale, a, b in starts(base, init):
        left = np.linalg.svd(kernel - scale * a @ b, compute_uv=False)
        np.testing.assert_allclose(left[:3], 0.5 ** np.arange(4, 7), rtol=1e-4)


def test_olora_starts_from_orthonormal_factors(base):
    for kernel, _, a, b in starts(base, "olora"):
        np.testing.assert_allclose(b @ b.T, np.eye(4), atol=1e-5)
        np.testing.assert_allclose(a[:4] @ b, kernel[:4], atol=1e-5)


def test_a_gaussian_start_is_distributed_as_pefts(base):
    own = init_adapter(LoraConfig(8, 8, ("q_proj",), init="gaussian"), base.config, seed=1)
    model = AutoModelForCausalLM.from_pretrained(base.path)
    options = {"r": 8, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"}
    theirs = lora_layers(peft.get_peft_model(model, peft.LoraConfig(**options)))
    for key, weights in own.weights.items():
        deviation = theirs[key].lora_A["default"].weight.detach().numpy().std()
        assert weights["a"].std() == pytest.approx(deviation, rel=0.15)
        assert not weights["b"].any()


def test_a_rank_beyond_the_base_weights(base):
    with pytest.raises(AdapterError, match=r"r=4096: init=olora takes at most rank \d+"):
        list(starts(base, "olora", rank=4096))


def test_merging_with_donation_reuses_the_kernels_memory(base):
    config = LoraConfig(r=4, alpha=8, target_modules=("q_proj",))
    weights = init_adapter(config, base.config, seed=0).weights
    ones = {key: {"a": w["a"], "b": np.ones_like(w["b"])} for key, w in weights.items()}
    params = load_parameters(base.path, base.config, jnp.float32)
    expected = merge_adapter(params, Adapter(config, ones))
    merged = merge_adapter(params, Adapter(config, ones), donate=True)
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
    assert params["layers"][0]["q"]["kernel"].is_deleted()
    assert not params["layers"][0]["k"]["kernel"].is_deleted()


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    peft_model(base, target_modules=["q_proj"], r=4).save_pretrained(path)
    return path


def copy_with(saved, path, fields=None, tensors=None):
    """A copy of an adapter with fields of its config replaced, and its tensors edited."""
    raw = json.loads((saved / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(raw | (fields or {})))
    stored = load_file(saved / "adapter_model.safetensors")
    (tensors or (lambda stored: None))(stored)
    save_file(stored, path / "adapter_model.safetensors")
    return path


def refusal(path, model_config):
    with pytest.raises(AdapterError) as error:
        load_adapter(path, model_config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "VERA"),
        ("use_dora", True),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("lora_bias", True),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("kasa_config", {"beta": 1e-4}),
        ("target_modules", ["q_proj", "embed_tokens"]),
        ("target_modules", ["embed_tokens"]),
        ("target_modules", ["c_attn"]),
        ("target_modules", ["model.layers.7.self_attn.q_proj"]),
        ("target_modules", r".*(q_proj|embed_tokens)"),
        ("target_modules", "nothing"),
        ("target_modules", "(q_proj"),
        ("target_modules", None),
        ("layers_to_transform", [5]),
        ("r", 0),
        ("rank_pattern", {"q_proj": "8"}),
    ],
)
def test_what_is_not_supported_is_refused_by_name(base, saved, tmp_path, field, value):
    message = refusal(copy_with(saved, tmp_path, {field: value}), base.config)
    assert "adapter_config.json" in message
    named = "target_modules" if field == "layers_to_transform" else field
    assert named in message
    if isinstance(value, str):
        assert repr(value) in message


def test_an_adapter_of_another_base_model_is_refused(base, saved, tmp_path):
    other = make_llama(tmp_path / "other", num_heads=8)
    message = refusal(saved, ModelConfig.from_hf(other))
    assert "model.layers.0.self_attn.q_proj.lora_B.weight has shape [64, 4]" in message
    assert "[128, 4]" in message
    assert str(base.path) in message

    shallow = make_llama(tmp_path / "shallow", num_hidden_layers=1)
    assert "model.layers.1.self_attn.q_proj" in refusal(saved, ModelConfig.from_hf(shallow))


def test_missing_and_extra_tensors_are_named(base, saved, tmp_path):
    prefix = "base_model.model.model.layers.1.self_attn"
    path = copy_with(saved, tmp_path, tensors=lambda t: t.pop(f"{prefix}.q_proj.lora_B.weight"))
    assert f"{prefix}.q_proj.lora_B.weight is missing" in refusal(path, base.config)
    extra = {f"{prefix}.q_proj.lora_magnitude_vector": torch.ones(64)}
    path = copy_with(saved, tmp_path, tensors=lambda t: t.update(extra))
    assert "q_proj.lora_magnitude_vector" in refusal(path, base.config)
    path = copy_with(saved, tmp_path, {"r": 8})
    assert "has shape [4, 64]" in refusal(path, base.config)


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    make_qwen2(path, tie=request.param == "tied", dtype="bfloat16")
    return SimpleNamespace(path=path, config=ModelConfig.from_hf(path))


class TestWeightsOfTheBaseModel:
    """PEFT saves embeddings and head too, with the head as a target or when asked to. The base
    model is shared: copies are left out and said, changed ones refused."""

    def save(self, base, path, change=lambda model: None, dtype=torch.float32, **options):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)
        if size := options.pop("size", None):
            model.resize_token_embeddings(size)
        options = {"target_modules": ["q_proj"]} | options
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options))
        with torch.no_grad():
            change(model)
        model.save_pretrained(path, save_embedding_layers="auto" if size else True)
        return path

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("modules", [["q_proj"], ["q_proj", "lm_head"]])
    def test_copies_are_left_out_and_said(self, model, tmp_path, caplog, dtype, modules):
        path = self.save(model, tmp_path, dtype=dtype, target_modules=modules)
        stored = load_file(path / "adapter_model.safetensors").keys()
        copies = [name for name in stored if "lora_" not in name]
        assert copies
        with caplog.at_level(logging.WARNING):
            adapter = load_adapter(path, model.config, model.path)
        assert len(adapter.weights) == 2 + ("lm_head" in modules)
        assert all(name in caplog.text for name in copies) and "are not used" in caplog.text
        assert load_adapter(path, model.config).weights.keys() == adapter.weights.keys()

    @pytest.mark.parametrize("size", [100, 140])
    def test_resized_ones_are_refused(self, model, tmp_path, size):
        message = refusal(self.save(model, tmp_path, size=size), model.config)
        assert f"[{size}, 64] is not the base model's" in message

    def test_a_changed_value_is_refused(self, model, tmp_path):
        def change(peft_model):
            peft_model.get_input_embeddings().weight[-1, -1] += 0.1

        message = refusal(self.save(model, tmp_path, change), model.config)
        assert "embed_tokens.weight" in message or "lm_head.weight" in message
        assert "is not the base model's" in message

    def test_so_is_a_changed_head(self, base, tmp_path):
        def change(peft_model):
            peft_model.get_output_embeddings().weight[3] = 0

        assert "lm_head.weight" in refusal(self.save(base, tmp_path, change), base.config)

    def test_any_other_weight_of_the_base_model(self, base, saved, tmp_path, caplog):
        name = "model.layers.0.input_layernorm.weight"
        norm = load_file(base.path / "model.safetensors")[name]
        extra = {f"base_model.model.{name}": norm}
        load_adapter(copy_with(saved, tmp_path, tensors=lambda t: t.update(extra)), base.config)
        assert name in caplog.text
        extra = {f"base_model.model.{name}": norm * 1.01}
        path = copy_with(saved, tmp_path, tensors=lambda t: t.update(extra))
        assert f"{name} [64] is not the base model's" in refusal(path, base.config)

    def test_what_cannot_be_compared_is_refused(self, model, tmp_path):
        path = self.save(model, tmp_path)
        raw = json.loads((path / "adapter_config.json").read_text())
        raw["base_model_name_or_path"] = "someone/some-model"
        (path / "adapter_config.json").write_text(json.dumps(raw))
        assert "is not the base model's" in refusal(path, model.config)
        load_adapter(path, model.config, model.path)

    @pytest.mark.parametrize("kind", ["ia3", "prefix", "bottleneck"])
    def test_in_adapters_of_other_kinds(self, base, tmp_path, caplog, kind):
        configs = {
            "ia3": Ia3Config(),
            "prefix": PrefixConfig(4),
            "bottleneck": BottleneckConfig(4),
        }
        adapter = init_adapter(configs[kind], base.config, seed=0)
        save_adapter(adapter, base.config, base.path, tmp_path)
        file = tmp_path / "adapter_model.safetensors"
        stored = load_file(file)
        embeddings = load_file(base.path / "model.safetensors")["model.embed_tokens.weight"]
        name = "base_model.model.model.embed_tokens.weight"
        save_file({**stored, name: embeddings}, file)
        with caplog.at_level(logging.WARNING):
            load_adapter(tmp_path, base.config, base.path)
        assert name in caplog.text
        save_file({**stored, name: embeddings + 1}, file)
        assert f"{name} [128, 64] is not the base model's" in refusal(tmp_path, base.config)
        save_file({**stored, "base_model.model.model.layers.0.extra": embeddings}, file)
        assert "layers.0.extra" in refusal(tmp_path, base.config)


def test_missing_and_broken_files_are_named(base, saved, tmp_path):
    assert "adapter_config.json does not exist" in refusal(tmp_path, base.config)
    path = copy_with(saved, tmp_path)
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "not a whole safetensors file" in refusal(path, base.config)
    file.unlink()
    assert "adapter_model.safetensors does not exist" in refusal(path, base.config)
    (path / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in refusal(path, base.config)


def test_unknown_fields_and_another_base_model_name_are_only_logged(base, saved, tmp_path, caplog):
    path = copy_with(saved, tmp_path, {"future_option": 3, "lora_dropout": 0.5})
    with caplog.at_level(logging.WARNING):
        load_adapter(path, base.config, "models/some-other-model")
    assert "future_option=3 is ignored" in caplog.text
    assert "some-other-model" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_adapter(saved, base.config, base.path)
    assert not caplog.records


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_modules": ("embed_tokens",)}, "embed_tokens"),
        ({"target_modules": ()}, "target_modules"),
        ({"r": -1}, "r=-1"),
        ({"alpha": "16"}, "alpha='16'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']=0"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern['(']"),
        ({"layers_to_transform": (2,)}, "layers_to_transform=[2]"),
    ],
)
def test_a_config_that_means_nothing_is_refused(base, fields, named):
    with pytest.raises(AdapterError) as error:
        init_adapter(
            LoraConfig(**({"r": 4, "alpha": 8, "target_modules": ("q_proj",)} | fields)),
            base.config,
            seed=0,
        )
    assert named in str(error.value)


def test_saving_refuses_weights_that_the_config_does_not_describe(base, tmp_path):
    adapter = init_adapter(LoraConfig(4, 8, ("q_proj",)), base.config, seed=0)
    wrong = Adapter(LoraConfig(8, 8, ("q_proj",)), adapter.weights)
    with pytest.raises(AdapterError, match=r"layers\.0\.self_attn\.q_proj"):
        save_adapter(wrong, base.config, base.path, tmp_path)
    assert not any(tmp_path.iterdir())
