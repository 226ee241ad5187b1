"""Routes under /api/v1 that tell of sessions, runs, checkpoints and usage, and hand out files.

A run's id has `:` in it, a checkpoint's `/`: the routes with more after them come first. Files are
fetched without a key, at an address that is signed and expires.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
import tarfile
import time
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from sqlalchemy import func, select
from sqlalchemy.orm import Session
from starlette.background import BackgroundTask

from flexllm_jax.server.http.access import Client, Known
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.sse import json_response
from flexllm_jax.server.tinker.calls import check_ttl
from flexllm_jax.server.tinker.protocol import paths, schema
from flexllm_jax.server.tinker.protocol.paths import TinkerPath
from flexllm_jax.server.tinker.routes import API
from flexllm_jax.server.tinker.service import TinkerService
from flexllm_jax.server.tinker.sessions import unknown
from flexllm_jax.server.tinker.store import folder_files
from flexllm_jax.server.tinker.tables import CheckpointRow, ModelRow

_SIGNED_S = 3600
_TAR = "archive.tar"
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0)]
Kind = Literal["weights", "sampler_weights", "external_weights"]
_AT = "/training_runs/{run}/checkpoints/{kind}/{name}"


def rest_routes(tinker: TinkerService) -> APIRouter:
    """The routes; as others of the Tinker API not part of /openapi.json."""
    router = APIRouter(prefix=API, include_in_schema=False)
    files = Files(tinker)
    _told(router, tinker)
    _checkpoints(router, tinker, files)
    router.get("/checkpoint_files/{signed}/{name}")(files.fetch)
    return router


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def describe_checkpoint(row: CheckpointRow) -> dict[str, Any]:
    """A checkpoint as the SDK reads it."""
    return {
        "checkpoint_id": f"{row.kind}/{row.name}",
        "checkpoint_type": paths.TYPES[row.kind],
        "time": _time(row.created_at),
        "tinker_path": row.path,
        "size_bytes": row.size_bytes,
        "public": row.public,
        "user_metadata": row.user_metadata,
        "expires_at": None if row.expires_at is None else _time(row.expires_at),
    }


def _describe_run(session: Session, row: ModelRow) -> dict[str, Any]:
    def newest(kind: str) -> dict[str, Any] | None:
        query = select(CheckpointRow).where(
            CheckpointRow.run_id == row.id, CheckpointRow.kind == kind
        )
        found = session.scalars(query.order_by(CheckpointRow.created_at.desc())).first()
        return None if found is None else describe_checkpoint(found)

    return {
        "training_run_id": row.id,
        "base_model": row.base_model,
        "model_owner": row.owner or "everybody",
        "is_lora": True,
        "lora_rank": row.rank,
        "corrupted": row.corrupted is not None,
        "last_request_time": _time(row.last_request_at),
        "last_checkpoint": newest(paths.STATE),
        "last_sampler_checkpoint": newest(paths.SAMPLER),
        "user_metadata": row.user_metadata,
    }


def _cursor(limit: int, offset: int, total: int) -> dict[str, int]:
    return {"offset": offset, "limit": limit, "total_count": total}


def _told(router: APIRouter, tinker: TinkerService) -> None:
    journal = tinker.journal

    @router.get("/sessions")
    async def sessions(client: Known, limit: Limit = 20, offset: Offset = 0) -> Response:
        return json_response({"sessions": await tinker.sessions.list(client, limit, offset)})

    @router.get("/sessions/{session_id}")
    async def session(session_id: str, client: Known) -> Response:
        return json_response(await tinker.sessions.describe(client, session_id))

    @router.get("/training_runs")
    async def runs(client: Known, limit: Limit = 20, offset: Offset = 0) -> Response:
        def read(session: Session) -> dict[str, Any]:
            made = ModelRow.corrupted.is_(None) | ModelRow.snapshot_path.is_not(None)
            mine = client.visible(ModelRow.owner) & made  # without those that were refused
            query = select(ModelRow).where(mine).order_by(ModelRow.created_at.desc())
            rows = session.scalars(query.limit(limit).offset(offset))
            total = session.scalar(select(func.count()).select_from(ModelRow).where(mine)) or 0
            told = [_describe_run(session, row) for row in rows]
            return {"training_runs": told, "cursor": _cursor(limit, offset, total)}

        return json_response(await journal.read(read))

    @router.get("/training_runs/{run}")
    async def one_run(run: str, client: Known) -> Response:
        await tinker.training.find(client, run)

        def read(session: Session) -> dict[str, Any]:
            row = session.get(ModelRow, run)
            if row is None:
                raise unknown("training run", run)
            return _describe_run(session, row)

        return json_response(await journal.read(read))

    @router.post("/weights_info")
    async def weights_info(body: schema.WeightsInfo, client: Known) -> Response:
        try:
            row = await tinker.store.resolve(body.tinker_path, client)
        except ValueError as error:
            raise ApiError(404, str(error)) from None
        told = {"base_model": row.base_model, "is_lora": True, "lora_rank": row.rank}
        for name in ("train_unembed", "train_mlp", "train_attn"):
            told[name] = getattr(row, name)
        return json_response({k: v for k, v in told.items() if v is not None})

    @router.get("/usage")
    async def usage(client: Known) -> Response:
        """Tokens by key and model, of all keys for one that sees all."""
        rows = await tinker.read_usage()
        mine = [row for row in rows if client.sees_all or row["key"] == client.owner]
        return json_response({"usage": mine})


def _checkpoints(router: APIRouter, tinker: TinkerService, files: Files) -> None:
    store = tinker.store

    @router.get("/checkpoints")
    async def every(client: Known, limit: Limit = 100, offset: Offset = 0) -> Response:
        rows, total = await store.list(client, None, limit, offset)
        told = [describe_checkpoint(row) for row in rows]
        return json_response({"checkpoints": told, "cursor": _cursor(limit, offset, total)})

    @router.get("/training_runs/{run}/checkpoints")
    async def of_run(run: str, client: Known) -> Response:
        await tinker.training.find(client, run)
        rows, _ = await store.list(client, run, None, 0)
        return json_response({"checkpoints": [describe_checkpoint(row) for row in rows]})

    @router.put(_AT + "/ttl")
    async def set_ttl(run: str, kind: Kind, name: str, body: schema.Ttl, client: Known) -> Response:
        expires = None
        if body.ttl_seconds is not None:
            try:
                expires = time.time() + check_ttl(body.ttl_seconds)
            except ValueError as error:
                raise ApiError(400, str(error)) from None
        await store.change(client, TinkerPath(run, kind, name), expires_at=expires)
        return json_response({})

    @router.post(_AT + "/publish")
    async def publish(run: str, kind: Kind, name: str, client: Known) -> Response:
        await store.change(client, TinkerPath(run, kind, name), public=True)
        return json_response({})

    @router.delete(_AT + "/publish")
    async def unpublish(run: str, kind: Kind, name: str, client: Known) -> Response:
        await store.change(client, TinkerPath(run, kind, name), public=False)
        return json_response({})

    @router.get(_AT + "/external_weights_urls")
    async def urls(run: str, kind: Kind, name: str, client: Known, request: Request) -> Response:
        folder = await files.folder(client, TinkerPath(run, kind, name))
        base, expires = files.sign(request, folder)
        told = {path.name: f"{base}/{path.name}" for path in folder_files(folder)}
        return json_response({"urls": told, "expires": _time(expires)})

    @router.get(_AT + "/archive")
    async def archive(run: str, kind: Kind, name: str, client: Known, request: Request) -> Response:
        folder = await files.folder(client, TinkerPath(run, kind, name))
        base, expires = files.sign(request, folder)
        headers = {"Location": f"{base}/{_TAR}", "Expires": formatdate(expires, usegmt=True)}
        return Response(status_code=302, headers=headers)

    @router.delete(_AT)
    async def delete(run: str, kind: Kind, name: str, client: Known) -> Response:
        await store.delete(client, TinkerPath(run, kind, name))
        return json_response({})


class Files:
    """Files of checkpoints at addresses that are signed."""

    def __init__(self, tinker: TinkerService):
        self._tinker, self._secret = tinker, secrets.token_bytes(32)

    async def folder(self, client: Client, path: TinkerPath) -> Path:
        """The folder of a checkpoint that a client may read; ApiError 404."""
        try:
            row = await self._tinker.store.resolve(str(path), client)
        except ValueError as error:
            raise ApiError(404, str(error)) from None
        return Path(row.folder)

    def sign(self, request: Request, folder: Path) -> tuple[str, float]:
        """The address of a folder's files, and when it expires (Unix time)."""
        expires = int(time.time()) + _SIGNED_S
        what = f"{expires}:{folder.name}"
        signed = f"{expires}.{folder.name}.{self._signature(what)}"
        return f"{str(request.base_url).rstrip('/')}{API}/checkpoint_files/{signed}", expires

    def _signature(self, what: str) -> str:
        digest = hmac.new(self._secret, what.encode(), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest).decode().rstrip("=")

    async def fetch(self, signed: str, name: str) -> Response:
        """A file, or all of them as a tar archive."""
        expires, _, rest = signed.partition(".")
        folder_name, _, signature = rest.partition(".")
        right = self._signature(f"{expires}:{folder_name}")
        if not hmac.compare_digest(right.encode(), signature.encode()):
            raise ApiError(403, "the address is not signed by this server")
        if int(expires) < time.time():
            raise ApiError(403, "the address has expired: ask for it again")
        folder = self._tinker.store.folder / folder_name
        found = folder_files(folder)
        if name == _TAR and found:
            archive = folder / f"{secrets.token_hex(8)}.tar"
            with tarfile.open(archive, "w") as tar:
                for path in found:
                    tar.add(path, path.name)
                complete = tarfile.TarInfo("checkpoint_complete")
                tar.addfile(complete)
            remove = BackgroundTask(archive.unlink)
            return FileResponse(archive, media_type="application/x-tar", background=remove)
        for path in found:
            if path.name == name:
                return FileResponse(path)
        raise ApiError(404, f"the checkpoint has no file {name!r}")
