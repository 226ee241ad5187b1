"""The models clients can name: the base model, and every adapter, wherever it came from."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from flexllm_jax.config import Config
from flexllm_jax.server.errors import ApiError


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter: the name clients use, the engine's, and the folder it comes from."""

    name: str
    engine_name: str
    path: str
    created: int = field(default_factory=lambda: int(time.time()))


class ModelRegistry:
    """One registry stands behind all interfaces."""

    def __init__(self, config: Config):
        path = config.model.path
        self.base = config.server.model_name or path.resolve().name
        self.root = str(path)
        self.created = int(time.time())
        self.max_model_len: int | None = None
        self.adapters = {
            a.name: ServedAdapter(a.name, a.name, str(a.path)) for a in config.adapters.preload
        }

    def resolve(self, name: str) -> ServedAdapter | None:
        """The adapter that a request's `model` means; None: the base model."""
        if name == self.base:
            return None
        adapter = self.adapters.get(name)
        if adapter is None:
            raise self.unknown(name)
        return adapter

    def unknown(self, name: str) -> ApiError:
        """The error for a model that there is not."""
        shown = name if len(name) <= 100 else name[:97] + "..."
        message = f"the model {shown!r} does not exist; GET /v1/models lists those that do"
        return ApiError(404, message, param="model", code="model_not_found")

    def describe(self, name: str) -> dict[str, Any]:
        """A model as /v1/models tells it, with vLLM's `root` and `parent`."""
        if name == self.base:
            own = {"created": self.created, "root": self.root, "parent": None}
            own["max_model_len"] = self.max_model_len
        elif adapter := self.adapters.get(name):
            own = {"created": adapter.created, "root": adapter.path, "parent": self.base}
        else:
            raise self.unknown(name)
        return {"id": name, "object": "model", "owned_by": "flexllm_jax", **own}

    def describe_all(self) -> list[dict[str, Any]]:
        """The base model first."""
        return [self.describe(name) for name in (self.base, *self.adapters)]
