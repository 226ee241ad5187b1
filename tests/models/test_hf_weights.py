"""Weights against transformers: what it wrote loads equal, what we write it loads equal."""

import json
import logging
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flexllm_jax.models.checkpoints.hf_tensors import fingerprint
from flexllm_jax.models.checkpoints.hf_weights import (
    WeightsError,
    abstract_parameters,
    load_parameters,
    save_parameters,
)
from flexllm_jax.models.config import ModelConfig
from tests.checkpoints import make_llama, make_mistral, make_olmo_hybrid, make_qwen2, make_qwen3

MODULES = {
    "pre_attn_norm": "input_layernorm",
    "pre_mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def state_of(params, tied):
    """The tree under Hugging Face's names, written out by hand, as float32 numpy arrays."""
    state = {
        "model.embed_tokens.weight": params["embed"]["weight"],
        "model.norm.weight": params["norm"]["weight"],
        "lm_head.weight": params["embed" if tied else "head"]["weight"],
    }
    for i, layer in enumerate(params["layers"]):
        for module, leaves in layer.items():
            for kind, array in leaves.items():
                name = f"model.layers.{i}.{MODULES[module]}"
                name += ".bias" if kind == "bias" else ".weight"
                state[name] = array.T if kind == "kernel" else array
    return {name: np.asarray(array, np.float32) for name, array in state.items()}


def assert_same_state(ours, model):
    theirs = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


CHECKPOINTS = {
    "llama": (make_llama, {}),
    "llama-bfloat16-sharded": (make_llama, {"dtype": "bfloat16", "sharded": True}),
    "llama-attention-bias": (make_llama, {"attention_bias": True}),
    "qwen2-tied": (make_qwen2, {"tie": True}),
    "qwen2-float16": (make_qwen2, {"dtype": "float16"}),
    "qwen3-tied-sharded": (make_qwen3, {"tie": True, "sharded": True, "head_dim": 32}),
    "mistral": (make_mistral, {}),
    "qwen3-many-heads": (make_qwen3, {"num_heads": 8, "num_kv_heads": 8}),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_loads_as_in_transformers_and_goes_back(tmp_path, name):
    make, options = CHECKPOINTS[name]
    source = make(tmp_path / "source", **options)
    assert options.get("sharded", False) == (len(list(source.glob("*.safetensors"))) > 1)
    config = ModelConfig.from_hf(source)
    dtype = jnp.dtype(options.get("dtype", "float32"))
    params = load_parameters(source, config, dtype)
    original = AutoModelForCausalLM.from_pretrained(source)
    assert_same_state(state_of(params, config.head.tied), original)

    save_parameters(params, config, source, tmp_path / "saved", max_shard_bytes=60_000)
    saved, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(report.values()), report
    assert saved.dtype == original.dtype
    assert_same_state(state_of(params, config.head.tied), saved)
    ids = torch.arange(12)[None]
    assert torch.equal(saved(ids).logits, original(ids).logits)


def test_the_abstract_tree_is_the_loaded_one(tmp_path):
    for make in (make_llama, make_qwen2, make_qwen3):
        source = make(tmp_path / make.__name__)
        config = ModelConfig.from_hf(source)
        loaded = load_parameters(source, config, jnp.bfloat16)
        described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), loaded)
        assert described == abstract_parameters(config, jnp.bfloat16)


