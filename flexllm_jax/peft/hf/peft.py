"""Adapters in PEFT's file format: import, export, and merged checkpoints.

An adapter directory holds `adapter_config.json` and `adapter_model.safetensors` (`hf_files`).
Invariant: an adapter that loads here computes what PEFT computes with it, and one saved here is the
same adapter in PEFT. LoRA's files are in `hf_lora`, those of the other kinds in `hf_kinds`.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from flexllm_jax.models.checkpoints.hf_weights import save_parameters
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import (
    Adapter,
    AdapterError,
    LoraConfig,
    check_mergeable,
    merge_kernel,
)
from flexllm_jax.peft.hf.files import CONFIG, WEIGHTS, read_config, read_tensors, with_root
from flexllm_jax.peft.hf.kinds import FILE_KINDS
from flexllm_jax.peft.hf.lora import UNSUPPORTED, load_lora, lora_files

logger = logging.getLogger(__name__)

_LONGEST_REASON = 1000  # characters


def load_adapter(
    path: str | Path, model_config: ModelConfig, base_model_path: str | Path | None = None
) -> Adapter:
    """Load a PEFT adapter for the base model that `model_config` describes.

    `base_model_path` (default: what the adapter names, if that is a folder) is where copies of the
    base model's weights are compared. When the adapter names another one, that is only logged, as
    the same model may lie anywhere. Raises AdapterError, in one line, for what is missing,
    unsupported, or of another base model. Dropout is not used at inference and is ignored.

    Whoever wrote the files, it ends, and soon: they are regular ones, expressions are matched in a
    process with limits, and numbers are finite.
    """
    try:
        return _load(Path(path), model_config, base_model_path)
    except AdapterError as error:
        text = str(error)
        if len(text) <= _LONGEST_REASON:
            raise
        half = _LONGEST_REASON // 2  # it repeats what the files have
        raise AdapterError(f"{text[:half]} ... {text[-half:]}") from None


def _load(
    directory: Path, model_config: ModelConfig, base_model_path: str | Path | None
) -> Adapter:
    raw = read_config(directory / CONFIG)
    model_config = with_root(directory, model_config)
    named = raw.get("base_model_name_or_path")
    if not isinstance(named, str | None):
        raise AdapterError(
            f"{directory / CONFIG}: base_model_name_or_path={named!r} must be text; save it again"
        )
    if base_model_path is not None and named and Path(named).name != Path(base_model_path).name:
        logger.warning("%s names base model %s, not %s", directory, named, base_model_path)
    if base_model_path is None and named and Path(named).is_dir():
        base_model_path = named
    for kind in FILE_KINDS.values():
        if raw.get("peft_type") == kind.peft_type:
            if raw.get("modules_to_save"):
                raise AdapterError(
                    f"{directory / CONFIG}: modules_to_save={raw['modules_to_save']!r} is not "
                    f"supported; {UNSUPPORTED['modules_to_save']}"
                )
            tensors = read_tensors(directory, model_config, base_model_path)
            try:
                return kind.read(raw, tensors, model_config)
            except AdapterError as error:
                raise AdapterError(f"{directory}: {error}") from None
    return load_lora(directory, raw, model_config, base_model_path)


def save_adapter(
    adapter: Adapter,
    model_config: ModelConfig,
    base_model_path: str | Path,
    out_dir: str | Path,
) -> None:
    """Write an adapter as `peft.PeftModel.from_pretrained` reads it, in float32.

    `base_model_path` is noted as the base model. Files of the same names are replaced, each at
    once, the configuration last: whatever stops this, a folder with a configuration has weights in
    whole. Raises AdapterError if a weight does not have the shape the configuration gives it;
    OSError, or safetensors' own error, if it cannot be written.
    """
    if isinstance(adapter.config, LoraConfig):
        peft_type, (fields, tensors) = "LORA", lora_files(adapter, adapter.config, model_config)
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
    arrays = {name: np.ascontiguousarray(values, np.float32) for name, values in tensors.items()}
    with _replaced(out / WEIGHTS) as part:
        save_file(arrays, part, metadata={"format": "pt"})
    with _replaced(out / CONFIG) as part:
        # Not sorted: of two patterns that match, the first counts.
        part.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def is_adapter(folder: Path) -> bool:
    """Whether an adapter was written to `folder` to its end."""
    return (folder / CONFIG).is_file()


@contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when it is whole and on disk."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with suppress(OSError):  # it took the place, or was not made
            part.unlink()


def save_merged(
    params: Any,
    adapter: Adapter,
    model_config: ModelConfig,
    base_model_path: str | Path,
    out_dir: str | Path,
    *,
    read: Callable[[jax.Array], np.ndarray] = np.asarray,
    dtype: DTypeLike | None = None,
) -> None:
    """Write a Hugging Face checkpoint with the adapter merged, kernel by kernel on the host.

    `params` is untouched and may be in use meanwhile; `read` brings one to the host. Weights
    become `dtype`, or stay what they are. Same errors as `save_parameters`, and
    AdapterError for an adapter that is not LoRA.
    """
    check_mergeable(adapter)
    save_parameters(
        params,
        model_config,
        base_model_path,
        out_dir,
        edit_kernel=partial(merge_kernel, adapter),
        read=read,
        dtype=dtype,
    )
