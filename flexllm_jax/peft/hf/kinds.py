"""IA3, prefix tuning and bottleneck adapters in PEFT's file format; LoRA is in `hf_lora`.

PEFT knows no bottleneck adapters: they use its folder layout and names, `peft_type` is BOTTLENECK.
Each kind has `read(raw, tensors, model)`, from the configuration and the tensors of a folder, and
`write(adapter, model)`, the other way round.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft import bottleneck, prefix
from flexllm_jax.peft.adapter import Adapter, AdapterError
from flexllm_jax.peft.bottleneck import BottleneckConfig
from flexllm_jax.peft.ia3 import PEFT_SITES, Ia3Config, site_widths
from flexllm_jax.peft.prefix import PrefixConfig

Tensors = dict[str, np.ndarray]
_ROOT = "base_model.model."
_IA3_MODULES = {"ia3_k": "k", "ia3_v": "v", "ia3_inner": "down"}


@dataclass(frozen=True)
class FileKind:
    """How a kind is written: PEFT's name of it, and both directions."""

    peft_type: str
    read: Callable[[Mapping[str, Any], Tensors, ModelConfig], Adapter]
    write: Callable[[Adapter, ModelConfig], tuple[dict[str, Any], Tensors]]


def _refuse_others(tensors: Tensors, known: Set[str]) -> None:
    """AdapterError for a tensor that would not be used."""
    if others := sorted(tensors.keys() - known):
        raise AdapterError(
            f"tensor {others[0]} ({len(others)} such) has no place in this kind of adapter on this "
            "base model: use the adapter with the model it was trained on"
        )


def _read_ia3(raw: Mapping[str, Any], tensors: Tensors, model: ModelConfig) -> Adapter:
    paths = {
        f"{_ROOT}{model.names.module_path(layer, module)}.ia3_l": (layer, site)
        for layer in range(model.num_layers)
        for site, module in _IA3_MODULES.items()
    }
    weights = {}
    for name, values in tensors.items():
        if name not in paths:
            raise AdapterError(
                f"tensor {name} is not IA3 on {', '.join(PEFT_SITES)} of this base model's "
                f"{model.num_layers} layers: train the adapter on these"
            )
        layer, site = paths[name]
        width = site_widths(model, layer)[site]
        expected = (1, width) if site == "ia3_inner" else (width, 1)
        if values.shape != expected:
            remedy = "use the adapter with the model it was trained on"
            if site == "ia3_inner":
                remedy = "train it with feedforward_modules=['down_proj']"
            raise AdapterError(
                f"tensor {name} has shape {list(values.shape)}, not {list(expected)}: {remedy}"
            )
        weights[layer, site] = {"scale": values.reshape(-1)}
    sites = {site for _, site in weights}
    names = tuple(name for name, site in PEFT_SITES.items() if site in sites)
    return Adapter(Ia3Config(names), weights)


def _write_ia3(adapter: Adapter, model: ModelConfig) -> tuple[dict[str, Any], Tensors]:
    tensors = {}
    for (layer, site), own in adapter.weights.items():
        shape = (1, -1) if site == "ia3_inner" else (-1, 1)
        name = f"{_ROOT}{model.names.module_path(layer, _IA3_MODULES[site])}.ia3_l"
        tensors[name] = own["scale"].reshape(shape)
    names = [
        name for name, site in PEFT_SITES.items() if any(site == s for _, s in adapter.weights)
    ]
    if len(tensors) != len(names) * model.num_layers:
        names = [name.removeprefix(_ROOT).removesuffix(".ia3_l") for name in tensors]
    return {
        "target_modules": names,
        "feedforward_modules": [name for name in names if name.endswith("down_proj")],
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
        "modules_to_save": None,
    }, tensors


