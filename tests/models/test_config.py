"""ModelConfig against transformers' own reading of the same files, and what it refuses."""

import json

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.families import FAMILIES
from flexllm_jax.models.fields import ModelConfigError
from flexllm_jax.models.rope import Llama3Scaling, ProportionalScaling, rotary_frequencies
from flexllm_jax.models.spec import AttentionSpec, GatedDeltaSpec
from kernels_pallas.layer_options import AttentionOptions
from tests.checkpoints import LLAMA3_ROPE

# config.json as published for these models (older transformers wrote them), shortened.
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
QWEN_2_5_0_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.0.dev0",
    "use_cache": True,
    "vocab_size": 32768,
}
PHI_4_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 199999,
    "embd_pdrop": 0.0,
    "eos_token_id": 199999,
    "full_attn_mod": 1,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "interpolate_factor": 1,
    "lm_head_bias": False,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "phi3",
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "long_factor": [1 + i / 8 for i in range(48)],
        "short_factor": [1.0] * 48,
        "type": "longrope",
    },
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 200064,
}
GLM_4_9B = {
    "architectures": ["Glm4ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": [151329, 151336, 151338],
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "max_position_embeddings": 32768,
    "model_type": "glm4",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151552,
}
GEMMA_4_31B = {
    "architectures": ["Gemma4ForCausalLM"],
    "attention_k_eq_v": True,
    "bos_token_id": 2,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 512,
    "head_dim": 256,
    "hidden_size": 5376,
    "hidden_size_per_layer_input": 0,
    "intermediate_size": 21504,
    "max_position_embeddings": 262144,
    "model_type": "gemma4_text",
    "num_attention_heads": 32,
    "num_global_key_value_heads": 4,
    "num_hidden_layers": 60,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "sliding_window": 1024,
    "tie_word_embeddings": True,
    "vocab_size": 262144,
}
PUBLISHED = {
    "llama": LLAMA_3_1_8B,
    "qwen2": QWEN_2_5_0_5B,
    "qwen3": QWEN_3_0_6B,
    "mistral": MISTRAL_7B,
    "phi3": PHI_4_MINI,
    "glm4": GLM_4_9B,
    "gemma4": GEMMA_4_31B,
}


def write(directory, config, generation=None):
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def assert_as_transformers_reads_it(directory):
    ours, theirs = ModelConfig.from_hf(directory), AutoConfig.from_pretrained(directory)
    assert [ours.architecture] == theirs.architectures
    assert ours.vocab_size == theirs.vocab_size
    assert ours.d_model == theirs.hidden_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.layers[0].mlp.d_ff == theirs.intermediate_size
    eps = getattr(theirs, "rms_norm_eps", None) or theirs.layer_norm_eps
    assert ours.layers[0].norm.eps == eps
    assert ours.head.tied == theirs.tie_word_embeddings
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    kinds = getattr(theirs, "layer_types", None) or ["all"] * ours.num_layers
    by_layer = theirs.per_layer_config if theirs.is_heterogeneous else [theirs] * ours.num_layers
    for i, (layer, kind) in enumerate(zip(ours.layers, kinds, strict=True)):
        attention, theirs_there = layer.mixer, by_layer[i]
        if isinstance(attention, GatedDeltaSpec):
            assert kind == "linear_attention"
            assert attention.key_heads == theirs.linear_num_key_heads
            assert attention.value_heads == theirs.linear_num_value_heads
            assert attention.key_dim == theirs.linear_key_head_dim
            assert attention.value_dim == theirs.linear_value_head_dim
            assert attention.width == theirs.linear_conv_kernel_dim
            negative = getattr(theirs, "linear_allow_neg_eigval", False)
            assert attention.beta_scale == (2.0 if negative else 1.0)
            continue
        assert isinstance(attention, AttentionSpec)
        assert attention.heads == theirs.num_attention_heads
        assert attention.kv_heads == theirs_there.num_key_value_heads
        head_dim = getattr(theirs_there, "head_dim", None)
        assert attention.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
        rope, own = theirs.rope_parameters, attention.rope
        rope = rope.get(kind, rope)
        if own is None:
            assert rope["rope_theta"] is None
            continue
        assert own.theta == rope["rope_theta"]
        rotated = own.rotated or attention.head_dim
        if isinstance(own.scaling, ProportionalScaling):
            rotated = 2 * own.scaling.turned
        assert rotated == int(attention.head_dim * rope.get("partial_rotary_factor", 1))
        assert (own.scaling is None) == (rope["rope_type"] == "default")
        for name, value in vars(own.scaling).items() if own.scaling else ():
            assert value == rope.get(name, value)
    slides = (getattr(theirs, "sliding_window", None),) * ours.num_layers
    if kinds := getattr(theirs, "layer_types", None):
        pairs = zip(slides, kinds, strict=True)
        slides = tuple(own if kind == "sliding_attention" else None for own, kind in pairs)
    windows = (getattr(layer.mixer, "options", AttentionOptions()).window for layer in ours.layers)
    assert tuple(windows) == slides
    return ours


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_config_reads_as_in_transformers(tmp_path, model):
    assert_as_transformers_reads_it(write(tmp_path, PUBLISHED[model]))


@pytest.mark.parametrize("model", PUBLISHED)
def test_transformers_5_writes_it_in_another_form_and_it_reads_the_same(tmp_path, model):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    AutoConfig.from_pretrained(write(old, PUBLISHED[model])).save_pretrained(new)
    assert "rope_parameters" in json.loads((new / "config.json").read_text())
    assert assert_as_transformers_reads_it(new) == ModelConfig.from_hf(old)


@pytest.mark.parametrize("model", PUBLISHED)
def test_absent_optional_fields_take_transformers_defaults(tmp_path, model):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    needed = (*sizes, "architectures", "model_type")
    config = {key: PUBLISHED[model][key] for key in needed}
    assert_as_transformers_reads_it(write(tmp_path, config | {"num_attention_heads": 32}))


GEMMA_3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
MISTRAL_SMALL_3_1 = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {k: v for k, v in MISTRAL_7B.items() if k != "architectures"},
    "vision_config": {"model_type": "pixtral"},
    "vision_feature_layer": -1,
}


