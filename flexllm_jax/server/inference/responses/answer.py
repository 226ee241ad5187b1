"""What POST /v1/responses answers with: the response as it grows, told by numbered events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.conversing import ConversationAnswer
from flexllm_jax.server.inference.items import Change, Item, Items
from flexllm_jax.server.inference.logprobs import token_entry
from flexllm_jax.server.inference.responses.request import ResponseRequest
from flexllm_jax.server.inference.text import TextCodec

Event = dict[str, Any]
_PREFIXES = {"thought": "rs", "text": "msg", "call": "fc"}


def new_id(prefix: str) -> str:
    """An id of OpenAI's form."""
    return f"{prefix}_{uuid.uuid4().hex}"


def describe(body: ResponseRequest, model: str) -> dict[str, Any]:
    """A response that has no output yet."""
    text = body.text.model_dump(exclude_none=True) if body.text else {}
    reasoning = body.reasoning.model_dump() if body.reasoning else {"effort": None}
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "queued" if body.background else "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"summary": None} | reasoning,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": "disabled",
        "usage": None,
    }


class Responding:
    """A response that an answer fills. `save` keeps it, and does so when its output is complete."""

    def __init__(
        self,
        body: ResponseRequest,
        answer: ConversationAnswer,
        codec: TextCodec,
        model: str,
        save: Callable[[dict[str, Any]], Awaitable[None]],
    ):
        self.response = describe(body, model)
        self._body, self._answer, self._codec, self._save = body, answer, codec, save
        self._reports, self._functions = body.wants_logprobs, body.namespaced
        self._tokens = list[int]()
        self._items, self._ids = Items(), list[str]()
        self._logprobs: dict[int, list[dict[str, Any]]] = {}  # by item
        self._number = 0

    async def events(self) -> AsyncIterator[Event]:
        """All of them, in order. The last one tells how the response ended, if the engine failed
        it is `response.failed`."""
        yield self._whole("created")
        self.response["status"] = "in_progress"
        yield self._whole("in_progress")
        reason = "stop"
        try:
            async for said in self._answer:
                self._tokens.append(said.delta.token)
                entries = []
                if self._reports and said.delta.report is not None and said.text:
                    detokenizer, count = self._codec.detokenizer, self._body.top_logprobs or 0
                    entries = [token_entry(said.delta.report, detokenizer, count)]
                for change in self._items.take(said):
                    for event in self._tell(change, entries):
                        yield event
                reason = said.finish_reason or reason
            status = "incomplete" if reason == "length" else "completed"
            for change in self._items.end():
                for event in self._tell(change, [], status):
                    yield event
            self._end(status)
            await self.save()
        except ApiError as error:
            self._end("failed")
            self.response["error"] = {"code": "server_error", "message": error.message}
            with suppress(ApiError):  # it may be the database that fails
                await self.save()
            yield self._whole("failed")
            raise
        yield self._whole(status)

    async def save(self) -> None:
        """Keep it as it is now. ApiError."""
        await self._save(self.response)

    async def cancelled(self) -> None:
        """Keep that it ended before it was complete."""
        self._end("cancelled")
        await self.save()

    def _end(self, status: str) -> None:
        response, used = self.response, self._answer.usage
        response["status"] = status
        response["output"] = [self._item(item, status) for item in self._items.items]
        if status == "completed":
            response["completed_at"] = int(time.time())
        if self._body.enable_response_messages:
            prompt = self._answer.tell_prompt()["prompt_token_ids"]
            response["input_messages"] = [self._raw(prompt)]
            response["output_messages"] = [self._raw(self._tokens)]
        if status == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        cached = used["prompt_tokens_details"]["cached_tokens"]
        response["usage"] = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": used["completion_tokens_details"],
            "total_tokens": used["total_tokens"],
        }

    def _raw(self, tokens: list[int]) -> dict[str, Any]:
        """Tokens as vLLM tells them."""
        text = self._codec.detokenizer.decode(tokens)
        return {"type": "raw_message_tokens", "message": text, "tokens": tokens}

    def _function(self, item: Item) -> dict[str, Any]:
        """How a client names the function of a call."""
        return self._functions.get(item.name, {"name": item.name})

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": f"response.{kind}", "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _whole(self, kind: str) -> Event:
        return self._event(kind, response=dict(self.response))

    def _tell(
        self, change: Change, entries: list[dict[str, Any]], status: str = "completed"
    ) -> Iterator[Event]:
        """The events of what happens to an item."""
        what, item, text = change
        if what == "begin":
            self._ids.append(new_id(_PREFIXES[item.kind]))
        place = {"output_index": item.index, "item_id": self._ids[item.index]}
        part = place | {"content_index": 0}
        if what == "begin":
            empty = self._item(Item(item.index, item.kind, "", item.call_id, item.name), None)
            yield self._event("output_item.added", output_index=item.index, item=empty)
            if item.kind != "call":
                yield self._event("content_part.added", **part, part=self._part(item, ""))
        elif what == "more":
            if item.kind == "thought":
                yield self._event("reasoning_text.delta", **part, delta=text)
            elif item.kind == "text":
                self._logprobs.setdefault(item.index, []).extend(entries)
                yield self._event("output_text.delta", **part, delta=text, logprobs=entries)
            else:
                yield self._event("function_call_arguments.delta", **place, delta=text)
        else:
            if item.kind == "thought":
                yield self._event("reasoning_text.done", **part, text=item.text)
            elif item.kind == "text":
                logprobs = self._logprobs.get(item.index, [])
                yield self._event("output_text.done", **part, text=item.text, logprobs=logprobs)
            else:
                told = self._function(item) | {"arguments": item.text}
                yield self._event("function_call_arguments.done", **place, **told)
            if item.kind != "call":
                yield self._event("content_part.done", **part, part=self._part(item, item.text))
            done = self._item(item, status)
            yield self._event("output_item.done", output_index=item.index, item=done)

    def _part(self, item: Item, text: str) -> dict[str, Any]:
        if item.kind == "thought":
            return {"type": "reasoning_text", "text": text}
        logprobs = self._logprobs.get(item.index, []) if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _item(self, item: Item, status: str | None) -> dict[str, Any]:
        """An item; None: it has only begun. Those before the last one are complete."""
        if status not in (None, "completed"):
            status = "incomplete" if item is self._items.items[-1] else "completed"
        parts = [] if status is None else [self._part(item, item.text)]
        head = {"id": self._ids[item.index], "status": status or "in_progress"}
        if item.kind == "thought":
            return {**head, "type": "reasoning", "summary": [], "content": parts}
        if item.kind == "text":
            return {**head, "type": "message", "role": "assistant", "content": parts}
        call = {"call_id": item.call_id, **self._function(item), "arguments": item.text}
        return {**head, "type": "function_call", **call}
