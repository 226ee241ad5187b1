"""Responses that are being made: for a client that listens, or in the background."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.conversing import ConversationAnswer, converse
from flexllm_jax.server.inference.requests import Inference
from flexllm_jax.server.inference.responses.answer import Event, Responding
from flexllm_jax.server.inference.responses.request import ResponseRequest
from flexllm_jax.server.inference.responses.store import ResponseStore, with_id


class Background:
    """A response in the background: its events so far, for any number of listeners."""

    def __init__(self, responding: Responding, answer: ConversationAnswer):
        self.responding = responding
        self._answer, self._events, self._ended = answer, list[Event](), False
        self._news = asyncio.Event()
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        try:
            async for event in self.responding.events():
                self._events.append(event)
                self._tell()
        except ApiError:
            pass  # the last event has told it
        finally:
            self._ended = True
            self._tell()
            await self._answer.close()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self, after: int) -> AsyncGenerator[bytes]:
        """The events with numbers above `after`, those that come too."""
        at = after + 1
        while True:
            news = self._news
            for event in self._events[at:]:
                yield sse.typed(event)
            at = max(at, len(self._events))
            if self._ended:
                return
            await news.wait()


class Responses:
    """Makes responses, and knows those in the background."""

    def __init__(self, inference: Inference, store: ResponseStore):
        self._inference, self.store = inference, store
        self._running: dict[str, tuple[Background, Client]] = {}

    async def start(self, body: ResponseRequest, client: Client) -> ConversationAnswer:
        """Begin to answer. ApiError."""
        if body.background and body.store is False:
            message = "background can only be used when `store` is true: it is read later"
            raise ApiError(400, message, param="background")
        try:
            json.dumps(body.model_dump(), ensure_ascii=False).encode()  # as it is told again
        except (UnicodeEncodeError, RecursionError):
            message = "the body has half a surrogate pair, which is no character, or is too deep"
            raise ApiError(400, message) from None
        before = await self.store.conversation(client, body.previous_response_id)
        return await converse(body.to_chat(before), client, self._inference, clip=True)

    def respond(
        self, body: ResponseRequest, client: Client, answer: ConversationAnswer
    ) -> Responding:
        """The response of an answer, which is kept in the end unless that is not wanted."""
        asked = [with_id(item) for item in body.items]

        async def save(response: dict[str, Any]) -> None:
            if body.store is not False:
                await self.store.save(client, response, asked)

        model = self._inference.models.named(body.model)
        return Responding(body, answer, self._inference.codec, model, save)

    async def run(
        self, client: Client, responding: Responding, answer: ConversationAnswer
    ) -> Background:
        """Go on in the background. ApiError where that cannot be written down."""
        try:
            await responding.save()
        except BaseException:
            await answer.close()
            raise
        running = Background(responding, answer)
        response_id = responding.response["id"]
        self._running[response_id] = running, client
        running.task.add_done_callback(lambda _: self._running.pop(response_id))
        return running

    def running(self, client: Client, response_id: str) -> Background | None:
        """One in the background that has not ended."""
        running, owner = self._running.get(response_id, (None, client))
        return running if client.may_see(owner.owner) else None

    async def get(self, client: Client, response_id: str) -> dict[str, Any]:
        """A response as it is now; ApiError 404."""
        running = self.running(client, response_id)
        return running.responding.response if running else await self.store.get(client, response_id)

    async def cancel(self, client: Client, response_id: str) -> dict[str, Any]:
        """End a response in the background. ApiError."""
        if running := self.running(client, response_id):
            await _stop(running)
            if running.task.cancelled():
                await running.responding.cancelled()
        response = await self.store.get(client, response_id)
        if not response["background"]:
            message = "Cannot cancel a synchronous response."  # OpenAI's words
            raise ApiError(400, message, param="response_id")
        return response

    async def delete(self, client: Client, response_id: str) -> None:
        """Forget a response, and end it. ApiError 404."""
        if running := self.running(client, response_id):
            await _stop(running)
        await self.store.delete(client, response_id)

    async def close(self) -> None:
        """End what is in the background."""
        for running, _ in list(self._running.values()):
            await _stop(running)


async def _stop(running: Background) -> None:
    running.task.cancel()
    await asyncio.gather(running.task, return_exceptions=True)
