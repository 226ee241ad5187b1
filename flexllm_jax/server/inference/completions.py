"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.logprobs import (
    TokenReport,
    id_of_token,
    report_prompt,
    text_of_token,
)
from flexllm_jax.server.inference.requests import Answer, Delta, Inference
from flexllm_jax.server.inference.schema import ChatCompletionRequest, CompletionRequest
from flexllm_jax.server.inference.text import TextCodec
from flexllm_jax.server.inference.unsupported import refuse_unsupported


@dataclass
class _Choice:
    """One output as it grows. With `echo`, the prompt comes before it."""

    count: int | None  # alternatives to report; None: no log-probabilities
    name: Callable[[int, str], str]  # of a token and its text, in log-probabilities
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    tokens: list[str] = field(default_factory=list)
    token_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = field(default_factory=list)
    text_offset: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)  # of the output, since the last time
    of_prompt: dict[str, Any] = field(default_factory=dict)  # what is told of it, once
    begun: bool = False
    echoed: str = ""  # the prompt

    def add_token(self, report: TokenReport, before: int) -> None:
        """Report a token of a text that `before` characters are before."""
        self.tokens.append(self.name(report.token, report.text))
        self.text_offset.append(before + report.offset)
        self.token_logprobs.append(report.logprob)
        top = None
        if report.logprob is not None and self.count is not None:
            # The token itself comes first; of tokens that look alike the likeliest counts.
            top = {self.name(report.token, report.text): report.logprob}
            for token, text, value in report.likeliest[: self.count]:
                name = self.name(token, text)
                top[name] = max(value, top.get(name, value))
        self.top_logprobs.append(top)

    def take_logprobs(self) -> dict[str, Any] | None:
        """What was reported since the last time, as OpenAI shows it."""
        if self.count is None:
            return None
        report = {
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        }
        self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset = [], [], [], []
        return report


@dataclass(frozen=True)
class _Prompt:
    """A prompt: its tokens, and if it was sent as text that text, and where they start in it."""

    tokens: list[int]
    text: str | None
    starts: list[int]


class _Completion:
    """A request being answered."""

    def __init__(
        self,
        body: CompletionRequest,
        answer: Answer,
        prompts: list[_Prompt],
        codec: TextCodec,
        model: str,
    ):
        self.body, self.answer, self.prompts, self.codec = body, answer, prompts, codec
        self.only_echo = body.max_tokens == 0
        self.n = body.n or 1
        name = id_of_token if body.return_tokens_as_token_ids else text_of_token
        self.choices = [
            _Choice(body.alternatives(body.logprobs), name) for _ in answer.output_tokens
        ]
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def take(self, delta: Delta) -> str:
        """Take in a token; returns the text it adds."""
        choice, text = self.choices[delta.index], ""
        if not choice.begun:
            choice.begun = True
            told = self.answer.tell_prompt(self.body, delta.index, delta.prompt_logprobs)
            choice.of_prompt = told
            if self.body.echo:
                text = choice.echoed = self._echo(choice, delta)
        choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
        if self.only_echo:
            choice.finish_reason, choice.stop_reason = "length", None
            self.answer.output_tokens[delta.index] = 0
        else:
            text += delta.text
            choice.token_ids.append(delta.token)
            if delta.report is not None:
                choice.add_token(delta.report, len(choice.echoed))
        choice.text += text
        return text

    def _echo(self, choice: _Choice, delta: Delta) -> str:
        """The prompt as it was sent, or the text of its tokens if it was sent as those."""
        prompt, detokenizer = self.prompts[delta.index // self.n], self.codec.detokenizer
        if choice.count is not None:
            sent = None if prompt.text is None else (prompt.text, prompt.starts)
            logprobs = delta.prompt_logprobs or []
            for report in report_prompt(detokenizer, prompt.tokens, logprobs, sent):
                choice.add_token(report, 0)
        return detokenizer.decode(prompt.tokens) if prompt.text is None else prompt.text

    def choice(self, index: int, text: str) -> dict[str, Any]:
        """A choice of an answer or of a chunk of one."""
        choice = self.choices[index]
        shown = {
            "index": index,
            "text": text,
            "logprobs": choice.take_logprobs(),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **choice.of_prompt,
        }
        if self.body.return_token_ids:
            shown["token_ids"] = choice.token_ids
        elif not self.body.stream:
            shown["token_ids"] = None
        choice.of_prompt, choice.token_ids = {}, []
        return shown


async def complete(
    request: Request, body: CompletionRequest, client: Client, inference: Inference
) -> Response:
    """Answer a completion request, at once or as a stream."""
    prompts = await _encode(body, inference)
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise ApiError(
            400, "max_tokens: got 0; must be at least 1 without echo", param="max_tokens"
        )
    refuse_unsupported(body, ChatCompletionRequest)
    if body.best_of not in (None, body.n or 1):
        raise ApiError(400, f"best_of: got {body.best_of}; must equal n", param="best_of")
    answer = inference.open(
        client,
        body,
        [prompt.tokens for prompt in prompts],
        max(1, max_tokens),
        body.logprobs,
        body.logprobs if body.echo else None,
        structure=await inference.structure(client, body),
    )
    model = inference.models.named(body.model)
    completion = _Completion(body, answer, prompts, inference.codec, model)
    if body.stream:
        return sse.EventStream(_stream(completion), answer.close)
    try:
        return await sse.while_connected(request, _whole(completion))
    finally:
        await answer.close()


async def _encode(body: CompletionRequest, inference: Inference) -> list[_Prompt]:
    given: list[Any] = (
        [body.prompt]
        if isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
        else list(body.prompt)
    )
    special, limit = body.add_special_tokens is not False, inference.max_model_len()
    codec, texts = inference.codec, [prompt for prompt in given if isinstance(prompt, str)]
    if not texts:
        return [_Prompt(body.cut(prompt), None, []) for prompt in given]
    encoded = await inference.encode(body, texts, special=special)
    if body.truncate_prompt_tokens is not None:  # an echo is of what is left
        return [_Prompt(tokens, None, []) for tokens in encoded]
    starts: list[list[int]] = [[] for _ in texts]
    # What is too long is refused when it is opened.
    if body.echo and body.logprobs is not None and max(map(len, encoded)) <= limit:
        starts = await codec.token_starts(texts, add_special_tokens=special)
    return [_Prompt(*each) for each in zip(encoded, texts, starts, strict=True)]


async def _whole(completion: _Completion) -> Response:
    answer = completion.answer
    async for delta in answer:
        completion.take(delta)
    choices = [completion.choice(i, c.text) for i, c in enumerate(completion.choices)]
    return sse.json_response({**completion.head, "choices": choices, "usage": answer.usage})


async def _stream(completion: _Completion) -> AsyncGenerator[bytes]:
    options, head = completion.body.stream_options, completion.head
    answer = completion.answer
    running = bool(options and options.running)
    try:
        async for delta in answer:
            text = completion.take(delta)
            usage = answer.usage if running else None
            choices = [completion.choice(delta.index, text)]
            yield sse.event({**head, "choices": choices, "usage": usage})
        if options and options.include_usage:
            yield sse.event({**head, "choices": [], "usage": answer.usage})
    except ApiError as error:
        yield sse.event(error.body)
    yield sse.DONE
