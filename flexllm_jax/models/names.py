"""The names of parameters in checkpoints, and so of the modules that PEFT's adapters are on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from flexllm_jax.models.spec import GatedDeltaSpec, LayerSpec

# Attention, and a gated delta net, inside of the checkpoint's layer.
ATTENTION, DELTA = "self_attn", "linear_attn"
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
        "qkv": "self_attn.qkv_proj",
        "gate_up": "mlp.gate_up_proj",
        "attention_gate": "self_attn.gate_proj",
        "token_gate": "per_layer_input_gate",
        "token_projection": "per_layer_projection",
        "in_qkv": f"{DELTA}.in_proj_qkv",
        "in_z": f"{DELTA}.in_proj_z",
        "in_b": f"{DELTA}.in_proj_b",
        "in_a": f"{DELTA}.in_proj_a",
        "out": f"{DELTA}.out_proj",
        "delta_g": f"{DELTA}.g_proj",
        "delta_b": f"{DELTA}.b_proj",
        "delta_a": f"{DELTA}.a_proj",
    }
)
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
DELTA_NORM = {"out_norm": f"{DELTA}.norm"}
TOKEN_NORM = {"token_norm": "post_per_layer_input_norm"}
SCALAR = "layer_scalar"
SINKS = f"{ATTENTION}.sinks"
# Before the layers, where tokens have something for single ones: the name in the parameter tree ->
# inside of the decoder.
TOKEN_INPUTS = {
    "embed": "embed_tokens_per_layer",
    "projection": "per_layer_model_projection",
    "norm": "per_layer_projection_norm",
}
HEAD = "lm_head"


@dataclass(frozen=True)
class Names:
    """What a family calls its modules.

    root: the decoder. changed: of a layer's modules, those that have another name than the usual
    one: (in the parameter tree, inside of the checkpoint's layer). delta: the layers whose mixer is
    a gated delta net; what is attention's elsewhere is in it there.
    """

    root: str = "model"
    changed: tuple[tuple[str, str], ...] = ()
    delta: frozenset[int] = frozenset()

    def of(self, layers: Sequence[LayerSpec]) -> "Names":
        """In a model of these layers."""
        kinds = enumerate(layer.mixer for layer in layers)
        return replace(self, delta=frozenset(i for i, m in kinds if isinstance(m, GatedDeltaSpec)))

    @property
    def layers(self) -> str:
        """The list of layers."""
        return f"{self.root}.layers"

    @property
    def embed(self) -> str:
        """The embeddings."""
        return f"{self.root}.embed_tokens"

    @property
    def final_norm(self) -> str:
        """The norm before the output head."""
        return f"{self.root}.norm"

    def path(self, layer: int, inside: str) -> str:
        """A module of a layer, by its name there."""
        return f"{self.layers}.{layer}.{inside}"

    def norms(self, layer: LayerSpec) -> dict[str, str]:
        """A layer's norms: their names in the parameter tree, and inside of the layer."""
        usual = dict(NORMS[layer.norm.pre, layer.norm.post])
        mixer = layer.mixer
        if layer.parallel:
            del usual["pre_mlp_norm"]
        if isinstance(mixer, GatedDeltaSpec):
            usual |= DELTA_NORM
        elif mixer.qk_norm in ("head", "projection"):
            usual |= QK_NORMS
            if not mixer.own_keys:
                del usual["k_norm"]
        usual |= TOKEN_NORM if layer.token_width else {}
        changed = dict(self.changed)
        return {module: changed.get(module, name) for module, name in usual.items()}

    def module_path(self, layer: int, module: str) -> str:
        """A projection, e.g. `model.layers.3.self_attn.q_proj` for (3, "q"). The output head,
        "head", belongs to the layer after the last one."""
        if module == "head":
            return HEAD
        inside = dict(self.changed).get(module, PROJECTIONS[module])
        mixer, _, name = inside.partition(".")
        if mixer == ATTENTION and layer in self.delta:
            inside = f"{DELTA}.{name}"
        return self.path(layer, inside)


USUAL, WRAPPED = ROOTS = Names(), Names("model.language_model")
# In files, models of more than text have other names than in memory, or the same.
_IN_FILES = {
    "language_model.model.": f"{WRAPPED.root}.",
    f"language_model.{HEAD}.": f"{HEAD}.",
}

# OLMo Hybrid's files have other names of norms, and the convolution of a gated delta net in parts,
# one behind the other: (in a file, in memory, which part it is).
_IN_LAYERS = (
    (".attention_layer_norm.", ".input_layernorm.", 0),
    (".feedforward_layer_norm.", ".post_attention_layernorm.", 0),
    *((f".{DELTA}.{name}_conv1d.", f".{DELTA}.conv1d.", i) for i, name in enumerate("qkv")),
)


def name_in_memory(stored: str) -> tuple[str, int]:
    """What transformers calls a parameter that has this name in a file, and which part of it that
    is."""
    for inside, own, part in _IN_LAYERS:
        if inside in stored:
            return stored.replace(inside, own), part
    for prefix, own in _IN_FILES.items():
        if stored.startswith(prefix):
            return own + stored.removeprefix(prefix), 0
    return stored, 0
