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
from flexllm_jax.server.inference.logprobs import id_of_token, text_of_token
from flexllm_jax.server.inference.requests import Answer, Delta, Inference
from flexllm_jax.server.inference.schema import ChatCompletionRequest, CompletionRequest
from flexllm_jax.server.inference.text import TextCodec
from flexllm_jax.server.inference.tool_calls import (
    START,
    CallDelta,
    Format,
    Parsed,
    ToolCallParser,
    join_calls,
)
from flexllm_jax.server.inference.unsupported import refuse_unsupported


class _Chat:
    """A request being answered. `form`: how the model writes tool calls, if it was given tools."""

    def __init__(
        self, body: ChatCompletionRequest, answer: Answer, codec: TextCodec, form: Format | None
    ):
        self.body, self.answer, self.codec = body, answer, codec
        self.may_call = form is not None
        names = [tool.function.name for tool in body.tools or ()]
        parallel = body.parallel_tool_calls is not False
        self._parsers = [
            ToolCallParser(form, names, parallel=parallel) if form else None
            for _ in answer.output_tokens
        ]
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time())}
        self.head["model"] = body.model

    def take(self, delta: Delta) -> tuple[Parsed, str | None]:
        """The text and calls that a token adds, and the finish reason."""
        parser, reason = self._parsers[delta.index], delta.finish_reason
        if parser is None:
            return Parsed(delta.text, []), reason
        parsed = parser.push(delta.text, final=reason is not None)
        return parsed, "tool_calls" if reason == "stop" and parser.count else reason

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """The log-probabilities of a token, as OpenAI shows them; None when not asked for."""
        report = delta.report
        if report is None:
            return None

        name = id_of_token if self.body.return_tokens_as_token_ids else text_of_token

        def entry(token: int, text: str, value: float | None) -> dict[str, Any]:
            data = list(self.codec.detokenizer.token_bytes(token, text))
            return {"token": name(token, text), "logprob": value, "bytes": data}

        top = [entry(*item) for item in report.likeliest[: self.body.top_logprobs or 0]]
        return {**entry(report.token, report.text, report.logprob), "top_logprobs": top}


async def chat(
    request: Request, body: ChatCompletionRequest, client: Client, inference: Inference
) -> Response:
    """Answer a chat request, at once or as a stream."""
    _refuse_unsupported(body)
    codec = inference.codec
    text = await inference.render(body, body.tools if body.may_call else None)
    form = codec.tool_format() if body.may_call else None
    structure = await inference.structure(client, body, form)
    (prompt,) = await inference.encode(body, [text], special=bool(body.add_special_tokens))
    max_tokens = body.max_completion_tokens
    max_tokens = body.max_tokens if max_tokens is None else max_tokens
    max_tokens = inference.room(prompt) if max_tokens is None else max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    skip_special = form is None or not codec.is_special(START)
    answer = inference.open(
        client,
        body,
        [prompt],
        max_tokens,
        logprobs,
        structure=structure,
        skip_special_tokens=skip_special,
    )
    conversation = _Chat(body, answer, codec, form)
    if body.stream:
        return sse.EventStream(_stream(conversation), answer.close)
    try:
        return await sse.while_connected(request, _whole(conversation))
    finally:
        await answer.close()


def _refuse_unsupported(body: ChatCompletionRequest) -> None:
    refuse_unsupported(body, CompletionRequest)
    if body.top_logprobs is not None and not body.logprobs:
        message = "top_logprobs: needs logprobs=true; set it or leave this out"
        raise ApiError(400, message, param="top_logprobs")


async def _whole(conversation: _Chat) -> Response:
    answer, body = conversation.answer, conversation.body
    count = len(answer.output_tokens)
    texts, reasons = [""] * count, [""] * count
    calls: list[list[CallDelta]] = [[] for _ in range(count)]
    reported: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    stops: list[str | int | None] = [None] * count
    tokens: list[list[int]] = [[] for _ in range(count)]
    of_prompt: dict[str, Any] = {}
    async for delta in answer:
        of_prompt = of_prompt or answer.tell_prompt(body, delta.index, delta.prompt_logprobs)
        tokens[delta.index].append(delta.token)
        parsed, reason = conversation.take(delta)
        texts[delta.index] += parsed.text
        calls[delta.index] += parsed.calls
        reasons[delta.index], stops[delta.index] = reason or "", delta.stop_reason
        if report := conversation.logprobs(delta):
            reported[delta.index].append(report)
    choices = [
        {
            "index": i,
            "message": _message(texts[i], calls[i]),
            "logprobs": {"content": reported[i]} if body.logprobs else None,
            "finish_reason": reasons[i],
            "stop_reason": stops[i],
        }
        | ({"token_ids": tokens[i]} if body.return_token_ids else {})
        for i in range(count)
    ]
    head = {**conversation.head, "object": "chat.completion", **of_prompt}
    return sse.json_response({**head, "choices": choices, "usage": answer.usage})


def _message(text: str, calls: list[CallDelta]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message |= {"content": text or None, "tool_calls": join_calls(calls)}
    return message


def _before(usage: dict[str, Any]) -> dict[str, Any]:
    """What it was one token earlier."""
    less = {name: usage[name] - 1 for name in ("completion_tokens", "total_tokens")}
    return usage | less


def _delta(parsed: Parsed, may_call: bool) -> dict[str, Any]:
    """What a chunk adds; nothing while it is not known what a text becomes."""
    delta: dict[str, Any] = {} if may_call and not parsed.text else {"content": parsed.text}
    if parsed.calls:
        delta["tool_calls"] = [call.describe() for call in parsed.calls]
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
        async for delta in answer:
            usage = answer.usage if running else None
            if delta.index not in begun:
                begun.add(delta.index)
                role = {"role": "assistant", "content": ""}
                own = {"index": delta.index, "delta": role, "logprobs": None}
                told = answer.tell_prompt(body, delta.index, None)
                yield chunk(own | {"finish_reason": None}, usage and _before(usage), **told)
            report = conversation.logprobs(delta)
            parsed, reason = conversation.take(delta)
            own = {
                "index": delta.index,
                "delta": _delta(parsed, conversation.may_call),
                "logprobs": None if report is None else {"content": [report]},
                "finish_reason": reason,
                "stop_reason": delta.stop_reason,
            }
            own |= {"token_ids": [delta.token]} if body.return_token_ids else {}
            yield chunk(own, usage)
        if options and options.include_usage:
            yield sse.event({**head, "choices": [], "usage": answer.usage})
    except ApiError as error:
        yield sse.event(error.body)
    yield sse.DONE
