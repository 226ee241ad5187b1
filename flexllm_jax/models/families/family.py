"""What a family is to the engine: how its `config.json` becomes layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flexllm_jax.models.fields import Fields
from flexllm_jax.models.names import USUAL, Names
from flexllm_jax.models.spec import HeadSpec, LayerSpec


def plain_head(fields: Fields) -> HeadSpec:
    """A head that gives the logits as they are, tied to the embeddings or not."""
    return HeadSpec(fields.boolean("tie_word_embeddings"))


@dataclass(frozen=True)
class Family:
    """A row of the table.

    title: what people call it. model_type, architecture: transformers' names. layers: all of them,
    in order. defaults: what transformers' config class fills in. harmless: fields that change
    nothing here, beside those of `fields.HARMLESS`; every other one that is not read is refused.
    around: fields of `ModelConfig` that say what is before the layers. head: what is behind them.
    names: of its modules.
    """

    title: str
    model_type: str
    architecture: str
    layers: Callable[[Fields], tuple[LayerSpec, ...]]
    defaults: Mapping[str, Any]
    harmless: frozenset[str] = frozenset()
    around: Callable[[Fields], dict[str, Any]] = field(default=lambda fields: {})
    names: Names = USUAL
    head: Callable[[Fields], HeadSpec] = field(default=plain_head)


# Fields of a wrapper that say what its other parts are.
OTHER_PARTS = frozenset(
    {
        *("vision_config", "image_token_index", "image_token_id", "boi_token_index"),
        *("eoi_token_index", "boi_token_id", "eoi_token_id", "mm_tokens_per_image"),
        *("projector_hidden_act", "multimodal_projector_bias", "spatial_merge_size"),
        *("vision_feature_layer", "vision_feature_select_strategy"),
        *("video_token_id", "vision_start_token_id", "vision_end_token_id"),
    }
)


@dataclass(frozen=True)
class Wrapper:
    """A model of more than text: its `config.json` has that of a family under `text_config`, and
    its other parts are left out. text: that family's model_type, where the file does not say."""

    title: str
    model_type: str
    architecture: str
    text: str
    harmless: frozenset[str] = OTHER_PARTS
