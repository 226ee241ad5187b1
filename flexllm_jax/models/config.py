"""What a decoder-only model looks like, read from a Hugging Face `config.json`.

Llama 3.x, Qwen2.5 and Qwen3 are one decoder whose differences are fields of `ModelConfig`. Both
the `config.json` of transformers 5 (`rope_parameters`) and older ones (`rope_theta` and
`rope_scaling`) are read. Invariant: a config that loads describes exactly what the decoder
computes; what would change the result and is not implemented is refused by name.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexllm_jax.errors import UserError

logger = logging.getLogger(__name__)


class ModelConfigError(UserError):
    """A `config.json` that is missing, broken or describes an unsupported model; one line."""


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Frequency scaling of Llama 3.1 and later (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class _Family:
    """What an architecture fixes in transformers' code, and what its config class fills in."""

    qkv_bias: bool | None  # None: the config's `attention_bias` decides, for q, k, v and o alike
    qk_norm: bool
    defaults: Mapping[str, Any]


_FAMILIES = {
    "LlamaForCausalLM": _Family(
        qkv_bias=None,
        qk_norm=False,
        defaults={"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "Qwen2ForCausalLM": _Family(
        qkv_bias=True,
        qk_norm=False,
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    ),
    "Qwen3ForCausalLM": _Family(
        qkv_bias=None,
        qk_norm=True,
        defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    ),
}

_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_DEFAULT_ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of a decoder. The letters are the dimensions in every shape comment."""

    architecture: str
    vocab_size: int  # V
    d_model: int  # D
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    d_ff: int  # F
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    attention_bias: bool  # q, k and v have a bias
    output_bias: bool  # o has a bias
    qk_norm: bool  # RMSNorm over head_dim on q and k, before RoPE
    tie_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def kernel_shapes(self) -> dict[str, tuple[int, int]]:
        """[d_in, d_out] of a layer's seven projections, by their name in the parameter tree."""
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q": (self.d_model, queries),
            "k": (self.d_model, keys),
            "v": (self.d_model, keys),
            "o": (queries, self.d_model),
            "gate": (self.d_model, self.d_ff),
            "up": (self.d_model, self.d_ff),
            "down": (self.d_ff, self.d_model),
        }

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """[d_in, d_out] of all projections that LoRA can be put on: a layer's seven and the output
        head."""
        return self.kernel_shapes | {"head": (self.d_model, self.vocab_size)}

    def context_length(self, limit: int | None) -> int:
        """Longest prompt plus output: the model's own, or `limit` where that is shorter."""
        return min(limit or self.max_position_embeddings, self.max_position_embeddings)

    @classmethod
    def from_hf(cls, path: str | Path) -> "ModelConfig":
        """Read `config.json` and, if there is one, `generation_config.json` of a checkpoint.

        As in transformers, the end-of-sequence ids of `generation_config.json` win over those of
        `config.json`. Raises ModelConfigError, in one line, for what is missing or unsupported.
        """
        directory = Path(path)
        raw = _read_json(directory / "config.json")
        architecture = _architecture(raw)
        family = _FAMILIES[architecture]
        raw = {**family.defaults, **raw}
        _refuse_unsupported(raw)

        d_model = _positive_int(raw, "hidden_size")
        num_heads = _positive_int(raw, "num_attention_heads")
        num_kv_heads = _positive_int(raw, "num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise ModelConfigError(
                f"config.json: num_attention_heads={num_heads} is not a multiple of "
                f"num_key_value_heads={num_kv_heads}; correct the one that is wrong"
            )
        head_dim = _positive_int(raw, "head_dim", default=d_model // num_heads)
        if head_dim % 2:
            raise ModelConfigError(
                f"config.json: head_dim={head_dim} is odd, but RoPE rotates pairs; use an even one"
            )
        max_positions = _positive_int(raw, "max_position_embeddings")
        rope_theta, rope_scaling = _rope(raw, max_positions)
        configured_bias = _boolean(raw, "attention_bias")
        generation_file = directory / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.is_file() else {}
        eos = generation.get("eos_token_id")
        vocab_size = _positive_int(raw, "vocab_size")
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            d_model=d_model,
            num_layers=_positive_int(raw, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            d_ff=_positive_int(raw, "intermediate_size"),
            norm_eps=_number(raw, "rms_norm_eps", default=1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            attention_bias=configured_bias if family.qkv_bias is None else family.qkv_bias,
            output_bias=configured_bias if family.qkv_bias is None else False,
            qk_norm=family.qk_norm,
            tie_embeddings=_boolean(raw, "tie_word_embeddings"),
            max_position_embeddings=max_positions,
            eos_token_ids=_end_tokens(raw.get("eos_token_id") if eos is None else eos, vocab_size),
            bos_token_id=raw.get("bos_token_id"),
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelConfigError(
            f"{file} does not exist; give a local directory that holds a Hugging Face checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelConfigError(f"{file} cannot be read: {error}; download it again") from None
    if not isinstance(raw, dict):
        raise ModelConfigError(f"{file} holds a {type(raw).__name__}, not a JSON object")
    return raw


def _architecture(raw: Mapping[str, Any]) -> str:
    listed = raw.get("architectures") or []
    name = listed[0] if listed else _MODEL_TYPES.get(str(raw.get("model_type")))
    if name not in _FAMILIES:
        raise ModelConfigError(
            f"config.json: architectures={listed!r} with model_type={raw.get('model_type')!r} is "
            f"not supported; supported are {', '.join(_FAMILIES)}"
        )
    return name


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Refuse the options of the three families that the decoder does not compute."""
    remedies = {
        "quantization_config": "use the unquantized checkpoint",
        "use_sliding_window": "use a checkpoint with full attention in every layer",
        "use_mrope": "use a text-only checkpoint",
        "mlp_bias": "use a checkpoint whose MLP has no bias",
    }
    for field, remedy in remedies.items():
        if raw.get(field):
            raise ModelConfigError(
                f"config.json: {field}={raw[field]!r} is not supported; {remedy}"
            )
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelConfigError(
            f"config.json: hidden_act={activation!r} is not supported; only 'silu' is"
        )
    for layer, kind in enumerate(raw.get("layer_types") or []):
        if kind != "full_attention":
            raise ModelConfigError(
                f"config.json: layer_types[{layer}]={kind!r} is not supported; "
                "only 'full_attention' is"
            )


def _rope(raw: Mapping[str, Any], max_positions: int) -> tuple[float, Llama3RopeScaling | None]:
    """Base frequency and scaling, with transformers' rule of which of two spellings wins."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(field) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ModelConfigError(
            f"config.json: {field}={rope!r} is not supported; one set of RoPE parameters for all "
            "layers is"
        )
    theta = _number(rope, "rope_theta", _number(raw, "rope_theta", _DEFAULT_ROPE_THETA))
    rotated = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if rotated not in (None, 1, 1.0):
        raise ModelConfigError(
            f"config.json: partial_rotary_factor={rotated!r} is not supported; only 1.0 is"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelConfigError(
            f"config.json: {field}.rope_type={kind!r} is not supported; 'default' and 'llama3' "
            "are (Qwen's YaRN is optional: remove it and stay within the original context)"
        )
    scaling = Llama3RopeScaling(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_position_embeddings=_positive_int(
            {**rope, **{k: v for k, v in raw.items() if k == "original_max_position_embeddings"}},
            "original_max_position_embeddings",
            default=max_positions,
        ),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise ModelConfigError(
            f"config.json: {field}.high_freq_factor={scaling.high_freq_factor} must be above "
            f"low_freq_factor={scaling.low_freq_factor}"
        )
    return theta, scaling


def _positive_int(raw: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = raw.get(field)
    value = default if value is None else value
    if value is None:
        raise ModelConfigError(f"config.json: {field} is missing; it must be a positive integer")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelConfigError(f"config.json: {field}={value!r} must be a positive integer")
    return value


def _number(raw: Mapping[str, Any], field: str, default: float | None = None) -> float:
    value = raw.get(field)
    value = default if value is None else value
    if value is None:
        raise ModelConfigError(f"config.json: {field} is missing; it must be a positive number")
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ModelConfigError(f"config.json: {field}={value!r} must be a positive number")
    return float(value)


def _boolean(raw: Mapping[str, Any], field: str) -> bool:
    value = raw.get(field)
    if not isinstance(value, bool | None):
        raise ModelConfigError(f"config.json: {field}={value!r} must be true or false")
    return bool(value)


def _end_tokens(value: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids that end an output; those that the model has no logit for never will."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise ModelConfigError(
            f"config.json: eos_token_id={value!r} must be a token id or a list of them"
        )
    unknown = [token for token in ids if not 0 <= token < vocab_size]
    if unknown:
        logger.warning(
            "eos_token_id=%r: no output ends with %s, the vocabulary has ids 0 to %d: correct "
            "generation_config.json or config.json",
            *(value, ", ".join(map(str, unknown)), vocab_size - 1),
        )
    return tuple(token for token in ids if token not in unknown)
