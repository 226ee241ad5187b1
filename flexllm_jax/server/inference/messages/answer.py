"""What POST /v1/messages answers with, whole and as a stream of events."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator
from typing import Any, Literal

from pydantic import BaseModel

from flexllm_jax.server.http import sse
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.openapi import EVENTS, WITH_BODY, Answers
from flexllm_jax.server.inference.conversing import ConversationAnswer, Said
from flexllm_jax.server.inference.items import Item, Items

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_DELTAS = {
    "thought": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


class MessageUsage(BaseModel):
    """Tokens; of the prompt's, `input_tokens` are those that were not in the prefix cache."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int
    output_tokens_details: dict[str, int]


class ContentBlock(BaseModel):
    """A part of what the model says."""

    type: Literal["text", "thinking", "tool_use"]


class Message(BaseModel):
    """POST /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[ContentBlock]
    stop_reason: Literal[
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    usage: MessageUsage


class InputTokens(BaseModel):
    """POST /v1/messages/count_tokens."""

    input_tokens: int


ANSWERS: Answers = {
    ("post", "/v1/messages"): ([Message, EVENTS], (*WITH_BODY, 404, 429, 503)),
    ("post", "/v1/messages/count_tokens"): ([InputTokens], (*WITH_BODY, 404, 503)),
}


def _head(model: str) -> dict[str, Any]:
    head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant"}
    return {**head, "model": model}


def _usage(answer: ConversationAnswer) -> dict[str, Any]:
    used = answer.usage
    cached = used["prompt_tokens_details"]["cached_tokens"]
    thought = used["completion_tokens_details"]["reasoning_tokens"]
    return {
        "input_tokens": used["prompt_tokens"] - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"thinking_tokens": thought},
    }


def _block(item: Item) -> dict[str, Any]:
    """An item with the text there is. A call's arguments that were cut off are none."""
    if item.kind == "thought":
        return {"type": "thinking", "thinking": item.text, "signature": ""}
    if item.kind == "text":
        return {"type": "text", "text": item.text, "citations": None}
    try:
        given = json.loads(item.text or "{}")
    except ValueError:
        given = {}
    return {"type": "tool_use", "id": item.call_id, "name": item.name, "input": given}


def _stop(said: Said | None, answer: ConversationAnswer) -> dict[str, Any]:
    reason = said.finish_reason if said else None
    stop = said.delta.stop_reason if said else None
    if reason == "stop" and isinstance(stop, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    told = _STOP_REASONS.get(reason or "stop", "end_turn")
    if reason == "length" and answer.clipped:
        told = "model_context_window_exceeded"
    return {"stop_reason": told, "stop_sequence": None}


async def whole(model: str, answer: ConversationAnswer) -> sse.Response:
    """The message, when it is complete."""
    items, last = Items(), None
    async for last in answer:
        for _ in items.take(last):
            pass
    content = [_block(item) for item in items.items]
    ending = _stop(last, answer)
    return sse.json_response(
        {**_head(model), "content": content, **ending, "usage": _usage(answer)}
    )


async def stream(model: str, answer: ConversationAnswer) -> AsyncGenerator[bytes]:
    """The message as it grows."""
    items, last = Items(), None
    try:
        async for said in answer:
            if last is None:
                begun = {**_head(model), "content": [], "stop_reason": None, "stop_sequence": None}
                begun["usage"] = {**_usage(answer), "output_tokens": 0}
                yield sse.typed({"type": "message_start", "message": begun})
            last = said
            for change, item, text in items.take(said):
                yield _event(change, item, text)
        for change, item, text in items.end():
            yield _event(change, item, text)
        ending = {"type": "message_delta", "delta": _stop(last, answer), "usage": _usage(answer)}
        yield sse.typed(ending)
        yield sse.typed({"type": "message_stop"})
    except ApiError as error:
        yield sse.typed(error.body)


def _event(change: str, item: Item, text: str) -> bytes:
    if change == "begin":
        block = _block(Item(item.index, item.kind, "", item.call_id, item.name))
        return sse.typed(
            {"type": "content_block_start", "index": item.index, "content_block": block}
        )
    if change == "end":
        return sse.typed({"type": "content_block_stop", "index": item.index})
    kind, field = _DELTAS[item.kind]
    delta = {"type": kind, field: text}
    return sse.typed({"type": "content_block_delta", "index": item.index, "delta": delta})
