"""POST /v1/chat/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.conversing import ConversationAnswer, Said, converse
from flexllm_jax.server.inference.logprobs import id_of_token, text_of_token, token_entry
from flexllm_jax.server.inference.requests import Delta, Inference
from flexllm_jax.server.inference.schema import ChatCompletionRequest
from flexllm_jax.server.inference.text import TextCodec
from flexllm_jax.server.inference.tools.parser import CallDelta, join_calls


class _Chat:
    """A request being answered."""

    def __init__(
        self,
        body: ChatCompletionRequest,
        answer: ConversationAnswer,
        codec: TextCodec,
        model: str,
    ):
        self.body, self.answer, self.codec = body, answer, codec
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self.head["model"] = model

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """The log-probabilities of a token, as OpenAI shows them; None when not asked for."""
        report = delta.report
        if report is None:
            return None
        name = id_of_token if self.body.return_tokens_as_token_ids else text_of_token
        told = self.body.alternatives(self.body.top_logprobs or 0) or 0
        return token_entry(report, self.codec.detokenizer, told, name)


async def chat(
    request: Request, body: ChatCompletionRequest, client: Client, inference: Inference
) -> Response:
    """Answer a chat request, at once or as a stream."""
    answer = await converse(body, client, inference)
    model = inference.models.named(body.model)
    conversation = _Chat(body, answer, inference.codec, model)
    if body.stream:
        return sse.EventStream(_stream(conversation), answer.close)
    try:
        return await sse.while_connected(request, _whole(conversation))
    finally:
        await answer.close()


async def _whole(conversation: _Chat) -> Response:
    answer, body = conversation.answer, conversation.body
    count = answer.count
    thoughts, texts, reasons = [""] * count, [""] * count, [""] * count
    calls: list[list[CallDelta]] = [[] for _ in range(count)]
    reported: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    stops: list[str | int | None] = [None] * count
    tokens: list[list[int]] = [[] for _ in range(count)]
    of_prompt: dict[str, Any] = {}
    async for said in answer:
        delta = said.delta
        of_prompt = of_prompt or answer.tell_prompt(said)
        tokens[delta.index].append(delta.token)
        thoughts[delta.index] += said.thought
        texts[delta.index] += said.text
        calls[delta.index] += said.calls
        reasons[delta.index], stops[delta.index] = said.finish_reason or "", delta.stop_reason
        if report := conversation.logprobs(delta):
            reported[delta.index].append(report)
    choices = [
        {
            "index": i,
            "message": _message(thoughts[i], texts[i], calls[i]),
            "logprobs": {"content": reported[i]} if body.logprobs else None,
            "finish_reason": reasons[i],
            "stop_reason": stops[i],
            "token_ids": tokens[i] if body.return_token_ids else None,
        }
        for i in range(count)
    ]
    head = {**conversation.head, "object": "chat.completion", **of_prompt}
    return sse.json_response({**head, "choices": choices, "usage": answer.usage})


def _message(thought: str, text: str, calls: list[CallDelta]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if thought or calls:
        message["content"] = text or None
    return message | _thought(thought) | ({"tool_calls": join_calls(calls)} if calls else {})


def _thought(thought: str) -> dict[str, Any]:
    """By vLLM's name, and by the one that it had before and others still have."""
    return {"reasoning": thought, "reasoning_content": thought} if thought else {}


def _before(usage: dict[str, Any]) -> dict[str, Any]:
    """What it was one token earlier."""
    less = {name: usage[name] - 1 for name in ("completion_tokens", "total_tokens")}
    return usage | less


def _delta(said: Said, answer: ConversationAnswer) -> dict[str, Any]:
    """What a chunk adds; nothing while it is not known what a text becomes."""
    delta = _thought(said.thought)
    if said.text or not (answer.may_call or answer.may_think):
        delta["content"] = said.text
    if said.calls:
        delta["tool_calls"] = [call.describe() for call in said.calls]
    return delta


async def _stream(conversation: _Chat) -> AsyncGenerator[bytes]:
    answer, body = conversation.answer, conversation.body
    options = body.stream_options
    head = {**conversation.head, "object": "chat.completion.chunk"}

    def chunk(own: dict[str, Any], usage: dict[str, int] | None, **more: Any) -> bytes:
        return sse.event({**head, "choices": [own], "usage": usage, **more})

    running = bool(options and options.running)
    try:
        begun: set[int] = set()
        async for said in answer:
            delta, usage = said.delta, answer.usage if running else None
            if delta.index not in begun:
                begun.add(delta.index)
                role = {"role": "assistant", "content": ""}
                own = {"index": delta.index, "delta": role, "logprobs": None}
                told = answer.tell_prompt()
                yield chunk(own | {"finish_reason": None}, usage and _before(usage), **told)
            report = conversation.logprobs(delta)
            own = {
                "index": delta.index,
                "delta": _delta(said, answer),
                "logprobs": None if report is None else {"content": [report]},
                "finish_reason": said.finish_reason,
                "stop_reason": delta.stop_reason,
            }
            own |= {"token_ids": [delta.token]} if body.return_token_ids else {}
            yield chunk(own, usage)
        if options and options.include_usage:
            yield sse.event({**head, "choices": [], "usage": answer.usage})
    except ApiError as error:
        yield sse.event(error.body)
    yield sse.DONE