@pytest.mark.parametrize(
    ("whole", "text"),
    [(GEMMA_3_4B, "Gemma3ForCausalLM"), (MISTRAL_SMALL_3_1, "MistralForCausalLM")],
)
def test_the_text_of_a_model_of_more_is_that_of_its_family(tmp_path, whole, text):
    for folder in ("whole", "text"):
        (tmp_path / folder).mkdir()
    ours = ModelConfig.from_hf(write(tmp_path / "whole", whole))
    alone = whole["text_config"] | {"architectures": [text]}
    theirs = assert_as_transformers_reads_it(write(tmp_path / "text", alone))
    assert ours.layers == theirs.layers
    assert (ours.d_model, ours.vocab_size) == (theirs.d_model, theirs.vocab_size)
    assert ours.head == theirs.head
    assert ours.names.root == "model.language_model"
    with pytest.raises(ModelConfigError, match=r"json: audio_config=.* is not known to"):
        ModelConfig.from_hf(write(tmp_path / "whole", whole | {"audio_config": {"layers": 2}}))
    broken = whole | {"text_config": whole["text_config"] | {"hidden_size": -1}}
    with pytest.raises(ModelConfigError, match=r"text_config: hidden_size=-1 must be"):
        ModelConfig.from_hf(write(tmp_path / "whole", broken))


def test_windows_by_layer(tmp_path):
    """Of Mistral in all layers; of Qwen from one layer on, if it is switched on."""
    assert_as_transformers_reads_it(write(tmp_path, MISTRAL_7B | {"sliding_window": 4096}))
    assert_as_transformers_reads_it(write(tmp_path, {**MISTRAL_7B, "sliding_window": 1}))
    for changes in ({}, {"max_window_layers": 3}, {"max_window_layers": 40}):
        config = QWEN_2_5_0_5B | {"use_sliding_window": True} | changes
        assert_as_transformers_reads_it(write(tmp_path, config))
    absent = {key: value for key, value in MISTRAL_7B.items() if key != "sliding_window"}
    assert_as_transformers_reads_it(write(tmp_path, absent))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "truncate": False},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5, "beta_slow": 0.5},
        LLAMA3_ROPE,
    ],
    ids=str,
)
def test_scaled_frequencies_are_those_of_transformers(tmp_path, rope):
    config = LLAMA_3_1_8B | {"rope_scaling": rope, "max_position_embeddings": 512}
    ours = ModelConfig.from_hf(write(tmp_path, config)).layers[0].mixer.rope
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert ours is not None
    assert ours.scaling is not None
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu")
    np.testing.assert_allclose(rotary_frequencies(ours, 128), expected, rtol=1e-5)
    assert ours.scaling.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize(("context", "length"), [(4096, None), (None, 4097), (4097, 131072)])
