"""Which path leads where: responses, and what they were asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.convertors import StringConvertor, register_url_convertor

from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Known
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.openapi import EVENTS, READS, WITH_BODY, WRITES, Answers
from flexllm_jax.server.inference.requests import Inference
from flexllm_jax.server.inference.responses.answer import Responding
from flexllm_jax.server.inference.responses.request import InputTokensRequest, ResponseRequest
from flexllm_jax.server.inference.responses.running import Responses


class ResponseObject(BaseModel):
    """What became of a request so far; OpenAI's fields."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "failed", "in_progress", "cancelled", "queued", "incomplete"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    model: str
    output: list[dict[str, Any]]
    previous_response_id: str | None
    usage: dict[str, Any] | None


class DeletedResponse(BaseModel):
    """DELETE /v1/responses/{response_id}."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ItemList(BaseModel):
    """GET /v1/responses/{response_id}/input_items."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokenCount(BaseModel):
    """POST /v1/responses/input_tokens."""

    object: Literal["response.input_tokens"]
    input_tokens: int


class _ResponseId(StringConvertor):
    """A part of a path that is no path of its own: only POST is for `input_tokens`."""

    regex = "(?!input_tokens$)[^/]+"


register_url_convertor("response", _ResponseId())
_ONE = "/v1/responses/{response_id}"
_ROUTE = "/v1/responses/{response_id:response}"
ANSWERS: Answers = {
    ("post", "/v1/responses"): ([ResponseObject, EVENTS], (*WITH_BODY, 404, 429, *WRITES)),
    ("post", "/v1/responses/input_tokens"): ([InputTokenCount], (*WITH_BODY, 404, *READS)),
    ("get", _ONE): ([ResponseObject, EVENTS], (400, 404, *READS)),
    ("delete", _ONE): ([DeletedResponse], (404, *WRITES)),
    ("post", f"{_ONE}/cancel"): ([ResponseObject], (400, 404, *WRITES)),
    ("get", f"{_ONE}/input_items"): ([ItemList], (400, 404, *READS)),
}


def routes(inference: Inference, responses: Responses) -> APIRouter:
    """The routes of OpenAI's Responses API."""
    router = APIRouter()

    @router.post("/v1/responses")
    async def create(request: Request, body: ResponseRequest, client: Known) -> Response:
        answer = await responses.start(body, client)
        responding = responses.respond(body, client, answer)
        if body.background:
            running = await responses.run(client, responding, answer)
            if body.stream:
                return sse.EventStream(running.follow(-1))
            return sse.json_response(responding.response)
        if body.stream:
            return sse.EventStream(_stream(responding), answer.close)
        try:
            return await sse.while_connected(request, _whole(responding))
        finally:
            await answer.close()

    @router.post("/v1/responses/input_tokens")
    async def input_tokens(body: InputTokensRequest, client: Known) -> Response:
        before = await responses.store.conversation(client, body.previous_response_id)
        chat = body.to_chat(before)
        inference.models.resolve(chat.model, client)  # 404 for one that there is not
        text = await inference.render(chat, chat.tools if chat.may_call else None)
        (tokens,) = await inference.encode(chat, [text], special=False)
        return sse.json_response({"object": "response.input_tokens", "input_tokens": len(tokens)})

    @router.get(_ROUTE)
    async def retrieve(
        response_id: str,
        client: Known,
        stream: bool = False,
        starting_after: Annotated[int, Query(ge=-1)] = -1,
    ) -> Response:
        if not stream:
            return sse.json_response(await responses.get(client, response_id))
        if running := responses.running(client, response_id):
            return sse.EventStream(running.follow(starting_after))
        await responses.get(client, response_id)
        message = f"stream: response {response_id} is not running; read it without stream"
        raise ApiError(400, message, param="stream")

    @router.delete(_ROUTE)
    async def delete(response_id: str, client: Known) -> Response:
        await responses.delete(client, response_id)
        return sse.json_response({"id": response_id, "object": "response", "deleted": True})

    @router.post(f"{_ROUTE}/cancel")
    async def cancel(response_id: str, client: Known) -> Response:
        return sse.json_response(await responses.cancel(client, response_id))

    @router.get(f"{_ROUTE}/input_items")
    async def input_items(
        response_id: str,
        client: Known,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        items = await responses.store.conversation(client, response_id, until=True)
        if order == "desc":
            items = items[::-1]
        ids = [item["id"] for item in items]
        if after is not None:
            if after not in ids:
                raise ApiError(400, f"after: there is no item {after!r:.80}", param="after")
            items = items[ids.index(after) + 1 :]
        page = items[:limit]
        return sse.json_response(
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": len(items) > limit,
            }
        )

    return router


async def _whole(responding: Responding) -> Response:
    async for _ in responding.events():
        pass
    return sse.json_response(responding.response)


async def _stream(responding: Responding) -> AsyncGenerator[bytes]:
    try:
        async for event in responding.events():
            yield sse.typed(event)
    except ApiError:
        pass  # the last event has told it
