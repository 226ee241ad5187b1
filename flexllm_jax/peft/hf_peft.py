"""Adapters in PEFT's file format: import, export, and merged checkpoints.

An adapter directory holds `adapter_config.json` and `adapter_model.safetensors`. Invariant: an
adapter that loads here computes what PEFT computes with it, and one saved here is the same adapter
in PEFT. Which modules are targeted and with which rank and scale follows PEFT's own rules; what
PEFT can do beyond plain LoRA on the seven projections, and the kinds of `hf_kinds`, is refused by
name.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.hf_weights import save_parameters
from flexllm_jax.peft.adapter import (
    ALL_LINEAR,
    TARGET_MODULES,
    Adapter,
    AdapterError,
    LoraConfig,
    Site,
    check_mergeable,
    merge_kernel,
    module_path,
)
from flexllm_jax.peft.hf_kinds import FILE_KINDS

logger = logging.getLogger(__name__)

_EMBEDDINGS = ("lm_head.base_layer.weight", "lm_head.weight", "embed_tokens.weight")
_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"

# Fields that make an adapter more than x A B on frozen projections, and what to do about it.
_RETRAIN = "train the adapter without it"
_UNSUPPORTED = {
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
    *_UNSUPPORTED,
    *("peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "base_model_name_or_path", "lora_dropout", "inference_mode", "task_type"),
    *("auto_mapping", "peft_version", "revision", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "velora_config", "megatron_core", "qalora_group_size", "runtime_config"),
    "ensure_weight_tying",
}


def load_adapter(
    path: str | Path, model_config: ModelConfig, base_model_path: str | Path | None = None
) -> Adapter:
    """Load a PEFT adapter for the base model that `model_config` describes.

    `base_model_path`, if given, is compared with the base model the adapter names; a difference is
    only logged, as the same model may lie anywhere. Raises AdapterError, in one line, for what is
    missing, unsupported, or of another base model. Dropout is not used at inference and is ignored.
    """
    directory = Path(path)
    raw = _read_config(directory / _CONFIG)
    named = raw.get("base_model_name_or_path")
    if base_model_path is not None and named and Path(named).name != Path(base_model_path).name:
        logger.warning("%s names base model %s, not %s", directory, named, base_model_path)
    for kind in FILE_KINDS.values():
        if raw.get("peft_type") == kind.peft_type:
            if raw.get("modules_to_save"):
                raise AdapterError(
                    f"{directory / _CONFIG}: modules_to_save={raw['modules_to_save']!r} is not "
                    f"supported; {_UNSUPPORTED['modules_to_save']}"
                )
            try:
                return kind.read(raw, _read_tensors(directory), model_config)
            except AdapterError as error:
                raise AdapterError(f"{directory}: {error}") from None
    return _load_lora(directory, raw, model_config, named)


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a small adapter, float32."""
    tensors = {}
    with _open_weights(directory) as checkpoint:
        for name in checkpoint.keys():  # noqa: SIM118 (it is no dictionary)
            stored = checkpoint.get_tensor(name)
            if not jnp.issubdtype(stored.dtype, jnp.floating):
                raise AdapterError(f"tensor {name} has dtype {stored.dtype}, not a float")
            tensors[name] = stored.astype(np.float32)
    return tensors


def _load_lora(
    directory: Path, raw: Mapping[str, Any], model_config: ModelConfig, named: str | None
) -> Adapter:
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
        raise AdapterError(f"{directory / _CONFIG}: {error}") from None
    return Adapter(config, _read_weights(directory, config, model_config, targets, named))


