"""LoRA in PEFT's file format: which projections it is on, its tensors, and what is refused.

Which modules are targeted and with which rank and scale follows PEFT's own rules; what PEFT can do
beyond plain LoRA on the seven projections and the output head is refused by name.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import (
    ALL_LINEAR,
    TARGET_MODULES,
    Adapter,
    AdapterError,
    LoraConfig,
    Site,
    module_path,
)
from flexllm_jax.peft.hf_files import CONFIG, WEIGHTS, open_weights
from flexllm_jax.peft.hf_kinds import FILE_KINDS

logger = logging.getLogger(__name__)

_EMBEDDINGS = ("lm_head.base_layer.weight", "lm_head.weight", "embed_tokens.weight")

# Fields that make an adapter more than x A B on frozen projections, and what to do about it.
_RETRAIN = "train the adapter without it"
UNSUPPORTED = {
    "use_dora": _RETRAIN,
    "modules_to_save": "train the adapter without fully trained modules",
    "fan_in_fan_out": "it is for Conv1D layers, which this base model has not; set it to false",
    "layer_replication": _RETRAIN,
    "lora_bias": _RETRAIN,
    "trainable_token_indices": _RETRAIN,
    "target_parameters": "name linear layers in target_modules instead",
    "alora_invocation_tokens": _RETRAIN,
    "use_qalora": _RETRAIN,
    "use_bdlora": _RETRAIN,
    "arrow_config": "use the adapters it routes between one by one",
    "kasa_config": _RETRAIN,
    "monteclora_config": _RETRAIN,
    "megatron_config": "export the adapter for the Hugging Face model",
}
# These initializations leave the base weights as they are; PiSSA, OLoRA, LoftQ, ... change them.
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Read here, or of no consequence for what a trained adapter computes.
_KNOWN = {
    *UNSUPPORTED,
    *("peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "base_model_name_or_path", "lora_dropout", "inference_mode", "task_type"),
    *("auto_mapping", "peft_version", "revision", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "velora_config", "megatron_core", "qalora_group_size", "runtime_config"),
    "ensure_weight_tying",
}


# -- reading ------------------------------------------------------------------------------------


def load_lora(
    directory: Path, raw: Mapping[str, Any], model_config: ModelConfig, named: str | None
) -> Adapter:
    """The LoRA adapter in a folder. `raw`: its configuration; `named`: the base model it names."""
    _refuse_unsupported(directory, raw)
    targets = _targets(directory, raw, model_config)
    modules = {module for _, module in targets}
    layers = {layer for layer, _ in targets}
    try:
        config = LoraConfig(
            r=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            target_modules=tuple(
                name for name, module in TARGET_MODULES.items() if module in modules
            ),
            use_rslora=bool(raw.get("use_rslora")),
            rank_pattern=raw.get("rank_pattern") or {},
            alpha_pattern=raw.get("alpha_pattern") or {},
            layers_to_transform=(
                None if len(layers) == model_config.num_layers else tuple(sorted(layers))
            ),
        )
    except AdapterError as error:
        raise AdapterError(f"{directory / CONFIG}: {error}") from None
    return Adapter(config, _read_weights(directory, config, model_config, targets, named))


def _refuse_unsupported(directory: Path, raw: Mapping[str, Any]) -> None:
    def refuse(field: str, remedy: str) -> None:
        raise AdapterError(
            f"{directory / CONFIG}: {field}={raw.get(field)!r} is not supported; {remedy}"
        )

    if raw.get("peft_type") != "LORA":
        kinds = ", ".join(f"{kind.peft_type!r}" for kind in FILE_KINDS.values())
        refuse("peft_type", f"only 'LORA', {kinds} are")
    for field, remedy in UNSUPPORTED.items():
        if raw.get(field):
            refuse(field, remedy)
    if raw.get("bias", "none") != "none":
        refuse("bias", "train the adapter with bias='none'")
    if raw.get("init_lora_weights") not in _INITIALIZATIONS:
        refuse(
            "init_lora_weights",
            "it changes the base weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion",
        )
    for field in sorted(raw.keys() - _KNOWN):
        if raw[field]:
            logger.warning("%s: %s=%r is ignored", directory / CONFIG, field, raw[field])


def _read_weights(
    directory: Path,
    config: LoraConfig,
    model_config: ModelConfig,
    targets: Iterable[tuple[int, str]],
    base_model: str | None,
) -> dict[Site, dict[str, np.ndarray]]:
    file = directory / WEIGHTS
    weights = {}
    with open_weights(directory) as checkpoint:
        # With the head as a target PEFT saves the base model's embeddings too.
        names = {name for name in set(checkpoint.keys()) if not name.endswith(_EMBEDDINGS)}
        for layer, module in targets:
            shapes = _shapes(config, model_config, layer, module)
            factors = []
            for name, shape in zip(_tensor_names(layer, module), shapes, strict=True):
                if name not in names:
                    raise AdapterError(
                        f"{file}: tensor {name} is missing, but {CONFIG} targets its module"
                    )
                names.remove(name)
                stored = checkpoint.get_tensor(name)
                if stored.shape != shape[::-1]:
                    raise AdapterError(
                        f"{file}: tensor {name} has shape {list(stored.shape)}, but rank and base "
                        f"model ask for {list(shape[::-1])}; the adapter was trained on "
                        f"{base_model or 'another base model'}"
                    )
                if not jnp.issubdtype(stored.dtype, jnp.floating):
                    raise AdapterError(
                        f"{file}: tensor {name} has dtype {stored.dtype}, not a float"
                    )
                factors.append(np.ascontiguousarray(stored.T.astype(np.float32)))
            weights[layer, module] = dict(zip(("a", "b"), factors, strict=True))
    if names:
        raise AdapterError(
            f"{file}: tensor {min(names)} ({len(names)} such) belongs to no module that {CONFIG} "
            "targets in this base model; use the adapter with the model it was trained on"
        )
    return weights


# -- writing ------------------------------------------------------------------------------------


def lora_files(
    adapter: Adapter, config: LoraConfig, model_config: ModelConfig
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields and the tensors that PEFT's files hold of a LoRA adapter."""
    tensors = {}
    for (layer, module), weights in adapter.weights.items():
        a, b = weights["a"], weights["b"]
        expected = _shapes(config, model_config, layer, module)
        if (a.shape, b.shape) != expected:
            raise AdapterError(
                f"{module_path(layer, module)}: A {a.shape} and B {b.shape} should "
                f"be {expected[0]} and {expected[1]}; the configuration belongs to another adapter"
            )
        name_a, name_b = _tensor_names(layer, module)
        tensors[name_a], tensors[name_b] = a.T, b.T
    fields = {
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        **_target_fields(adapter, model_config.num_layers),
    }
    return fields, tensors


