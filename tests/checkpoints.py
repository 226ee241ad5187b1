"""Small random Hugging Face checkpoints for tests, written by transformers itself.

Every parameter is random, norms and biases too: transformers initializes those to ones and zeros,
which would hide a norm or bias that is dropped, swapped or applied twice. Matrices are scaled so
that activations and logits stay of order one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cohere2Config,
    CohereConfig,
    Ernie4_5Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Gemma4UnifiedTextConfig,
    Glm4Config,
    GlmConfig,
    GraniteConfig,
    GraniteSWAConfig,
    LlamaConfig,
    Ministral3Config,
    MinistralConfig,
    Mistral3Config,
    MistralConfig,
    MuseGlimmerConfig,
    MuseGlimmerTextConfig,
    MuseGlimmerVisionConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoHybridConfig,
    Phi3Config,
    PixtralVisionConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    SeedOssConfig,
    SiglipVisionConfig,
    SmolLM3Config,
)

D_MODEL, D_FF, NUM_LAYERS, MAX_POSITIONS = 64, 96, 2, 512

# The original context is short: a test's few positions then reach the scaled frequencies.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA4_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    "full_attention": {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e4,
    },
}
FACTORS = {"long_factor": 2.0, "short_factor": 1.0}  # of a RoPE of kind longrope, the first
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "image_size": 28,
    "patch_size": 14,
}


def save_tokenizer(path: Path) -> Path:
    """Write a byte-level tokenizer (259 tokens: a byte each, and three special ones) to `path`."""
    tokens = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(path)
    return path


def make_llama(path: Path, **options: Any) -> Path:
    """Write a Llama checkpoint; the options are those of `_make`."""
    return _make(LlamaConfig, path, **options)


def make_qwen2(path: Path, **options: Any) -> Path:
    """Write a Qwen2 checkpoint (biases on q, k and v); the options are those of `_make`."""
    return _make(Qwen2Config, path, **options)


def make_qwen3(path: Path, **options: Any) -> Path:
    """Write a Qwen3 checkpoint (norms on q and k); the options are those of `_make`."""
    return _make(Qwen3Config, path, **options)


def make_mistral(path: Path, **options: Any) -> Path:
    """Write a Mistral checkpoint with a window of 11 in every layer; the options are those of
    `_make`."""
    return _make(MistralConfig, path, **{"sliding_window": 11, **options})


def make_ministral(path: Path, **options: Any) -> Path:
    """Write a Ministral checkpoint with a window of 9 in one of two layers."""
    kinds = ["sliding_attention", "full_attention"]
    return _make(MinistralConfig, path, **{"sliding_window": 9, "layer_types": kinds, **options})


def make_ministral3(path: Path, **options: Any) -> Path:
    """Write a Ministral 3 checkpoint: YaRN, and queries that grow with their position."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}
    rope = {**yarn, "rope_theta": 1e4, "llama_4_scaling_beta": 0.4}
    return _make(Ministral3Config, path, **{"rope_parameters": rope, "pad_token_id": 0, **options})


def make_mistral3(path: Path, **options: Any) -> Path:
    """Write a checkpoint of Ministral 3 with a vision tower."""
    vision = PixtralVisionConfig(**VISION, num_attention_heads=2)

    def wrap(text: Any, tie: bool) -> PreTrainedConfig:
        return Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=tie)

    return make_ministral3(path, wrap=wrap, **options)


def make_gemma3_with_vision(path: Path, **options: Any) -> Path:
    """Write a Gemma 3 checkpoint with a vision tower."""
    vision = SiglipVisionConfig(**VISION, num_attention_heads=2)

    def wrap(text: Any, tie: bool) -> PreTrainedConfig:
        own = {"mm_tokens_per_image": 4, "tie_word_embeddings": tie}
        return Gemma3Config(text_config=text, vision_config=vision, **own)

    return make_gemma3(path, wrap=wrap, **options)


