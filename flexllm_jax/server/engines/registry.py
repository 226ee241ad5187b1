"""The models clients can name: the base model, and every adapter, wherever it came from."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from flexllm_jax.config import Config
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError

LOADED = "loaded/"  # begins the engine's names of adapters loaded over HTTP: none is a job's


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter: the name clients use, the engine's, and the folder it comes from. `owner`: the
    key whose it is; None: everybody's."""

    name: str
    engine_name: str
    path: str
    created: int = field(default_factory=lambda: int(time.time()))
    owner: str | None = None


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

    def named(self, name: str | None) -> str:
        """The model that a request means, which need not name one: the base model."""
        return self.base if name is None else name

    def resolve(self, name: str | None, client: Client) -> ServedAdapter | None:
        """The adapter that a request's `model` means; None: the base model."""
        if name in (None, self.base):
            return None
        adapter = self.adapters.get(name)
        if adapter is None or not client.may_see(adapter.owner):
            raise self.unknown(name)
        return adapter

    def unknown(self, name: str) -> ApiError:
        """The error for a model that there is not."""
        shown = name if len(name) <= 100 else name[:97] + "..."
        message = f"the model {shown!r} does not exist; GET /v1/models lists those that do"
        return ApiError(404, message, param="model", code="model_not_found")

    def describe(self, name: str, client: Client) -> dict[str, Any]:
        """A model as /v1/models tells it, with vLLM's `root` and `parent`."""
        adapter = self.resolve(name, client)
        if adapter is None:
            own = {"created": self.created, "root": self.root, "parent": None}
            own["max_model_len"] = self.max_model_len
        else:
            own = {"created": adapter.created, "root": adapter.path, "parent": self.base}
        return {"id": name, "object": "model", "owned_by": "flexllm_jax", **own}

    def describe_all(self, client: Client) -> list[dict[str, Any]]:
        """The base model first."""
        names = [a.name for a in self.adapters.values() if client.may_see(a.owner)]
        return [self.describe(name, client) for name in (self.base, *names)]
