"""POST /v1/messages: its body, as the chat request that means the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from flexllm_jax.server.http.body import Body
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.conversing import chat_request
from flexllm_jax.server.inference.schema import ChatCompletionRequest, Objects

_NO_MEANING = ("redacted_thinking",)  # for any model but the one that wrote it
_UNSUPPORTED = ("container", "context_management", "mcp_servers")


class ThinkingConfig(Body):
    """Whether the model thinks first, and at most how many tokens."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class OutputFormat(Body):
    """What an answer looks like."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How much the model thinks, and what an answer looks like."""

    effort: str | None = None
    format: OutputFormat | None = None


class AnthropicTool(Body):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]


class AnthropicToolChoice(Body):
    """Whether the model calls a tool."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountTokensRequest(Body):
    """POST /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: Annotated[Objects, Field(min_length=1)]
    system: str | Objects | None = None
    tools: Annotated[list[AnthropicTool], Field(fail_fast=True, max_length=1024)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None

    def to_chat(self, **fields: Any) -> ChatCompletionRequest:
        """The chat request that means the same. ApiError."""
        extra = self.model_extra or {}
        if asked := [name for name in _UNSUPPORTED if extra.get(name)]:
            raise ApiError(400, f"{asked[0]}: is not supported; leave it out", param=asked[0])
        messages = [message for given in self._given() for message in _read(given)]
        config = self.output_config or OutputConfig()
        fields |= {"model": self.model, "messages": messages, "reasoning_effort": config.effort}
        if self.thinking is not None:
            fields |= _thinking(self.thinking, config.effort)
        if config.format is not None:
            schema = {"name": "answer", "schema": config.format.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.tools:
            fields["tools"] = [_function(tool) for tool in self.tools]
        if (choice := self.tool_choice) is not None:
            fields["tool_choice"] = _choice(choice)
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        if messages[-1]["role"] == "assistant":  # which is begun, and to be gone on with
            fields["continue_final_message"] = True
        # Servers' own fields, as in chat requests.
        own = {name: extra[name] for name in ("slo", "chat_template_kwargs") if name in extra}
        return chat_request(fields | own)

    def _given(self) -> list[dict[str, Any]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages]


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stop_sequences: Annotated[list[str], Field(fail_fast=True, max_length=16)] | None = None
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None

    def to_chat(self, **fields: Any) -> ChatCompletionRequest:
        """The chat request that means the same. ApiError."""
        return super().to_chat(
            **fields,
            max_completion_tokens=self.max_tokens,
            stop=[text for text in self.stop_sequences or () if text],
            stream=self.stream,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
        )


def _thinking(given: ThinkingConfig, effort: str | None) -> dict[str, Any]:
    if given.type == "disabled":
        return {"reasoning_effort": "none"}
    if given.type == "adaptive":
        return {}
    return {"reasoning_effort": effort or "high", "thinking_token_budget": given.budget_tokens}


def _function(tool: AnthropicTool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _choice(choice: AnthropicToolChoice) -> str | dict[str, Any]:
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name or ""}}
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


def _read(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A message, which may have the results of calls in it: those are messages of their own."""
    role, content = given.get("role"), given.get("content")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list) or not all(isinstance(block, Mapping) for block in content):
        raise _wrong(f"content is {content!r:.60}; must be text or blocks")
    message: dict[str, Any] = {"role": role, "content": []}
    thoughts, calls = [], []
    for block in content:
        kind = block.get("type")
        if kind == "text":
            message["content"].append({"type": "text", "text": block.get("text")})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking") or ""))
        elif kind == "tool_use":
            arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
            function = {"name": block.get("name"), "arguments": arguments}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            yield {
                "role": "tool",
                "tool_call_id": block.get("tool_use_id"),
                "content": _result(block),
            }
        elif kind not in _NO_MEANING:
            raise _wrong(f"a block has type {kind!r}, which is not supported")
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    if message["content"] or len(message) > 2:
        yield message


def _result(block: Mapping[str, Any]) -> Any:
    content = block.get("content") or ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or any(
        not isinstance(part, Mapping) or part.get("type") != "text" for part in content
    ):
        raise _wrong("a tool_result has parts that are not text")
    return "\n".join(str(part.get("text")) for part in content)


def _wrong(reason: str) -> ApiError:
    return ApiError(400, f"messages: {reason}", param="messages")