def save_adapter(
    adapter: Adapter,
    model_config: ModelConfig,
    base_model_path: str | Path,
    out_dir: str | Path,
) -> None:
    """Write an adapter as `peft.PeftModel.from_pretrained` reads it, in float32.

    `base_model_path` is noted as the base model. Files of the same names are overwritten. Raises
    AdapterError if a weight does not have the shape the configuration gives it.
    """
    if isinstance(adapter.config, LoraConfig):
        peft_type, (fields, tensors) = "LORA", _lora_files(adapter, adapter.config, model_config)
    else:
        kind = FILE_KINDS[adapter.config.kind]
        peft_type, (fields, tensors) = kind.peft_type, kind.write(adapter, model_config)
    raw = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model_path),
        "inference_mode": True,
        **fields,
    }
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(values, np.float32) for name, values in tensors.items()},
        out / _WEIGHTS,
        metadata={"format": "pt"},
    )
    # Not sorted: of two patterns that match, the first counts.
    (out / _CONFIG).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _lora_files(
    adapter: Adapter, config: LoraConfig, model_config: ModelConfig
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
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


def save_merged(
    params: Any,
    adapter: Adapter,
    model_config: ModelConfig,
    base_model_path: str | Path,
    out_dir: str | Path,
    *,
    read: Callable[[jax.Array], np.ndarray] = np.asarray,
) -> None:
    """Write a Hugging Face checkpoint with the adapter merged, kernel by kernel on the host.

    `params` is untouched and may be in use meanwhile; `read` brings one to the host. Same errors as
    `save_parameters`, and AdapterError for an adapter that is not LoRA.
    """
    check_mergeable(adapter)
    save_parameters(
        params,
        model_config,
        base_model_path,
        out_dir,
        edit_kernel=partial(merge_kernel, adapter),
        read=read,
    )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            f"{file} does not exist; give a directory written by PEFT's save_pretrained"
        ) from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read: {error}; save the adapter again") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{file} holds a {type(raw).__name__}, not a JSON object")
    return raw


def _refuse_unsupported(directory: Path, raw: Mapping[str, Any]) -> None:
    def refuse(field: str, remedy: str) -> None:
        raise AdapterError(
            f"{directory / _CONFIG}: {field}={raw.get(field)!r} is not supported; {remedy}"
        )

    if raw.get("peft_type") != "LORA":
        kinds = ", ".join(f"{kind.peft_type!r}" for kind in FILE_KINDS.values())
        refuse("peft_type", f"only 'LORA', {kinds} are")
    for field, remedy in _UNSUPPORTED.items():
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
            logger.warning("%s: %s=%r is ignored", directory / _CONFIG, field, raw[field])


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
                f"{directory / _CONFIG}: target_modules={name!r} is not a projection of this base "
                f"model; supported are {', '.join(TARGET_MODULES)} in {model_config.num_layers} "
                "layers"
            )
    try:
        matched = [path for path in [*candidates, *others] if _is_target(raw, names, path)]
    except (re.error, TypeError) as error:
        raise AdapterError(
            f"{directory / _CONFIG}: target_modules={names!r} with exclude_modules="
            f"{raw.get('exclude_modules')!r} cannot be matched with modules: {error}"
        ) from None
    unsupported = [path for path in matched if path in others]
    if unsupported or not matched:
        found = f"matches {unsupported[0]}" if unsupported else "matches no module of this model"
        raise AdapterError(
            f"{directory / _CONFIG}: target_modules={names!r} {found}; supported are "
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


def _tensor_names(layer: int, module: str) -> tuple[str, str]:
    prefix = f"base_model.model.{module_path(layer, module)}"
    return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"


def _shapes(
    config: LoraConfig, model_config: ModelConfig, layer: int, module: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    d_in, d_out = model_config.linear_shapes[module]
    rank = config.rank(layer, module)
    return (d_in, rank), (rank, d_out)


def _open_weights(directory: Path) -> Any:
    file = directory / _WEIGHTS
    if not file.is_file():
        raise AdapterError(
            f"{file} does not exist; save the adapter in safetensors format (PEFT's "
            "save_pretrained with safe_serialization=True)"
        )
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is not a whole safetensors file: {error}") from None


def _read_weights(
    directory: Path,
    config: LoraConfig,
    model_config: ModelConfig,
    targets: Iterable[tuple[int, str]],
    base_model: str | None,
) -> dict[Site, dict[str, np.ndarray]]:
    file = directory / _WEIGHTS
    weights = {}
    with _open_weights(directory) as checkpoint:
        # With the head as a target PEFT saves the base model's embeddings too.
        names = {name for name in set(checkpoint.keys()) if not name.endswith(_EMBEDDINGS)}
        for layer, module in targets:
            shapes = _shapes(config, model_config, layer, module)
            factors = []
            for name, shape in zip(_tensor_names(layer, module), shapes, strict=True):
                if name not in names:
                    raise AdapterError(
                        f"{file}: tensor {name} is missing, but {_CONFIG} targets its module"
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
            f"{file}: tensor {min(names)} ({len(names)} such) belongs to no module that {_CONFIG} "
            "targets in this base model; use the adapter with the model it was trained on"
        )
    return weights
