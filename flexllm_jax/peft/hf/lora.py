"""LoRA in PEFT's file format: which projections it is on, its tensors, and what is refused.

Which modules are targeted and with which rank and scale follows PEFT's own rules; what PEFT can do
beyond plain LoRA on the projections and the output head is refused by name.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import (
    PATH_END,
    TARGET_MODULES,
    Adapter,
    AdapterError,
    LoraConfig,
    Site,
)
from flexllm_jax.peft.hf.files import CONFIG, ROOT, WEIGHTS, read_tensors
from flexllm_jax.peft.hf.kinds import FILE_KINDS
from flexllm_jax.peft.hf.targets import candidates, target_fields, targeted_sites
from flexllm_jax.peft.patterns import Expression, match_paths

logger = logging.getLogger(__name__)

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
    directory: Path,
    raw: Mapping[str, Any],
    model_config: ModelConfig,
    base_model_path: str | Path | None,
) -> Adapter:
    """The LoRA adapter in a folder. `raw`: its configuration."""
    _refuse_unsupported(directory, raw)
    try:
        targets = targeted_sites(raw, model_config)
        modules = {module for _, module in targets}
        layers = {layer for layer, module in targets if module != "head"}
        config = LoraConfig(
            r=raw.get("r", 8),
            alpha=raw.get("lora_alpha", 8),
            target_modules=tuple(
                name for name, module in TARGET_MODULES.items() if module in modules
            ),
            use_rslora=bool(raw.get("use_rslora")),
            **_patterns(raw, model_config),
            lora_dropout=float(raw.get("lora_dropout") or 0.0),
            layers_to_transform=(
                None if len(layers) in (0, model_config.num_layers) else tuple(sorted(layers))
            ),
        )
    except AdapterError as error:
        raise AdapterError(f"{directory / CONFIG}: {error}") from None
    tensors = read_tensors(directory, model_config, base_model_path)
    named = raw.get("base_model_name_or_path")
    weights = _take_weights(tensors, directory / WEIGHTS, config, model_config, targets, named)
    return Adapter(config, weights)


def _patterns(raw: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """rank_pattern and alpha_pattern, and what they say of every module of `model`."""
    ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
    for name, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, Mapping):
            raise AdapterError(f"{name}={pattern!r} must map patterns to numbers")
    paths = candidates(model)
    matches = match_paths([_key(key) for key in {**ranks, **alphas}], list(paths))

    def find(values: Mapping[str, Any], path: str, default: Any) -> Any:
        found = (v for k, v in values.items() if path in matches[_key(k)])
        return next(found, default)

    r, alpha = raw.get("r", 8), raw.get("lora_alpha", 8)
    resolved = {
        site: (find(ranks, path, r), find(alphas, path, alpha)) for path, site in paths.items()
    }
    return {"rank_pattern": ranks, "alpha_pattern": alphas, "resolved": resolved}


def _key(pattern: str) -> Expression:
    return Expression("start", pattern, *PATH_END)


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
    dropout = raw.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        refuse("lora_dropout", "it must be from 0 to 1")
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


def _take_weights(
    tensors: dict[str, np.ndarray],
    file: Path,
    config: LoraConfig,
    model_config: ModelConfig,
    targets: Iterable[Site],
    base_model: str | None,
) -> dict[Site, dict[str, np.ndarray]]:
    """The factors of all targets; takes them out of `tensors`, which must be empty then."""
    weights = {}
    for layer, module in targets:
        shapes = _shapes(config, model_config, layer, module)
        factors = []
        for name, shape in zip(_tensor_names(model_config, layer, module), shapes, strict=True):
            stored = tensors.pop(name, None)
            if stored is None:
                raise AdapterError(
                    f"{file}: tensor {name} is missing, but {CONFIG} targets its module"
                )
            if stored.shape != shape[::-1]:
                raise AdapterError(
                    f"{file}: tensor {name} has shape {list(stored.shape)}, but rank and base "
                    f"model ask for {list(shape[::-1])}; the adapter was trained on "
                    f"{base_model or 'another base model'}"
                )
            factors.append(np.ascontiguousarray(stored.T))
        weights[layer, module] = dict(zip(("a", "b"), factors, strict=True))
    if tensors:
        raise AdapterError(
            f"{file}: tensor {min(tensors)} ({len(tensors)} such) belongs to no module that "
            f"{CONFIG} targets in this base model; use the adapter with the model it was trained on"
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
                f"{model_config.names.module_path(layer, module)}: A {a.shape} and B {b.shape} "
                f"should be {expected[0]} and {expected[1]}; the configuration belongs to another "
                "adapter"
            )
        name_a, name_b = _tensor_names(model_config, layer, module)
        tensors[name_a], tensors[name_b] = a.T, b.T
    fields = {
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        **target_fields(adapter, model_config),
    }
    return fields, tensors


# -- tensors -------------------------------------------------------------------------------------


def _tensor_names(model: ModelConfig, layer: int, module: str) -> tuple[str, str]:
    prefix = f"{ROOT}{model.names.module_path(layer, module)}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def _shapes(
    config: LoraConfig, model_config: ModelConfig, layer: int, module: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    d_in, d_out = model_config.kernel_shapes(layer)[module]
    rank = config.rank(layer, module)
    return (d_in, rank), (rank, d_out)