def test_longrope_is_chosen_by_the_context(tmp_path, context, length, caplog):
    caplog.set_level("INFO")
    ours = ModelConfig.from_hf(write(tmp_path, PHI_4_MINI), context).layers[0].mixer.rope
    theirs = AutoConfig.from_pretrained(tmp_path)
    expected, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=length)
    assert ours is not None
    assert ours.scaling is not None
    np.testing.assert_allclose(rotary_frequencies(ours, 128), expected, rtol=1e-5)
    assert ours.scaling.attention_factor == pytest.approx(factor)
    assert f"{'long' if length else 'short'}_factor for every text" in caplog.text


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_the_defaults_of_a_family_are_those_of_transformers(tmp_path, architecture):
    """A configuration of nothing but its type, as transformers would fill it in and write it."""
    family = FAMILIES[architecture]
    sizes = {"hidden_size": 256, "intermediate_size": 96, "num_attention_heads": 32}
    named = {"model_type": family.model_type, "architectures": [architecture]}
    needed = sizes | named | {"num_hidden_layers": 8, "vocab_size": 128}
    short, written = tmp_path / "short", tmp_path / "written"
    short.mkdir()
    theirs = AutoConfig.from_pretrained(write(short, needed))
    theirs.save_pretrained(written)
    ours = ModelConfig.from_hf(written)
    short_one = ModelConfig.from_hf(short)
    assert short_one.layers == ours.layers
    assert short_one.head.tied == ours.head.tied == theirs.tie_word_embeddings
    assert short_one.bos_token_id == theirs.bos_token_id
    # The kinds of these do not say where they rotate.
    silent = ("SmolLM3ForCausalLM", "MuseGlimmerTextModel", "Cohere2ForCausalLM")
    if family.architecture not in silent:
        assert_as_transformers_reads_it(written)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
OLD = {
    "Olmo3ForCausalLM": {"rope_theta": 500000, "rope_scaling": YARN},
    "Gemma3ForCausalLM": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 2e4,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window_pattern": 4,
    },
}


@pytest.mark.parametrize("architecture", OLD)
def test_older_spellings_of_rope_by_kind_of_layer(tmp_path, architecture):
    family = FAMILIES[architecture]
    sizes = {"hidden_size": 256, "intermediate_size": 96, "num_attention_heads": 32}
    named = {"model_type": family.model_type, "architectures": [architecture]}
    config = sizes | named | {"num_hidden_layers": 8, "vocab_size": 128} | OLD[architecture]
    assert_as_transformers_reads_it(write(tmp_path, config))


def test_llama3_rope_scaling_under_its_older_names(tmp_path):
    older = dict(LLAMA3_ROPE)
    older["type"] = older.pop("rope_type")
    config = ModelConfig.from_hf(write(tmp_path, LLAMA_3_1_8B | {"rope_scaling": older}))
    rope = config.layers[0].mixer.rope
    assert rope and rope.scaling == Llama3Scaling(8.0, 1.0, 4.0, 32)


def test_a_null_base_frequency_is_no_rope(tmp_path):
    """To OLMo Hybrid; to others it is the default."""
    config = {
        **{"architectures": ["OlmoHybridForCausalLM"], "model_type": "olmo_hybrid"},
        **{"hidden_size": 256, "intermediate_size": 96, "num_attention_heads": 8},
        **{"num_hidden_layers": 3, "vocab_size": 128, "linear_allow_neg_eigval": False},
    }
    for change, theta in (
        ({}, 1e4),
        ({"rope_parameters": None}, 1e4),
        ({"rope_theta": 2e5}, 2e5),
        ({"rope_theta": None}, None),
        ({"rope_parameters": {"rope_theta": None, "rope_type": "default"}}, None),
        ({"rope_parameters": {"rope_theta": 3e5}, "rope_theta": None}, 3e5),
    ):
        read = assert_as_transformers_reads_it(write(tmp_path, config | change))
        (attention,) = read.attention  # the last layer, where no fourth one is
        assert (attention.rope and attention.rope.theta) == theta


