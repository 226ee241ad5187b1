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


# A layer's norms: the name in the parameter tree -> inside of the checkpoint's layer.
PRE_NORMS = {"pre_attn_norm": "input_layernorm", "pre_mlp_norm": "post_attention_layernorm"}
QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
