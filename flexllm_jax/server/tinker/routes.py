"""Routes under /api/v1 with which models are made, trained and sampled."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Header, Request
from fastapi.responses import Response

from flexllm_jax.server.http.access import Client, Known
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.sse import json_response, while_connected
from flexllm_jax.server.tinker.calls import parse
from flexllm_jax.server.tinker.protocol import schema, wire
from flexllm_jax.server.tinker.protocol.paths import SERVED, STATE
from flexllm_jax.server.tinker.samplers import unknown_base
from flexllm_jax.server.tinker.service import TinkerService
from flexllm_jax.server.tinker.sessions import unknown

API = "/api/v1"
_WAIT_S = 25.0  # that a poll is held: clients wait 45 s
_INLINE_BYTES = 64 * 1024  # larger results are announced first, if the client says it may be so
_ORDERED = (
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "save_weights_external",
)
_INFO = (
    "Every save for sampling is a snapshot, `kind: inflight` too. Losses: cross_entropy, "
    "importance_sampling, ppo, cispo, dro, gspo; stable_reinforce is not here."
)


def routes(tinker: TinkerService) -> APIRouter:
    """The routes. They are the SDK's, and not part of what /openapi.json describes."""
    router = APIRouter(prefix=API, include_in_schema=False)
    _sessions(router, tinker)
    _training(router, tinker)
    _sampling(router, tinker)
    _futures(router, tinker)
    return router