def _read_prefix(raw: Mapping[str, Any], tensors: Tensors, model: ModelConfig) -> Adapter:
    _refuse_others(tensors, {"prompt_embeddings"})
    count = raw.get("num_virtual_tokens")
    config = PrefixConfig(count if isinstance(count, int) else 0)
    width = model.num_layers * 2 * model.num_kv_heads * model.head_dim
    values = tensors.get("prompt_embeddings")
    if values is None or values.shape != (config.num_virtual_tokens, width):
        found = "is missing" if values is None else f"has shape {list(values.shape)}"
        raise AdapterError(
            f"tensor prompt_embeddings {found}, not [{config.num_virtual_tokens}, {width}] as the "
            "base model asks for: use the adapter with the model it was trained on"
        )
    shape = (-1, model.num_layers, 2, model.num_kv_heads, model.head_dim)
    layers = values.reshape(shape).transpose(1, 2, 0, 3, 4)
    weights = {
        (layer, prefix.SITE): {"k": layers[layer, 0], "v": layers[layer, 1]}
        for layer in range(model.num_layers)
    }
    return Adapter(config, weights)


def _write_prefix(adapter: Adapter, model: ModelConfig) -> tuple[dict[str, Any], Tensors]:
    layers = [adapter.weights[layer, prefix.SITE] for layer in range(model.num_layers)]
    values = np.stack([np.stack([own["k"], own["v"]]) for own in layers])  # [L, 2, P, K, H]
    count = values.shape[2]
    return {
        "num_virtual_tokens": count,
        "token_dim": model.num_kv_heads * model.head_dim,
        "num_transformer_submodules": 1,
        "num_attention_heads": model.num_kv_heads,
        "num_layers": model.num_layers,
        "encoder_hidden_size": model.d_model,
        "prefix_projection": False,
    }, {"prompt_embeddings": values.transpose(2, 0, 1, 3, 4).reshape(count, -1)}


def _bottleneck_names(model: ModelConfig) -> dict[str, tuple[tuple[int, str], str]]:
    """Tensor name -> (layer, site) and weight."""
    files = {
        "down": "down.weight",
        "down_bias": "down.bias",
        "up": "up.weight",
        "up_bias": "up.bias",
    }
    return {
        f"{_ROOT}{model.names.module_path(layer, module)}.bottleneck_{file}": ((layer, site), name)
        for layer in range(model.num_layers)
        for site, module in bottleneck.FOLLOWS.items()
        for name, file in files.items()
    }


def _read_bottleneck(raw: Mapping[str, Any], tensors: Tensors, model: ModelConfig) -> Adapter:
    size = raw.get("bottleneck_size")
    config = BottleneckConfig(size if isinstance(size, int) else 0)
    if raw.get("non_linearity", "relu") != "relu":
        raise AdapterError(f"non_linearity={raw['non_linearity']!r} is not supported, only 'relu'")
    names, expected = _bottleneck_names(model), bottleneck.shapes(model, config.bottleneck_size)
    _refuse_others(tensors, names.keys())
    weights: dict = {}
    for tensor, (site, name) in names.items():
        if tensor not in tensors:
            raise AdapterError(f"tensor {tensor} is missing: save the adapter again")
        values = tensors[tensor].T
        if values.shape != expected[name]:
            raise AdapterError(
                f"tensor {tensor} has shape {list(values.T.shape)}, not "
                f"{list(expected[name][::-1])}: use the adapter with the model it was trained on"
            )
        weights.setdefault(site, {})[name] = np.ascontiguousarray(values)
    return Adapter(config, weights)


def _write_bottleneck(adapter: Adapter, model: ModelConfig) -> tuple[dict[str, Any], Tensors]:
    tensors = {
        tensor: adapter.weights[site][name].T
        for tensor, (site, name) in _bottleneck_names(model).items()
    }
    (size,) = {own["up"].shape[0] for own in adapter.weights.values()}
    return {"bottleneck_size": size, "non_linearity": "relu"}, tensors


FILE_KINDS = {
    "ia3": FileKind("IA3", _read_ia3, _write_ia3),
    "prefix": FileKind("PREFIX_TUNING", _read_prefix, _write_prefix),
    "bottleneck": FileKind("BOTTLENECK", _read_bottleneck, _write_bottleneck),
}
