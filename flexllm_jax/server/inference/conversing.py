"""Answering a conversation: the one way from messages to what a model thinks, says and calls.

Chat completions, responses, messages and graders' questions all go through here; each is a
translation of what clients send into a chat request, and of `Said` into what they read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from flexllm_jax.engine.sampling.reasoning import ReasoningParser, Thinking
from flexllm_jax.models.text.messages import read_content
from flexllm_jax.server.http.access import Client
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.requests import Answer, Delta, Inference
from flexllm_jax.server.inference.schema import ChatCompletionRequest, CompletionRequest
from flexllm_jax.server.inference.tools.formats import Format
from flexllm_jax.server.inference.tools.parser import CallDelta, Parsed, ToolCallParser
from flexllm_jax.server.inference.unsupported import refuse_unsupported


@dataclass(frozen=True)
class Said:
    """What a token of an output adds: to the thought before it, its text and its calls."""

    delta: Delta
    thought: str
    text: str
    calls: list[CallDelta]
    finish_reason: str | None


class _Output:
    """One output, of whose text the parts are told apart."""

    def __init__(self, body: ChatCompletionRequest, form: Format | None, thinking: Thinking | None):
        functions = {tool.function.name: tool.function.parameters for tool in body.tools or ()}
        parallel = body.parallel_tool_calls is not False
        self._calls = ToolCallParser(form, functions, parallel=parallel) if form else None
        self._thoughts = ReasoningParser(thinking) if thinking else None
        self._tells_thoughts = body.include_reasoning is not False
        self._echo = _echoed(body)

    def take(self, delta: Delta) -> tuple[Said, bool]:
        """What a token adds, and whether it is a part of a thought."""
        reason, final = delta.finish_reason, delta.finish_reason is not None
        thought, text, thinks = "", delta.text, False
        if self._thoughts is not None:
            thinks = self._thoughts.inside
            thought, text = self._thoughts.push(text, final=final)
            thinks = thinks or self._thoughts.inside
        parsed = Parsed(text, [])
        if self._calls is not None:
            parsed = self._calls.push(text, final=final)
            reason = "tool_calls" if reason == "stop" and self._calls.count else reason
        thought = thought if self._tells_thoughts else ""
        text, self._echo = self._echo + parsed.text, ""
        return Said(delta, thought, text, parsed.calls, reason), thinks


def _echoed(body: ChatCompletionRequest) -> str:
    """What an answer begins with: the last message, if that is asked for and the assistant's."""
    *_, last = body.messages
    if not body.echo or last.get("role") != "assistant":
        return ""
    return read_content(last, "messages[-1]", "messages")


class ConversationAnswer:
    """The outputs that answer a conversation. Iterate once; `close` in any case. `may_call`: there
    may be calls in them, `may_think`: and thoughts."""

    def __init__(
        self,
        body: ChatCompletionRequest,
        answer: Answer,
        form: Format | None,
        thinking: Thinking | None,
        *,
        clipped: bool = False,
    ):
        self.clipped = clipped  # may have fewer tokens than were asked for
        self._body, self._answer = body, answer
        self.may_call, self.may_think = form is not None, thinking is not None
        self._outputs = [_Output(body, form, thinking) for _ in answer.output_tokens]

    @property
    def count(self) -> int:
        """How many outputs there are."""
        return len(self._outputs)

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens of prompt and outputs so far, as OpenAI tells them."""
        return self._answer.usage

    def tell_prompt(self, said: Said | None = None) -> dict[str, Any]:
        """What vLLM's fields ask for of the prompt; `said`: the first of an output."""
        logprobs = said.delta.prompt_logprobs if said else None
        return self._answer.tell_prompt(self._body, 0, logprobs)

    async def close(self) -> None:
        """Drop what has not ended, and give back what the request holds."""
        await self._answer.close()

    async def __aiter__(self) -> AsyncIterator[Said]:
        async for delta in self._answer:
            said, thinks = self._outputs[delta.index].take(delta)
            self._answer.reasoning_tokens[delta.index] += thinks
            yield said


def chat_request(fields: dict[str, Any]) -> ChatCompletionRequest:
    """The chat request of these fields; ApiError for what it cannot be."""
    try:
        return ChatCompletionRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"])) or "body"
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{at}: {message}", param=at.partition(".")[0]) from None


async def converse(
    body: ChatCompletionRequest, client: Client, inference: Inference, *, clip: bool = False
) -> ConversationAnswer:
    """Start answering a conversation; ApiError for what cannot be answered. `clip`: an answer that
    has no room for all of the tokens it may have ends where the room does."""
    refuse_unsupported(body, CompletionRequest)
    if body.top_logprobs is not None and not body.logprobs:
        message = "top_logprobs: needs logprobs=true; set it or leave this out"
        raise ApiError(400, message, param="top_logprobs")
    codec = inference.codec
    text = await inference.render(body, body.tools if body.may_call else None)
    form = codec.tool_format() if body.may_call else None
    thinking = codec.thinking(text, body.thinking_token_budget)
    structure = await inference.structure(client, body, form, thinking)
    (prompt,) = await inference.encode(body, [text], special=bool(body.add_special_tokens))
    max_tokens = body.max_completion_tokens
    max_tokens = asked = body.max_tokens if max_tokens is None else max_tokens
    if max_tokens is None or clip:
        room = inference.room(prompt)
        max_tokens = room if max_tokens is None else min(room, max_tokens)
    answer = inference.open(
        client,
        body,
        [prompt],
        max_tokens,
        (body.top_logprobs or 0) if body.logprobs else None,
        structure=structure,
        keep=(*(form.marks if form else ()), *(thinking.marks if thinking else ())),
    )
    clipped = asked is not None and max_tokens < asked
    return ConversationAnswer(body, answer, form, thinking, clipped=clipped)
