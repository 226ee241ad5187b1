"""A decoder-only model, read from a Hugging Face `config.json`.

Families are tables in `families/`; their differences are fields of `spec.LayerSpec` and of
`ModelConfig`. Both the `config.json` of transformers 5 (`rope_parameters`) and older ones
(`rope_theta` and `rope_scaling`) are read. Invariant: a config that loads describes exactly what
the decoder computes; a field that no family reads and that is not known to change nothing is
refused by name.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from flexllm_jax.models.families import FAMILIES, WRAPPERS
from flexllm_jax.models.families.family import Family, Wrapper
from flexllm_jax.models.fields import Fields, ModelConfigError
from flexllm_jax.models.names import USUAL, WRAPPED, Names
from flexllm_jax.models.spec import AttentionSpec, HeadSpec, LayerSpec, MixerSpec, NormSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: its layers, and what is around them. The letters are the dimensions in every shape
    comment. token_table: rows of the embeddings of what tokens have for single layers, where they
    have any. embed_norm: eps of the norm of embeddings, which has no weight; None: there is none.
    final_norm: that behind the layers, where it is not as theirs."""

    architecture: str
    vocab_size: int  # V
    d_model: int  # D
    layers: tuple[LayerSpec, ...]  # L of them
    head: HeadSpec
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    names: Names = USUAL  # of its modules, in checkpoints
    embed_scale: float = 1.0  # of the embeddings, rounded to their dtype
    token_table: int | None = None
    embed_norm: float | None = None
    final_norm: NormSpec | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @property
    def num_heads(self) -> int:
        """N, in the first layer that attends."""
        return self.attention[0].heads

    @property
    def num_kv_heads(self) -> int:
        """K, in the first layer that attends."""
        return self.attention[0].kv_heads

    @property
    def head_dim(self) -> int:
        """H, in the first layer that attends."""
        return self.attention[0].head_dim

    @property
    def d_ff(self) -> int:
        """F, in the widest layer."""
        return max(layer.mlp.d_ff for layer in self.layers)

    @cached_property
    def kinds(self) -> tuple[LayerSpec, ...]:
        """The different layers, in the order in which they come first."""
        return tuple(dict.fromkeys(self.layers))

    @cached_property
    def kind_of(self) -> tuple[int, ...]:
        """Of each layer, which of `kinds` it is."""
        return tuple(map(self.kinds.index, self.layers))

    @cached_property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """The attention of all layers that have it."""
        return tuple(x.mixer for x in self.layers if isinstance(x.mixer, AttentionSpec))

    @cached_property
    def mixers(self) -> tuple[MixerSpec, ...]:
        """The different mixers, as far as that goes which they carry from one unit of the backward
        to the next."""
        return tuple(dict.fromkeys(layer.mixer.carried for layer in self.layers))

    @cached_property
    def cache_of(self) -> tuple[int, ...]:
        """Of each layer, the one whose keys and values it reads: itself, or one before it."""
        last, found = {}, []
        for i, layer in enumerate(self.layers):
            own = layer.mixer
            if isinstance(own, AttentionSpec) and not own.own_keys:
                found.append(last[own.shared])
                continue
            found.append(i)
            if isinstance(own, AttentionSpec):
                last[own.shared] = i
        return tuple(found)

    def kernel_shapes(self, layer: int) -> dict[str, tuple[int, int]]:
        """[d_in, d_out] of all projections of a layer that LoRA can be put on, by their name in the
        parameter tree. The output head, "head", belongs to the layer after the last one."""
        if layer == self.num_layers:
            return {"head": (self.d_model, self.vocab_size)}
        return self.layers[layer].kernel_shapes(self.d_model)

    @cached_property
    def projections(self) -> dict[str, tuple[int, int]]:
        """`kernel_shapes` of all layers, each projection as the first layer that has it."""
        shapes: dict[str, tuple[int, int]] = {}
        for layer in range(self.num_layers + 1):
            shapes = self.kernel_shapes(layer) | shapes
        return shapes

    def context_length(self, limit: int | None) -> int:
        """Longest prompt plus output: the model's own, or `limit` where that is shorter."""
        return min(limit or self.max_position_embeddings, self.max_position_embeddings)

    @classmethod
    def from_hf(cls, path: str | Path, most_tokens: int | None = None) -> "ModelConfig":
        """Read `config.json` and, if there is one, `generation_config.json` of a checkpoint.
        most_tokens: the longest text that it is to be used for, where that is less than its own.

        As in transformers, the end-of-sequence ids of `generation_config.json` win over those of
        `config.json`. Raises ModelConfigError, in one line, for what is missing or unsupported.
        """
        directory = Path(path)
        raw = _read_json(directory / "config.json")
        name, names = "config.json:", {}
        if wrapper := WRAPPERS.get(_architecture(raw, FAMILIES | WRAPPERS)):
            raw, name = _text_part(raw, wrapper), "config.json: text_config:"
            names = {"root": WRAPPED.root}
        family = FAMILIES[_architecture(raw, FAMILIES)]
        fields = Fields({**family.defaults, **raw}, name, most_tokens)
        fields.refuse("quantization_config", "use the unquantized checkpoint")
        generation_file = directory / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.is_file() else {}
        eos = generation.get("eos_token_id")
        vocab_size = fields.positive_int("vocab_size")
        layers = family.layers(fields)
        config = cls(
            architecture=family.architecture,
            vocab_size=vocab_size,
            d_model=fields.positive_int("hidden_size"),
            layers=layers,
            head=family.head(fields),
            max_position_embeddings=fields.positive_int("max_position_embeddings"),
            eos_token_ids=_end_tokens(
                fields.get("eos_token_id") if eos is None else eos, vocab_size
            ),
            bos_token_id=fields.get("bos_token_id"),
            names=replace(family.names, **names).of(layers),
            **family.around(fields),
        )
        fields.refuse_unread(family.architecture, family.harmless)
        return config


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


def _architecture(raw: Mapping[str, Any], known: Mapping[str, Family | Wrapper]) -> str:
    listed = raw.get("architectures") or []
    by_type = {row.model_type: name for name, row in known.items()}
    name = str(listed[0] if listed else by_type.get(str(raw.get("model_type"))))
    if name not in known:
        raise ModelConfigError(
            f"config.json: architectures={listed!r} with model_type={raw.get('model_type')!r} is "
            f"not supported; supported are {', '.join(known)}"
        )
    return name


def _text_part(raw: Mapping[str, Any], wrapper: Wrapper) -> dict[str, Any]:
    """The configuration of the text's part; what is said of the whole counts for it, too."""
    fields = Fields(raw)
    text = fields.get("text_config", {})
    if not isinstance(text, dict):
        raise fields.error("text_config", "must be an object")
    of_whole = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization_config")
    given = {name: raw[name] for name in of_whole if fields.get(name) is not None}
    fields.refuse_unread(wrapper.architecture, wrapper.harmless)
    return {"model_type": wrapper.text, **text, **given, "architectures": None}


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
