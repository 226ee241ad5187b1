"""Which path leads where: messages and the counting of their tokens."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Known
from flexllm_jax.server.inference.conversing import converse
from flexllm_jax.server.inference.messages.answer import stream, whole
from flexllm_jax.server.inference.messages.request import CountTokensRequest, MessagesRequest
from flexllm_jax.server.inference.requests import Inference


def routes(inference: Inference) -> APIRouter:
    """The routes of Anthropic's Messages API."""
    router = APIRouter()

    @router.post("/v1/messages")
    async def messages(request: Request, body: MessagesRequest, client: Known) -> Response:
        answer = await converse(body.to_chat(), client, inference, clip=True)
        if body.stream:
            return sse.EventStream(stream(body.model, answer), answer.close)
        try:
            return await sse.while_connected(request, whole(body.model, answer))
        finally:
            await answer.close()

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest, client: Known) -> Response:
        chat = body.to_chat()
        inference.models.resolve(chat.model, client)  # 404 for one that there is not
        text = await inference.render(chat, chat.tools if chat.may_call else None)
        (tokens,) = await inference.encode(chat, [text], special=False)
        return sse.json_response({"input_tokens": len(tokens)})

    return router