def make_phi3(path: Path, **options: Any) -> Path:
    """Write a Phi-3 checkpoint: fused projections, a RoPE of kind longrope over a half of each
    head, and a window of 11."""
    factors = {name: [start + 0.5 * i for i in range(4)] for name, start in FACTORS.items()}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, **factors}
    fields: dict[str, Any] = {
        "sliding_window": 11,
        "original_max_position_embeddings": 12,
        "rope_parameters": rope,
        "pad_token_id": 0,
    }
    return _make(Phi3Config, path, **(fields | options))


def make_glm4(path: Path, **options: Any) -> Path:
    """Write a GLM-4 checkpoint: gate and up fused, biases, RoPE of neighbours."""
    return _make(Glm4Config, path, **{"pad_token_id": 0, "rope_parameters": None, **options})


def make_glm(path: Path, **options: Any) -> Path:
    """Write a checkpoint of the GLM-4 before: without norms behind."""
    return _make(GlmConfig, path, **{"pad_token_id": 0, "rope_parameters": None, **options})


def make_ernie4_5(path: Path, **options: Any) -> Path:
    """Write an ERNIE 4.5 checkpoint: RoPE of neighbours."""
    return _make(Ernie4_5Config, path, **{"rope_parameters": None, **options})


def make_smollm3(path: Path, **options: Any) -> Path:
    """Write a SmolLM3 checkpoint: layers without RoPE; the options are those of `_make`."""
    return _make(SmolLM3Config, path, **{"no_rope_layers": [1, 0], "pad_token_id": 0, **options})


def make_seed_oss(path: Path, **options: Any) -> Path:
    """Write a Seed-OSS checkpoint (biases); the options are those of `_make`."""
    return _make(SeedOssConfig, path, **options)


def make_granite(path: Path, **options: Any) -> Path:
    """Write a Granite checkpoint with all its multipliers; the options are those of `_make`."""
    multipliers: dict[str, Any] = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.7,
    }
    return _make(GraniteConfig, path, **(multipliers | options))


def make_granite_swa(path: Path, **options: Any) -> Path:
    """Write a Granite checkpoint with sinks: a layer that is told no positions, and one with a
    window of 9 and a theta of its own."""
    fields: dict[str, Any] = {
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 9,
        "layer_rope_theta": [0, 1e3],
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.6,
    }
    return _make(GraniteSWAConfig, path, **(fields | options))


def make_olmo2(path: Path, **options: Any) -> Path:
    """Write an OLMo 2 checkpoint: norms behind, and over whole projections."""
    return _make(Olmo2Config, path, **options)


