"""The names of parameters in checkpoints, and so of the modules that PEFT's adapters are on."""

from collections.abc import Mapping
from types import MappingProxyType

# A layer's projections: the name in the parameter tree -> inside of the checkpoint's layer.
PROJECTIONS: Mapping[str, str] = MappingProxyType(
    {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
)
LAYERS, EMBED, FINAL_NORM, HEAD = "model.layers", "model.embed_tokens", "model.norm", "lm_head"


def layer_path(layer: int, inside: str) -> str:
    """A module's path in a checkpoint."""
    return f"{LAYERS}.{layer}.{inside}"


# A layer's norms: the name in the parameter tree -> inside of the checkpoint's layer; by which of
# `NormSpec.pre` and `NormSpec.post` it has.
NORMS = {
    (True, False): {
        "pre_attn_norm": "input_layernorm",
        "pre_mlp_norm": "post_attention_layernorm",
    },
    (False, True): {
        "post_attn_norm": "post_attention_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
    (True, True): {
        "pre_attn_norm": "input_layernorm",
        "post_attn_norm": "post_attention_layernorm",
        "pre_mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
}
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