def test_weights_are_cast_to_the_dtype_asked_for(tmp_path):
    source = make_llama(tmp_path, dtype="float32")
    config = ModelConfig.from_hf(source)
    params = load_parameters(source, config, jnp.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert_same_state(state_of(params, tied=False), model)


def test_a_tied_checkpoint_that_stores_its_head_anyway_loads(tmp_path):
    source = make_qwen2(tmp_path, tie=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    params = load_parameters(source, ModelConfig.from_hf(source), jnp.float32)
    assert "head" not in params


def test_parameters_go_where_they_are_sent(tmp_path):
    source = make_llama(tmp_path)
    config = ModelConfig.from_hf(source)
    expected = load_parameters(source, config, jnp.float32)
    device = jax.devices()[0]
    mesh = Mesh(np.array([device]), ("tp",))
    replicated = NamedSharding(mesh, PartitionSpec())
    columns = NamedSharding(mesh, PartitionSpec(None, "tp"))
    tree = jax.tree.map(
        lambda leaf: columns if leaf.ndim == 2 else replicated,
        abstract_parameters(config, jnp.float32),
    )
    for target in (device, replicated, tree):
        params = load_parameters(source, config, jnp.float32, target)
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        assert all(leaf.committed for leaf in jax.tree.leaves(params))
    assert params["layers"][0]["q"]["kernel"].sharding == columns
    assert params["norm"]["weight"].sharding == replicated


@pytest.mark.parametrize("sharded", [False, True])
def test_loading_never_holds_two_tensors_on_the_host(tmp_path, sharded):
    source = make_llama(
        tmp_path,
        tie=True,
        sharded=sharded,
        num_hidden_layers=16,
        hidden_size=256,
        intermediate_size=1024,
    )
    config = ModelConfig.from_hf(source)
    largest = 256 * 1024 * 4
    total = sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract_parameters(config, "float32")))
    assert total > 40 * largest
    load_parameters(source, config, jnp.float32)  # compiles, which allocates too
    tracemalloc.start()
    params = load_parameters(source, config, jnp.float32)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    del params
    assert peak < 1.5 * largest


def rewrite(source, edit):
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def load(source):
    return load_parameters(source, ModelConfig.from_hf(source), jnp.float32)


