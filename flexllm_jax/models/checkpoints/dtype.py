"""The type of the weights: which one a checkpoint has, and which one an engine or an export takes.

`auto` on a GPU is the checkpoint's own. A CPU computes in float32, which holds every 16-bit number
exactly: most have no products of bfloat16, and emulate them.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from flexllm_jax.models.fields import ModelConfigError

_FIELDS = ("dtype", "torch_dtype")  # of config.json: newer and older versions of transformers
_STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
# Those that an engine computes with, by the checkpoint's.
_COMPUTED = {"float16": "bfloat16", "float64": "float32"}


def checkpoint_dtype(path: str | Path) -> np.dtype:
    """The type that `config.json` names, as in transformers, or else that of the first weights;
    float32 where there are none. ModelConfigError for one that weights cannot have."""
    file = Path(path) / "config.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    field = next((name for name in _FIELDS if raw.get(name) is not None), None)
    named = raw[field] if field else _stored_dtype(Path(path))
    if named not in _STORED.values():
        raise ModelConfigError(
            f"{file}: {field}={named!r} is none of {', '.join(_STORED.values())}; correct it, or "
            f"set model.dtype"
        )
    return jnp.dtype(named)


def engine_dtype(asked: str, path: str | Path, platform: str) -> np.dtype:
    """What `model.dtype` means for a checkpoint on a device of a platform ("cpu", "gpu")."""
    if asked != "auto":
        return jnp.dtype(asked)
    own = checkpoint_dtype(path).name
    return jnp.dtype("float32" if platform == "cpu" else _COMPUTED.get(own, own))


def export_dtype(asked: str, path: str | Path) -> np.dtype:
    """What `model.dtype` means for a checkpoint that is made of another one."""
    return checkpoint_dtype(path) if asked == "auto" else jnp.dtype(asked)


def describe_dtype(asked: str, path: str | Path, chosen: np.dtype) -> str:
    """A part of the start-up line: the type, and whose choice it is."""
    if asked != "auto":
        return f"{chosen} (model.dtype)"
    own = checkpoint_dtype(path)
    if own == chosen:
        return f"{chosen} (the checkpoint's)"
    return f"{chosen} (model.dtype: auto; the checkpoint has {own})"


def name_dtype(config_file: Path, dtype: str) -> None:
    """Make a copied config.json name the type of the weights, which loaders may go by."""
    raw = json.loads(config_file.read_text(encoding="utf-8"))
    field = "torch_dtype" if "torch_dtype" in raw else "dtype"
    config_file.write_text(json.dumps({**raw, field: dtype}, indent=2) + "\n", encoding="utf-8")


def _stored_dtype(folder: Path) -> str:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 (a file's, which is no mapping)
                if found := _STORED.get(checkpoint.get_slice(name).get_dtype()):
                    return found
    return "float32"
