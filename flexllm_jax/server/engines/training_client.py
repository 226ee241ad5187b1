"""Calls of models that the engine has been sent and has not answered, in the HTTP process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from flexllm_jax.server.engines.protocol import Command, Train, Trained
from flexllm_jax.server.engines.training_messages import TrainingCall, TrainingResult


class TrainingFailed(Exception):
    """A call that the engine could not carry out; one line. `category`: "user" or "server", whose
    fault it is."""

    def __init__(self, message: str, category: str):
        super().__init__(message)
        self.category = category


class TrainingClient:
    """Sends calls by `send`, and gives each a future of its answer.

    models: those that are made there. samplers: names of adapters that were saved from them.
    """

    def __init__(self, send: Callable[[Command], None]):
        self._send = send
        self.models: set[str] = set()
        self.samplers: set[str] = set()
        self._ids = itertools.count()
        self._futures: dict[int, asyncio.Future[TrainingResult]] = {}

    def train(
        self, model: str, calls: Sequence[TrainingCall]
    ) -> list[asyncio.Future[TrainingResult]]:
        """Calls of a model, after all that were sent before. Of one that fails the future holds a
        TrainingFailed, or EngineUnavailable when the engine ends before."""
        loop = asyncio.get_running_loop()
        numbered = [(next(self._ids), call) for call in calls]
        self._send(Train(model, numbered))
        for number, _ in numbered:
            self._futures[number] = loop.create_future()
        return [self._futures[number] for number, _ in numbered]

    def take(self, answer: Trained) -> None:
        """An answer has come."""
        future = self._futures.pop(answer.call_id, None)
        if future is None or future.done():
            return
        if answer.result is not None:
            future.set_result(answer.result)
        else:
            future.set_exception(TrainingFailed(answer.error or "failed", answer.category))

    def fail_all(self, error: Exception) -> None:
        """The engine has ended."""
        for future in self._futures.values():
            if not future.done():
                future.set_exception(error)
                future.exception()  # who does not look has not lost anything
        self._futures.clear()
        self.models.clear()
        self.samplers.clear()