def refusal(source):
    with pytest.raises(WeightsError) as error:
        load(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_fingerprint_is_of_the_weights_whatever_files_they_lie_in(tmp_path):
    path = make_llama(tmp_path / "one")
    config = ModelConfig.from_hf(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "sharded", config) == fingerprint(path, config)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.add_(1e-3)  # as a merged adapter does
    model.save_pretrained(tmp_path / "other")
    assert fingerprint(tmp_path / "other", config) != fingerprint(path, config)


def test_a_missing_tensor_is_named(tmp_path):
    source = make_llama(tmp_path)
    rewrite(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight is missing" in refusal(source)


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path):
    source = make_llama(tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    message = refusal(source)
    assert "model.layers.0.mlp.gate_proj.weight" in message
    assert "[96, 64]" in message
    assert "[128, 64]" in message


def test_a_convolution_in_parts_is_read_and_written_so(tmp_path):
    """As published: transformers cuts it elsewhere, and has one more name for a norm."""
    source = make_olmo_hybrid(tmp_path / "source")
    delta, norms = "model.layers.0.linear_attn", "model.layers.1"

    def as_published(tensors):
        parts = [tensors.pop(f"{delta}.{name}_conv1d.weight") for name in "qkv"]
        cut = torch.split(torch.cat(parts), [16, 16, 64])
        for name, part in zip("qkv", cut, strict=True):
            tensors[f"{delta}.{name}_conv1d.weight"] = part.clone()
        norm = tensors.pop(f"{norms}.feedforward_layer_norm.weight")
        tensors[f"{norms}.post_attention_layernorm.weight"] = norm

    rewrite(source, as_published)
    config, params = ModelConfig.from_hf(source), load(source)
    theirs = AutoModelForCausalLM.from_pretrained(source).state_dict()
    convolution, first, second = params["layers"][0]["conv"]["weight"], *params["layers"]
    expected = theirs[f"{delta}.conv1d.weight"].numpy()[:, 0].T
    np.testing.assert_array_equal(convolution, expected)
    for norm, name in (
        (first["pre_attn_norm"], "model.layers.0.input_layernorm"),
        (first["pre_mlp_norm"], "model.layers.0.post_attention_layernorm"),
        (second["post_attn_norm"], f"{norms}.post_attention_layernorm"),
    ):
        np.testing.assert_array_equal(norm["weight"], theirs[f"{name}.weight"])

    save_parameters(params, config, source, tmp_path / "saved", max_shard_bytes=60_000)
    saved = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        saved |= load_file(file)
    stored = load_file(source / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[name], stored[name]) for name in stored)
    rewrite(source, lambda tensors: tensors.pop(f"{delta}.k_conv1d.weight"))
    assert f"parts of tensor {delta}.conv1d.weight have [16, 64] rows, but config" in refusal(
        source
    )


def test_quantized_tensors_are_refused(tmp_path):
    source = make_llama(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(source, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert f"{name} has dtype I8" in refusal(source)


def test_missing_and_truncated_files_are_named(tmp_path):
    sharded = make_llama(tmp_path / "sharded", sharded=True)
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.rename(shard.with_suffix(".away"))
    assert f"{shard.name} is missing" in refusal(sharded)

    single = make_llama(tmp_path / "single")
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors is not a whole safetensors file" in refusal(single)
    file.unlink()
    assert "has neither model.safetensors nor" in refusal(single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scaling", [None, "llama3"])
def test_stored_rotary_frequencies_must_be_those_that_are_used(tmp_path, caplog, dtype, scaling):
    """Transformers 4.30 and earlier stored them."""
    source = make_llama(tmp_path, rope_scaling=scaling)
    frequencies = AutoModelForCausalLM.from_pretrained(source).model.rotary_emb.inv_freq.to(dtype)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(source, lambda tensors: tensors.update({name: frequencies}))
    with caplog.at_level(logging.WARNING):
        load(source)
    assert not caplog.records
    for other in (frequencies * 1.05, torch.ones(8), frequencies[:4]):
        rewrite(source, lambda tensors, other=other: tensors.update({name: other.clone()}))
        assert f"tensor {name} is not what rope_theta" in refusal(source)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_beside_tied_embeddings_must_be_them(tmp_path, dtype):
    source = make_qwen2(tmp_path, tie=True, dtype=dtype)
    embeddings = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    other = embeddings.clone()
    other[-1, -1] += 1
    for head in (other, embeddings[:-1], embeddings.flip(0)):
        rewrite(source, lambda t, head=head: t.update({"lm_head.weight": head.contiguous()}))
        message = refusal(source)
        assert "lm_head.weight is not the embeddings" in message
        assert "tie_word_embeddings" in message
    wide = {"lm_head.weight": embeddings.double()}
    rewrite(source, lambda tensors: tensors.update(wide))
    load(source)


@pytest.mark.parametrize(
    "name",
    ["lm_head.bias", "model.norm.bias", "model.embed_tokens.scale", "model.layers.1.mlp.gate.bias"],
)
def test_tensors_of_what_is_used_are_never_left_out(tmp_path, name):
    source = make_llama(tmp_path)
    rewrite(source, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert f"tensor {name} has no place in LlamaForCausalLM" in refusal(source)


def test_tensors_without_a_place_matter_only_inside_a_layer(tmp_path, caplog):
    source = make_llama(tmp_path)
    rewrite(source, lambda tensors: tensors.update({"value_head.weight": torch.ones(8)}))
    with caplog.at_level(logging.WARNING):
        load(source)
    assert "value_head.weight" in caplog.text

    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    rewrite(source, lambda tensors: tensors.update(bias))
    assert "model.layers.0.self_attn.q_proj.bias has no place" in refusal(source)


def test_saving_copies_what_belongs_to_the_model_and_nothing_else(tmp_path):
    source = make_llama(tmp_path / "source", sharded=True)
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "LICENSE"):
        (source / name).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    config = ModelConfig.from_hf(source)
    params = load_parameters(source, config, jnp.bfloat16)
    out = tmp_path / "out"
    save_parameters(params, config, source, out)
    assert {file.name for file in out.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("chat_template.jinja", "merges.txt", "LICENSE", "additional_chat_templates"),
    }
    copied = out / "additional_chat_templates" / "tool_use.jinja"
    assert copied.read_text() == "{{ tools }}"
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    assert {file.name for file in tmp_path.iterdir()} == {"source", "out"}


def test_saving_never_overwrites(tmp_path):
    source = make_llama(tmp_path)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    config = ModelConfig.from_hf(source)
    params = load_parameters(source, config, jnp.float32)
    with pytest.raises(WeightsError, match="not empty"):
        save_parameters(params, config, source, source)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
