"""The two files of an adapter in PEFT's format: `adapter_config.json` and
`adapter_model.safetensors`. What is missing or broken is an AdapterError that names the file."""

import json
import logging
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from flexllm_jax.models.checkpoints.hf_weights import holds_tensor, tensor_names
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.names import ROOTS
from flexllm_jax.peft.adapter import AdapterError

logger = logging.getLogger(__name__)

ROOT = "base_model.model."  # before the base model's names
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_MOST_CONFIG_BYTES = 2**20


def read_config(file: Path) -> dict[str, Any]:
    """The fields of an `adapter_config.json`."""
    try:
        _require_file(file, _MOST_CONFIG_BYTES)
        raw = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise AdapterError(
            f"{file} does not exist; give a directory written by PEFT's save_pretrained"
        ) from None
    except RecursionError:
        raise AdapterError(f"{file} is nested too deeply; save the adapter again") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{file} cannot be read: {error}; save the adapter again") from None
    if not isinstance(raw, dict):
        raise AdapterError(f"{file} holds a {type(raw).__name__}, not a JSON object")
    return raw


def _require_file(file: Path, most_bytes: int | None = None) -> None:
    """OSError or ValueError for what has no end: a pipe, a device, a loop of links."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if most_bytes is not None and status.st_size > most_bytes:
        raise ValueError(f"it has {status.st_size} bytes, more than {most_bytes}")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def open_weights(directory: Path) -> Any:
    """The tensors of an adapter, to be read one by one."""
    file = directory / WEIGHTS
    if not file.is_file():
        raise AdapterError(
            f"{file} does not exist; save the adapter in safetensors format (PEFT's "
            "save_pretrained with safe_serialization=True)"
        )
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is not a whole safetensors file: {error}") from None


def with_root(directory: Path, model: ModelConfig) -> ModelConfig:
    """The model by the names that an adapter has for its modules: what was trained through the
    class of a model's text alone, or of all of it, is served in either."""
    with open_weights(directory) as checkpoint:
        names = list(checkpoint.keys())
    for root in ROOTS:
        if any(name.startswith(f"{ROOT}{root.layers}.") for name in names):
            return replace(model, names=replace(model.names, root=root.root))
    return model


def read_tensors(
    directory: Path, model: ModelConfig, base_model_path: str | Path | None
) -> dict[str, np.ndarray]:
    """The tensors of an adapter, float32.

    PEFT also saves weights of the base model (with the head as a target, or after a change of the
    vocabulary): copies of what the base model at `base_model_path` has are left out, and said;
    others are refused, for the requests of all adapters share the base model.
    """
    base_names = tensor_names(model)
    tensors, copies = {}, []
    with open_weights(directory) as checkpoint:
        for name in sorted(checkpoint.keys()):
            base_name = name.removeprefix(ROOT).replace(".base_layer.", ".")
            if base_name in base_names:
                stored = checkpoint.get_slice(name)
                if base_model_path is None or not holds_tensor(
                    base_model_path, model, base_name, stored
                ):
                    raise AdapterError(
                        f"{directory / WEIGHTS}: tensor {name} {stored.get_shape()} is not the "
                        "base model's (it was trained or resized), which all adapters share; train "
                        "the adapter without it, or merge it and serve that model"
                    )
                copies.append(name)
                continue
            values = checkpoint.get_tensor(name)
            if not jnp.issubdtype(values.dtype, jnp.floating):
                raise AdapterError(
                    f"{directory / WEIGHTS}: tensor {name} has dtype {values.dtype}, not a float"
                )
            tensors[name] = values.astype(np.float32)
            if not np.isfinite(tensors[name]).all():
                raise AdapterError(
                    f"{directory / WEIGHTS}: tensor {name} has values that are not finite: the "
                    "adapter's training diverged, or the file is broken"
                )
    if copies:
        logger.warning("%s: copies of the base model's %s are not used", directory, copies)
    return tensors