def _target_fields(adapter: Adapter, num_layers: int) -> dict[str, Any]:
    """PEFT's fields that select exactly the adapter's projections."""
    targets = set(adapter.weights)
    layers = sorted({layer for layer, _ in targets})
    modules = [
        name for name, module in TARGET_MODULES.items() if any(module == m for _, m in targets)
    ]
    if len(targets) != len(layers) * len(modules):
        paths = [module_path(layer, module) for layer, module in sorted(targets)]
        return {"target_modules": paths, "layers_to_transform": None}
    some = None if layers == list(range(num_layers)) else layers
    return {"target_modules": modules, "layers_to_transform": some}


# -- modules and tensors -------------------------------------------------------------------------


def _targets(
    directory: Path, raw: Mapping[str, Any], model_config: ModelConfig
) -> tuple[tuple[int, str], ...]:
    """The projections an adapter changes, by PEFT's rules (`check_target_module_exists`)."""
    names = raw.get("target_modules")
    if isinstance(names, str) and names.lower() == "all-linear":
        names = list(ALL_LINEAR)
    candidates = {
        module_path(layer, module): (layer, module)
        for layer in range(model_config.num_layers)
        for module in TARGET_MODULES.values()
        if module != "head"
    }
    head = (model_config.num_layers, "head")
    candidates[module_path(*head)] = head
    others = ["model.embed_tokens"]  # what else PEFT's LoRA could be put on
    for name in names if isinstance(names, list) else []:
        if not any(_names_module(name, path) for path in candidates):
            raise AdapterError(
                f"{directory / CONFIG}: target_modules={name!r} is not a projection of this base "
                f"model; supported are {', '.join(TARGET_MODULES)} in {model_config.num_layers} "
                "layers"
            )
    try:
        matched = [path for path in [*candidates, *others] if _is_target(raw, names, path)]
    except (re.error, TypeError) as error:
        raise AdapterError(
            f"{directory / CONFIG}: target_modules={names!r} with exclude_modules="
            f"{raw.get('exclude_modules')!r} cannot be matched with modules: {error}"
        ) from None
    unsupported = [path for path in matched if path in others]
    if unsupported or not matched:
        found = f"matches {unsupported[0]}" if unsupported else "matches no module of this model"
        raise AdapterError(
            f"{directory / CONFIG}: target_modules={names!r} {found}; supported are "
            f"{', '.join(TARGET_MODULES)}"
        )
    return tuple(candidates[path] for path in matched)


def _names_module(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _matches(spec: str | list[str], path: str) -> bool:
    if isinstance(spec, str):
        return re.fullmatch(spec, path) is not None
    return any(_names_module(name, path) for name in spec)


def _is_target(raw: Mapping[str, Any], names: Any, path: str) -> bool:
    excluded = raw.get("exclude_modules")
    if excluded and _matches(excluded, path):
        return False
    if not _matches(names, path):
        return False
    layers = raw.get("layers_to_transform")
    if isinstance(names, str) or layers is None or layers == []:
        return True
    patterns = raw.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for pattern in patterns:
        # PEFT's two expressions, with and without a pattern, agree on these paths.
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\.", path)
        if match:
            return int(match["layer"]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _tensor_names(layer: int, module: str) -> tuple[str, str]:
    prefix = f"base_model.model.{module_path(layer, module)}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def _shapes(
    config: LoraConfig, model_config: ModelConfig, layer: int, module: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    d_in, d_out = model_config.linear_shapes[module]
    rank = config.rank(layer, module)
    return (d_in, rank), (rank, d_out)