def test_which_projections_have_a_bias(tmp_path):
    def biases(config):
        read = ModelConfig.from_hf(write(tmp_path, config))
        attention = read.layers[0].mixer
        return attention.qkv_bias, attention.o_bias, attention.qk_norm is not None

    assert biases(LLAMA_3_1_8B) == (False, False, False)
    assert biases(LLAMA_3_1_8B | {"attention_bias": True}) == (True, True, False)
    assert biases(QWEN_2_5_0_5B) == (True, False, False)
    assert biases(QWEN_3_0_6B) == (False, False, True)


def test_generation_config_decides_what_ends_a_sequence(tmp_path):
    write(tmp_path, QWEN_2_5_0_5B)
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == (151645,)
    write(tmp_path, QWEN_2_5_0_5B, generation={"eos_token_id": [151645, 151643]})
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == (151645, 151643)
    write(tmp_path, QWEN_2_5_0_5B, generation={"temperature": 0.7})
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == (151645,)


@pytest.mark.parametrize(
    ("model", "change", "named"),
    [
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ("qwen3", {"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
        ("qwen2", {"rope_scaling": YARN | {"factor": -1}}, "rope_scaling: factor=-1"),
        ("qwen2", {"rope_scaling": YARN | {"softness": 2}}, "rope_scaling: softness=2"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "factor is missing"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("qwen2", {"use_sliding_window": 2}, "use_sliding_window=2"),
        ("llama", {"sliding_window": 64}, "sliding_window=64"),
        ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("llama", {"residual_multiplier": 0.2}, "residual_multiplier=0.2"),
        ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 would rotate 192"),
        ("phi3", {"partial_rotary_factor": 1.0}, "48 factors, and 64 frequencies"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias=True"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("mistral", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("qwen3", {"layer_types": ["full_attention"]}, "must name the kinds of 28 layers"),
        ("qwen3", {"layer_types": ["full_attention", "mamba"] * 14}, "layer_types[1]='mamba'"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("qwen2", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"num_key_value_heads": 5}, "num_key_value_heads=5"),
        ("llama", {"hidden_size": "4096"}, "hidden_size='4096'"),
        ("llama", {"vocab_size": None}, "vocab_size is missing"),
        ("llama", {"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
        ("qwen3", {"head_dim": 15}, "head_dim=15"),
        ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention='all'"),
        ("gemma4", {"enable_moe_block": True}, "enable_moe_block=True"),
        ("gemma4", {"num_kv_shared_layers": 60}, "num_kv_shared_layers=60 leaves layers without"),
        ("gemma4", {"num_global_key_value_heads": 5}, "num_key_value_heads=5 divide num_attention"),
        ("gemma4", {"per_layer_config": {"0": {"head_dim": 128}}}, "not that of the other layers"),
        ("gemma4", {"per_layer_config": {"5": {"eps": 128}}}, "config: 5: eps=128 is not known"),
    ],
)
def test_what_is_not_supported_is_refused_by_name_in_one_line(tmp_path, model, change, named):
    with pytest.raises(ModelConfigError) as error:
        ModelConfig.from_hf(write(tmp_path, PUBLISHED[model] | change))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ModelConfigError, match=r"config\.json does not exist; give a local"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelConfigError, match=r"config\.json cannot be read"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    ("listed", "kept"), [(272, ()), ([2, 400, 5], (2, 5)), ([-1, 2], (2,)), (271, (271,))]
)
def test_end_tokens_without_a_logit_are_told_and_left_out(tmp_path, caplog, listed, kept):
    raw = {**QWEN_2_5_0_5B, "vocab_size": 272, "eos_token_id": listed}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == kept
    assert ("no output ends with" in caplog.text) == (kept != (271,))