def make_olmo3(path: Path, **options: Any) -> Path:
    """Write an OLMo 3 checkpoint: as OLMo 2, with windows of 9, and YaRN in the other layers."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    fields = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {**yarn, "rope_theta": 1e5},
        },
    }
    return _make(Olmo3Config, path, **(fields | options))


def make_gemma2(path: Path, **options: Any) -> Path:
    """Write a Gemma 2 checkpoint with a window of 9 in one of two layers, and caps that bend."""
    fields: dict[str, Any] = {
        "sliding_window": 9,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
    }
    return _make(Gemma2Config, path, **(fields | options))


def make_gemma3(path: Path, **options: Any) -> Path:
    """Write a Gemma 3 checkpoint of text alone, with a window of 9 in one of two layers."""
    fields = {
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e5},
        },
    }
    return _make(Gemma3TextConfig, path, **(fields | options))


def make_gemma4(path: Path, **options: Any) -> Path:
    """Write a Gemma 4 checkpoint as of E2B: the last layers read the keys of others and have wider
    feed-forward networks, and tokens have inputs for each layer."""
    kinds = ["sliding_attention", "full_attention"]
    fields: dict[str, Any] = {
        "num_hidden_layers": 5,
        "layer_types": [*kinds, *kinds, "full_attention"],
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "sliding_window": 9,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "rope_parameters": GEMMA4_ROPE,
    }
    return _make(Gemma4TextConfig, path, **(fields | options))


def make_gemma4_unified(path: Path, **options: Any) -> Path:
    """Write a Gemma 4 checkpoint as of 12B: in layers of full attention, heads are twice as large,
    and values are keys."""
    fields: dict[str, Any] = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "final_logit_softcapping": 1.5,
        "rope_parameters": GEMMA4_ROPE,
    }
    return _make(Gemma4UnifiedTextConfig, path, **(fields | options))


def make_muse_glimmer(path: Path, **options: Any) -> Path:
    """Write a Muse Glimmer checkpoint, with a vision tower: windows of 9, then a layer that is told
    no positions."""
    vision = MuseGlimmerVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )

    def wrap(text: Any, tie: bool) -> PreTrainedConfig:
        own: dict[str, Any] = {"out_hidden_size": 64, "projector_hidden_size": 16}
        own["tie_word_embeddings"] = tie
        return MuseGlimmerConfig(text_config=text, vision_config=vision, **own)

    fields: dict[str, Any] = {
        "sliding_window": 9,
        "qk_scale_factor": 1.7,
        "output_multiplier": 0.7,
        "final_logit_softcapping": 1.5,
        "wrap": wrap,
    }
    return _make(MuseGlimmerTextConfig, path, **(fields | options))


def make_qwen3_5(path: Path, **options: Any) -> Path:
    """Write a Qwen3.5 checkpoint of text alone: a gated delta net, then attention with a gate."""
    fields = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
            "mrope_interleaved": True,
        },
    }
    return _make(Qwen3_5TextConfig, path, **(fields | options))


def make_olmo_hybrid(path: Path, **options: Any) -> Path:
    """Write an OLMo Hybrid checkpoint: a gated delta net whose projections are apart, then
    attention that is told no positions."""
    fields = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": None},
        "rms_norm_eps": 0.02,  # a delta net's norm has another
        "pad_token_id": 0,
    }
    return _make(OlmoHybridConfig, path, **(fields | options))


def make_cohere(path: Path, **options: Any) -> Path:
    """Write a Cohere checkpoint: one norm a layer, in which two things are side by side."""
    fields = {"logit_scale": 0.7, "layer_norm_eps": 1e-3, "rope_parameters": None}
    return _make(CohereConfig, path, **(fields | options))


def make_cohere2(path: Path, **options: Any) -> Path:
    """Write a Cohere 2 checkpoint: a layer with a window of 9, and one that is told no
    positions."""
    fields: dict[str, Any] = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 9,
        "logit_scale": 0.7,
        "layer_norm_eps": 1e-3,
    }
    return _make(Cohere2Config, path, **(fields | options))


def _make(
    config_class: type[PreTrainedConfig],
    path: Path,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    tie: bool = False,
    sharded: bool = False,
    rope_scaling: str | None = None,
    vocab: int = 128,
    seed: int = 0,
    dtype: str = "float32",
    wrap: Callable[[PreTrainedConfig, bool], PreTrainedConfig] | None = None,
    **config_fields: Any,
) -> Path:
    """Write a checkpoint to `path` and return it.

    `rope_scaling` is "llama3" or None; `sharded` cuts the weights into several files;
    `wrap` makes the configuration of a model of more than text of that of its text and of `tie`.
    `config_fields` override fields of the Hugging Face config (say, num_hidden_layers).
    """
    rope = {"rope_theta": 10_000.0, **(LLAMA3_ROPE if rope_scaling == "llama3" else {})}
    fields = {
        "vocab_size": vocab,
        "hidden_size": D_MODEL,
        "intermediate_size": D_FF,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": tie,
        "rope_parameters": {"rope_type": "default", **rope},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = config_class(**(fields | config_fields))
    kind = AutoModelForImageTextToText if wrap else AutoModelForCausalLM
    model = kind.from_config(wrap(config, tie) if wrap else config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    # The weights of Gemma 2 and 3 are 1 + these.
    norm = 0.0 if config.model_type.startswith(("gemma2", "gemma3")) else 1.0
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(1.0 + 0.3 * torch.randn(buffer.shape, generator=generator))
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                centred = "muse" in config.model_type and "layernorm" in name
                parameter.copy_(norm * (not centred) + 0.3 * noise)
                if "gemma4" in config.model_type and "q_norm" in name:
                    parameter.mul_(head_dim**-0.5)  # nothing else scales the scores
            elif name.endswith("sinks"):  # of the size of a softmax's denominator
                parameter.copy_(1.0 + noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(
        path, max_shard_size="60KB" if sharded else "1GB"
    )
    return Path(path)