def _sessions(router: APIRouter, tinker: TinkerService) -> None:
    @router.get("/healthz")
    async def health() -> Response:
        return json_response({"status": "ok"})

    @router.post("/client/config")
    async def config(client: Known) -> Response:
        most = tinker.config.server.max_body_bytes
        return json_response(
            {
                "pjwt_auth_enabled": False,
                "proto_compress_fwdbwd": True,
                "fwdbwd_max_chunk_bytes_count": min(5_000_000, most * 6 // 10),
                "custom_loss_server_side": False,
                "sample_use_retrieve_futures": True,
                "sample_join_sampling_session": True,
            }
        )

    @router.post("/client/dynamic_config")
    async def dynamic_config(client: Known) -> Response:
        return json_response(
            {
                "refresh_interval_sec": 300,
                "sample_cancel_enabled": True,
                "sample_cancel_max_batch_size": 64,
            }
        )

    @router.post("/create_session")
    async def create(body: schema.CreateSession, client: Known) -> Response:
        session_id = await tinker.sessions.create(client, body)
        told = {"type": "create_session", "session_id": session_id, "info_message": _INFO}
        return json_response(told)

    @router.post("/session_heartbeat")
    async def heartbeat(body: schema.OfSession, client: Known) -> Response:
        await tinker.sessions.find(client, body.session_id)
        return json_response({"type": "session_heartbeat"})

    @router.post("/sessions/{session_id}/finish")
    async def finish(session_id: str, body: schema.Finish, client: Known) -> Response:
        reason = body.reason if isinstance(body.reason, dict) else {}
        kind = str(reason.get("type", "success"))[:32]
        await tinker.sessions.finish(client, session_id, kind)
        return json_response({})

    @router.post("/telemetry")
    async def telemetry(client: Known) -> Response:
        return json_response({"status": "accepted"})

    @router.get("/get_server_capabilities")
    async def capabilities(client: Known) -> Response:
        most = tinker.context
        return json_response(
            {
                "supported_models": [
                    {
                        "model_name": name,
                        "max_context_length": most,
                        "trainable": True,
                        "sampleable": True,
                    }
                    for name in tinker.base_names
                ]
            }
        )


def _training(router: APIRouter, tinker: TinkerService) -> None:
    training = tinker.training

    @router.post("/create_model")
    async def create(request: Request, client: Known) -> Response:
        raw = await request.body()
        body = _parse(schema.CreateModel, raw)
        if body.base_model.partition(":")[0] not in tinker.base_names:
            reason = unknown_base(body.base_model, tinker.base_names).message
        else:
            reason = _optimizer_problem(body.optimizer_config)
        if reason is not None:
            return json_response(
                await training.refuse(
                    client, body.session_id, body.model_seq_id, body.base_model, reason
                )
            )
        return json_response(await training.create(client, body, raw))

    @router.post("/load_weights")
    async def load(request: Request, client: Known) -> Response:
        raw = await request.body()
        if (ordered := _order_of(raw)) is not None:
            return json_response(await training.submit(client, "load_weights", *ordered, raw))
        body = _parse(schema.LoadWeights, raw)
        if body.session_id is None or body.model_seq_id is None:
            raise ApiError(400, "session_id, model_seq_id: give both, or model_id and seq_id")
        where, refused = (body.session_id, body.model_seq_id), None
        try:
            found = await tinker.store.resolve(body.path, client)
        except ValueError as error:
            told = await training.refuse(client, *where, body.base_model or "", str(error))
            return json_response(told)
        base = body.base_model or found.base_model
        if found.run_id == SERVED and body.base_model is None:
            base = tinker.base_names[0]
        refused = _optimizer_problem(body.optimizer_config)
        if body.optimizer and (found.kind != STATE or found.run_id == SERVED):
            refused = f"optimizer: {body.path!r} has no state of an optimizer; load weights"
        elif base.partition(":")[0] not in tinker.base_names:
            refused = unknown_base(base, tinker.base_names).message
        if refused is not None:
            return json_response(await training.refuse(client, *where, base, refused))
        made = await training.create_from(client, *where, body, raw, base, found.folder)
        return json_response(made)

    @router.post("/get_info")
    async def info(body: schema.OfModel, client: Known) -> Response:
        row = await training.made(client, body.model_id, _WAIT_S)
        name = row.base_model
        return json_response(
            {
                "type": "get_info",
                "model_id": row.id,
                "is_lora": True,
                "lora_rank": row.rank,
                "model_name": name,
                "model_data": {
                    "arch": "unknown",
                    "model_name": name,
                    "tokenizer_id": tinker.section.tokenizer_id or name,
                },
            }
        )

    @router.post("/forward_backward")
    async def forward_backward(request: Request, client: Known) -> Response:
        raw = await request.body()
        compressed = request.headers.get("content-encoding", "") == "zstd"
        try:
            plain = wire.decompress(raw, tinker.body_limit) if compressed else raw
            opened = wire.open_request(plain)
        except wire.Unreadable as error:
            raise ApiError(400, str(error)) from None
        kept = raw if compressed else plain
        promise = await training.submit(
            client, "forward_backward", opened.model_id, opened.seq_id, kept
        )
        return json_response(promise)

    for kind in _ORDERED:
        router.post(f"/{kind}")(_ordered(tinker, kind))


def _ordered(tinker: TinkerService, kind: str) -> Any:
    async def submit(request: Request, client: Known) -> Response:
        raw = await request.body()
        if (ordered := _order_of(raw)) is None:
            _parse(schema.Ordered, raw)
            raise ApiError(400, "model_id, seq_id: are missing")
        return json_response(await tinker.training.submit(client, kind, *ordered, raw))

    return submit


def _order_of(raw: bytes) -> tuple[str, int] | None:
    """Model and number of a request. Where they can be read it is taken, whatever else it has: a
    number that never comes would hold up the model for ever."""
    try:
        tree = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(tree, dict):
        return None
    model_id, seq = tree.get("model_id"), tree.get("seq_id")
    if not isinstance(model_id, str) or not isinstance(seq, int) or isinstance(seq, bool):
        return None
    return (model_id, seq) if 1 <= seq < 2**62 and 0 < len(model_id) <= 100 else None


def _parse(model: Any, raw: bytes) -> Any:
    try:
        return parse(model, raw)
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def _optimizer_problem(config: dict[str, Any] | None) -> str | None:
    kind = (config or {}).get("type", "adamw")
    if kind == "adamw":
        return None
    return f"optimizer_config.type: got {kind!r}; the optimizer here is adamw"


def _sampling(router: APIRouter, tinker: TinkerService) -> None:
    samplers = tinker.samplers

    @router.post("/create_sampling_session")
    async def create(body: schema.CreateSampler, client: Known) -> Response:
        sampler_id = await samplers.create(client, body)
        return json_response({"type": "create_sampling_session", "sampling_session_id": sampler_id})

    @router.get("/samplers/{sampler_id}")
    async def show(sampler_id: str, client: Known) -> Response:
        row = await samplers.find(client, sampler_id)
        told = {"sampler_id": row.id, "base_model": row.base_model}
        return json_response(told | ({"model_path": row.model_path} if row.model_path else {}))

    @router.post("/join_sampling_session")
    async def join(body: schema.OfSampler, client: Known) -> Response:
        count = await samplers.join(client, body.sampling_session_id)
        return json_response({"type": "join_sampling_session", "client_counter": count})

    @router.post("/asample")
    async def sample(request: Request, client: Known) -> Response:
        body = _parse(schema.Sample, await request.body())
        future = await samplers.submit(client, body, tinker.ask)
        promise = {"request_id": future.id, "sample_sequence_ids": future.sequence_ids}
        return json_response(promise)

    @router.post("/cancel_future")
    async def cancel(body: schema.Retrieve, client: Known) -> Response:
        samplers.cancel(client, body.request_id)
        return json_response({})


def _futures(router: APIRouter, tinker: TinkerService) -> None:
    @router.post("/retrieve_future")
    async def retrieve(
        request: Request,
        body: schema.Retrieve,
        client: Known,
        accept: Annotated[str, Header()] = "",
    ) -> Response:
        return await while_connected(request, _retrieve(tinker, client, body))

    @router.post("/retrieve_futures")
    async def retrieve_many(request: Request, body: schema.RetrieveMany, client: Known) -> Response:
        wait_s = _WAIT_S if body.timeout is None else max(0.0, min(body.timeout, _WAIT_S))

        async def answer() -> Response:
            futures, cursor = await tinker.samplers.finished(client, body, wait_s)
            told = [
                {"state": "failed", "request_id": future.id}
                if future.failed
                else {
                    "state": "finished",
                    "request_id": future.id,
                    "response_payload_uncompressed_size": len(future.result or b""),
                }
                for future in futures
            ]
            return json_response({"completions": told, "cursor": cursor})

        return await while_connected(request, answer())


async def _retrieve(tinker: TinkerService, client: Client, body: schema.Retrieve) -> Response:
    owner, _, number = body.request_id.rpartition(":")
    if not number.isascii() or not number.isdigit() or len(number) > 19:
        raise unknown("future", body.request_id)
    if ":sample:" in owner:
        future = await tinker.samplers.result(client, body.request_id, _WAIT_S)
        found = None if future is None else (future.result or b"", future.content_type)
    else:
        found = await tinker.training.result(client, owner, int(number), _WAIT_S)
    if found is None:
        told: dict[str, Any] = {"type": "try_again", "request_id": body.request_id}
        told["queue_state"] = "active"
        if (problem := tinker.engines.problem()) is not None:
            told |= {"queue_state": "paused_capacity", "queue_state_reason": problem}
        return json_response(told, 408)
    result, content_type = found
    if body.allow_metadata_only and len(result) > _INLINE_BYTES:
        told = {"status": "complete_metadata", "response_payload_size": len(result)}
        return json_response(told)
    return Response(result, media_type=content_type)
