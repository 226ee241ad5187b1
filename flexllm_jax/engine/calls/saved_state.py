"""What a client saves of the adapter it trains: a PEFT folder, and beside it the optimizer's state.

A folder that has a `state.json` is whole: it is made under another name, and takes the place of an
earlier one at once. What it holds does not depend on the bank that the adapter was trained in.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optax
from safetensors.numpy import load_file, save_file

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import Adapter, AdapterError, LoraConfig, Weights
from flexllm_jax.peft.hf.peft import load_adapter, save_adapter

STATE, MOMENTS = "state.json", "optimizer.safetensors"
_PARTS = ("mu", "nu")  # of AdamW
# What a client chooses to train, and PEFT's names of those modules.
CHOICES = {
    "train_attn": ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    "train_mlp": ("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
    "train_unembed": ("lm_head",),
}


@dataclass(frozen=True, eq=False)
class SavedState:
    """An adapter, and unless it is fresh AdamW's moments of its weights and the steps done."""

    adapter: Adapter
    moments: dict[str, Weights] | None = None
    step: int = 0


def describe(config: LoraConfig) -> dict[str, Any]:
    """An adapter as a client chooses it."""
    chosen = {
        key: any(name in config.target_modules for name in own) for key, own in CHOICES.items()
    }
    return {"rank": config.r, "alpha": config.alpha, **chosen}


def save_state(state: SavedState, model: ModelConfig, base: Path, folder: Path) -> int:
    """Write it to `folder`, which is replaced; returns its size in bytes."""

    def write(part: Path) -> None:
        save_adapter(state.adapter, model, base, part)
        tensors = {
            f"{name}.{layer}.{site}.{factor}": array
            for name, weights in (state.moments or {}).items()
            for (layer, site), own in weights.items()
            for factor, array in own.items()
        }
        save_file(tensors, part / MOMENTS)
        config = state.adapter.config
        assert isinstance(config, LoraConfig)
        (part / STATE).write_text(json.dumps(describe(config) | {"step": state.step}))

    return _replace(folder, write)


def save_weights(adapter: Adapter, model: ModelConfig, base: Path, folder: Path) -> int:
    """Write an adapter in PEFT's format to `folder`, which is replaced; returns its size."""
    return _replace(folder, lambda part: save_adapter(adapter, model, base, part))


def load_state(folder: Path, model: ModelConfig, base: Path, *, optimizer: bool) -> SavedState:
    """Read what `save_state` wrote, or without `optimizer` any PEFT folder of LoRA. AdapterError,
    in one line, for what cannot be used."""
    adapter = load_adapter(folder, model, base)
    if not isinstance(adapter.config, LoraConfig) or adapter.config.from_base:
        raise AdapterError(f"{folder}: only plain LoRA can be trained by calls")
    if not optimizer:
        return SavedState(adapter)
    try:
        step = int(json.loads((folder / STATE).read_text())["step"])
        tensors = load_file(folder / MOMENTS)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise AdapterError(
            f"{folder} has no optimizer's state that can be read ({reason}): load its weights alone"
        ) from None
    moments: dict[str, dict[tuple[int, str], dict[str, np.ndarray]]] = {p: {} for p in _PARTS}
    for key, array in tensors.items():
        name, layer, site, factor = key.split(".")
        moments[name].setdefault((int(layer), site), {})[factor] = array
    return SavedState(adapter, dict(moments), step)


def optimizer_parts(state: Any) -> tuple[dict[str, Any], int]:
    """AdamW's moments by name, in the shapes of the master weights; the steps done."""
    moments = {name: optax.tree_utils.tree_get(state, name) for name in _PARTS}
    return moments, int(optax.tree_utils.tree_get(state, "count"))


def with_parts(state: Any, parts: dict[str, Any], step: int) -> Any:
    """An optimizer's state with these moments after so many steps."""
    return optax.tree_utils.tree_set(state, **parts, count=np.int32(step))


def _replace(folder: Path, write: Callable[[Path], None]) -> int:
    """Let `write` fill a folder that takes the place of `folder`; returns the size of its files."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part, old = (folder.with_name(f"{folder.name}.{end}") for end in ("part", "old"))
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        part.mkdir()
        write(part)
        size = 0
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
            size += path.stat().st_size
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return size
