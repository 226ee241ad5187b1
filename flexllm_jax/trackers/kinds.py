"""The kinds of trackers: what the configuration calls them, and the module of each."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from flexllm_jax.config import Section, TrackersSection
from flexllm_jax.errors import UserError
from flexllm_jax.trackers.tracker import Tracker

_CLASSES = {  # module and class; modules import their libraries
    "tensorboard": ("event_files", "TensorboardTracker"),
    "wandb": ("wandb_runs", "WandbTracker"),
    "mlflow": ("mlflow_runs", "MlflowTracker"),
}


def require(trackers: TrackersSection) -> None:
    """UserError when a tracker of the configuration is not installed, or has no key."""
    for name, section in trackers.chosen():
        make(name, section)


def make(name: str, section: Section) -> Tracker:
    """A tracker by its name in the configuration. UserError as `require`."""
    return _class_of(name)(section)


def _class_of(name: str) -> Any:
    file, tracker = _CLASSES[name]
    try:
        module = import_module(f"flexllm_jax.trackers.{file}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"trackers.{name}: {error.name} is not installed: pip install 'flexllm_jax[{name}]'"
        ) from None
    return getattr(module, tracker)
