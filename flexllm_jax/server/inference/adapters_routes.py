"""vLLM's routes that load and unload adapters while serving; only from folders that are allowed.

A path is resolved, links and all, before anything is read; what it leads to must lie in an allowed
folder, and so must the files in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response
from pydantic import Field

from flexllm_jax.server.engines.client import EngineRefused, EngineUnavailable
from flexllm_jax.server.engines.engines import Engines
from flexllm_jax.server.engines.registry import LOADED, ModelRegistry, ServedAdapter
from flexllm_jax.server.http.access import Known
from flexllm_jax.server.http.body import Body
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.requests import not_ready

_Name = Annotated[str, Field(min_length=1, max_length=200)]


class LoadAdapter(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: _Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAdapter(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: _Name


def find_folder(given: str, allowed: tuple[Path, ...]) -> Path:
    """The folder that `given` means: absolute, or within one of `allowed`. ApiError 403 when it is
    not inside of them, 404 when there is no adapter."""
    outside = ApiError(
        403,
        f"lora_path: {given!r} is not in a folder that server.adapter_dirs allows",
        param="lora_path",
    )
    if "\0" in given or ".." in Path(given).parts:
        raise outside
    roots = [root.resolve() for root in allowed]
    candidates = [Path(given)] if Path(given).is_absolute() else [root / given for root in roots]
    try:
        found = [folder for c in candidates if _is_inside(folder := c.resolve(), roots)]
        for folder in found:
            try:
                files = list(folder.iterdir())
            except OSError:  # there is no such folder, or cannot be: its name is too long
                files = []
            if any(file.name == "adapter_config.json" for file in files):
                if not all(_is_inside(file.resolve(), roots) for file in files):
                    raise outside
                return folder
    except (OSError, RuntimeError):  # links that lead to one another
        raise outside from None
    if not found:
        raise outside
    raise ApiError(404, f"lora_path: there is no adapter in {given!r}", param="lora_path")


def _is_inside(path: Path, roots: list[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def routes(
    allowed: tuple[Path, ...],
    engines: Engines,
    models: ModelRegistry,
    keep: Callable[[str, ServedAdapter | None], Awaitable[None]],
) -> APIRouter:
    """The routes; without `allowed` folders there are none. `keep` makes what is loaded under a
    name outlive the process; None: nothing is."""
    router = APIRouter()
    if not allowed:
        return router

    @router.post("/v1/load_lora_adapter")
    async def load(body: LoadAdapter, client: Known) -> Response:
        name, folder = body.lora_name, find_folder(body.lora_path, allowed)
        known = models.adapters.get(name)
        is_loaded = known and known.engine_name.startswith(LOADED) and client.may_see(known.owner)
        if name == models.base or (known and not is_loaded):
            raise ApiError(400, f"lora_name: {name!r} is another model's", param="lora_name")
        if known and not body.load_inplace:
            message = f"the adapter {name!r} is loaded already; load_inplace replaces it"
            raise ApiError(400, message, param="lora_name")
        owner = known.owner if known else client.owner
        adapter = ServedAdapter(name, LOADED + name, str(folder), owner=owner)
        try:
            await engines.load_adapter(adapter.engine_name, adapter.path)
        except EngineRefused as error:
            raise ApiError(400, str(error), param="lora_path") from None
        except EngineUnavailable:
            raise not_ready(engines) from None
        await keep(name, adapter)
        models.adapters[name] = adapter
        return PlainTextResponse(f"Success: LoRA adapter {name!r} added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadAdapter, client: Known) -> Response:
        name = body.lora_name
        adapter = models.adapters.get(name)
        is_loaded = adapter and adapter.engine_name.startswith(LOADED)
        if adapter is None or not is_loaded or not client.may_see(adapter.owner):
            raise ApiError(404, f"no adapter {name!r} was loaded", param="lora_name")
        await keep(name, None)
        models.adapters.pop(name, None)
        with contextlib.suppress(EngineUnavailable):  # one that starts later does not know it
            await engines.unload_adapter(adapter.engine_name)
        return PlainTextResponse(f"Success: LoRA adapter {name!r} removed successfully.")

    return router
