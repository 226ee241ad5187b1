"""The two files of an adapter in PEFT's format: `adapter_config.json` and
`adapter_model.safetensors`. What is missing or broken is an AdapterError that names the file."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from flexllm_jax.peft.adapter import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def read_config(file: Path) -> dict[str, Any]:
    """The fields of an `adapter_config.json`."""
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


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a small adapter, float32."""
    tensors = {}
    with open_weights(directory) as checkpoint:
        for name in checkpoint.keys():  # noqa: SIM118 (it is no dictionary)
            stored = checkpoint.get_tensor(name)
            if not jnp.issubdtype(stored.dtype, jnp.floating):
                raise AdapterError(f"tensor {name} has dtype {stored.dtype}, not a float")
            tensors[name] = stored.astype(np.float32)
    return tensors
