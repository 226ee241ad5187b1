"""Asking a model of this server from a worker thread, as graders do."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading

from flexllm_jax.graders import Completion, GradingError, Question, Usage
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.conversing import converse
from flexllm_jax.server.inference.requests import Inference
from flexllm_jax.server.inference.schema import ChatCompletionRequest


class Asking:
    """Questions of one client, asked as its own requests are: same models, same limits.

    Made on the event loop, called from other threads, closed on the loop.
    """

    def __init__(self, inference: Inference, client: Client):
        self._inference, self._client = inference, client
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._open: set[concurrent.futures.Future[Completion]] | None = set()

    def __call__(self, question: Question) -> Completion:
        """The answer. Blocks. Raises GradingError."""
        with self._lock:
            if self._open is None:
                raise _failed(question, "nobody waits for the answer")
            answer = asyncio.run_coroutine_threadsafe(self._answer(question), self._loop)
            self._open.add(answer)
        try:
            return answer.result()
        except ApiError as error:
            raise _failed(question, error.message) from None
        except concurrent.futures.CancelledError:
            raise _failed(question, "nobody waits for the answer") from None
        finally:
            with self._lock:
                if self._open is not None:
                    self._open.discard(answer)

    def close(self) -> None:
        """Ask no more, and drop what is asked."""
        with self._lock:
            answers, self._open = self._open or set(), None
        for answer in answers:
            answer.cancel()

    async def _answer(self, question: Question) -> Completion:
        inference, client = self._inference, self._client
        body = ChatCompletionRequest.model_validate(
            {
                "model": question.model,
                "messages": question.messages,
                "temperature": question.temperature,
                "top_p": question.top_p,
                "seed": question.seed,
                "max_completion_tokens": question.max_tokens,
                "reasoning_effort": question.reasoning_effort,
                # Without white space, which small models write without end.
                "structured_outputs": {"json": question.answer, "disable_any_whitespace": True},
            }
        )
        answer = await converse(body, client, inference, clip=True)
        text, reason = "", None
        try:
            async for said in answer:
                text += said.text
                reason = said.finish_reason or reason
        finally:
            await answer.close()
        used = answer.usage
        cached = used["prompt_tokens_details"]["cached_tokens"]
        usage = Usage(used["prompt_tokens"], used["completion_tokens"], cached)
        return Completion(text, reason == "stop", usage)


def _failed(question: Question, reason: str) -> GradingError:
    return GradingError("model_grader_server_error", f"{question.field}: {reason}")
