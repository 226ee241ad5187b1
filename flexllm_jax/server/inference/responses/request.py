"""POST /v1/responses: its body, and a conversation's items, as the chat request that means the
same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from flexllm_jax.server.http.body import Body
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.conversing import chat_request
from flexllm_jax.server.inference.schema import ChatCompletionRequest, Objects

_UNSUPPORTED = ("context_management", "conversation", "moderation", "prompt")
LOGPROBS = "message.output_text.logprobs"


class TextConfig(Body):
    """What an answer looks like."""

    model_config = ConfigDict(extra="allow")
    format: dict[str, Any] | None = None


class ReasoningConfig(Body):
    """How much the model thinks; of summaries there are none, as its thoughts are told."""

    model_config = ConfigDict(extra="allow")
    effort: str | None = None


class InputTokensRequest(Body):
    """POST /v1/responses/input_tokens."""

    model_config = ConfigDict(extra="allow")
    model: str | None = Field(default=None, description="null: the model that is served.")
    input: str | Objects = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: Annotated[str, Field(max_length=64)] | None = None
    tools: Annotated[Objects, Field(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = True
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None

    @property
    def namespaced(self) -> dict[str, dict[str, Any]]:
        """Of the names that the model calls functions of namespaces by: name and namespace."""
        return {
            _flat_name({**tool, "namespace": given.get("name")}): {
                "name": tool.get("name"),
                "namespace": given.get("name"),
            }
            for given in self.tools or ()
            if given.get("type") == "namespace"
            for tool in given.get("tools") or ()
        }

    @property
    def items(self) -> list[dict[str, Any]]:
        """What is given, as items."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}] if self.input else []
        return self.input

    def to_chat(self, before: Iterable[dict[str, Any]], **fields: Any) -> ChatCompletionRequest:
        """The chat request that means the same, where `before` are the items of a conversation that
        goes on. ApiError."""
        extra = dict(self.model_extra or {})
        if asked := [name for name in _UNSUPPORTED if extra.pop(name, None)]:
            raise ApiError(400, f"{asked[0]}: is not supported; leave it out", param=asked[0])
        if extra.pop("n", 1) not in (None, 1):
            raise ApiError(400, "n: a response has one output; leave it out", param="n")
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        text = self.text or TextConfig()
        fields |= extra  # other servers' fields, as in chat requests
        fields |= {
            "model": self.model,
            "messages": [*system, *to_messages([*before, *self.items])],
            "tools": [tool for given in self.tools or () for tool in _tools(given)] or None,
            "tool_choice": _choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _format(text.format),
            "verbosity": (text.model_extra or {}).get("verbosity"),
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
        }
        if not fields["messages"]:
            raise ApiError(400, "input: there is nothing to answer", param="input")
        return chat_request(fields)


class ResponseRequest(InputTokensRequest):
    """POST /v1/responses."""

    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = True
    stream: bool | None = False
    background: bool | None = False
    enable_response_messages: bool | None = Field(
        default=False, description="Tell the tokens of prompt and output, and what they read."
    )

    @property
    def wants_logprobs(self) -> bool:
        """Whether texts come with the log-probabilities of their tokens."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    def to_chat(self, before: Iterable[dict[str, Any]], **fields: Any) -> ChatCompletionRequest:
        """The chat request that means the same. ApiError."""
        logprobs = self.wants_logprobs
        return super().to_chat(
            before,
            **fields,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            logprobs=logprobs,
            top_logprobs=self.top_logprobs if logprobs else None,
            stream=self.stream,
            return_token_ids=self.enable_response_messages,
        )


def _tools(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A function, or those of a namespace."""
    if given.get("type") == "namespace":
        inner = given.get("tools")
        if not isinstance(inner, list) or not all(isinstance(tool, dict) for tool in inner):
            message = "tools: a namespace must have a name, and tools, a list of functions"
            raise ApiError(400, message, param="tools")
        return [_tool({**tool, "namespace": given.get("name")}) for tool in inner]
    return [_tool(given)]


def _tool(given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("type") != "function":
        kind = given.get("type")
        message = f"tools: got {kind!r}; only functions, and namespaces of them, are supported"
        raise ApiError(400, message, param="tools")
    names = ("description", "parameters", "strict")
    function = {name: given[name] for name in names if given.get(name) is not None}
    return {"type": "function", "function": {"name": _flat_name(given), **function}}


def _flat_name(given: Mapping[str, Any]) -> Any:
    """The name that the model calls a function by: with its namespace, as vLLM has it."""
    name, namespace = given.get("name"), given.get("namespace")
    return name if namespace is None else f"{namespace}__{name}"


def _choice(given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    if given.get("type") == "function":
        return {"type": "function", "function": {"name": _flat_name(given)}}
    if given.get("type") == "allowed_tools":
        tools = given.get("tools")
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise ApiError(400, "tool_choice: tools must be a list of tools", param="tool_choice")
        allowed = {"mode": given.get("mode"), "tools": [_tool(tool) for tool in tools]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return given


def _format(given: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """OpenAI has the schema beside the type here, and inside of `json_schema` in chats."""
    if given is None or given.get("type") != "json_schema":
        return dict(given) if given is not None else None
    inner = {name: value for name, value in given.items() if name != "type"}
    return {"type": "json_schema", "json_schema": inner}


def to_messages(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of items: what an assistant thinks, says and calls is one of them. ApiError."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # an assistant's, that may go on
    for item in items:
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") != "assistant":
            messages.append({"role": item.get("role"), "content": item.get("content")})
            turn = None
        elif kind == "function_call_output":
            said = {"role": "tool", "tool_call_id": item.get("call_id")}
            messages.append({**said, "content": item.get("output")})
            turn = None
        elif kind in ("message", "reasoning", "function_call"):
            if turn is None or (kind != "function_call" and turn.keys() & _after(kind)):
                turn = {"role": "assistant"}
                messages.append(turn)
            if kind == "message":
                turn["content"] = item.get("content")
            elif kind == "reasoning":
                turn["reasoning_content"] = _thought(item)
            else:
                function = {"name": _flat_name(item), "arguments": item.get("arguments")}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                turn.setdefault("tool_calls", []).append(call)
        else:
            message = f"input: an item has type {kind!r}, which is not supported"
            raise ApiError(400, message, param="input")
    return messages


def _after(kind: str) -> set[str]:
    """What cannot be before such an item in one message."""
    return {"content", "tool_calls"} | ({"reasoning_content"} if kind == "reasoning" else set())


def _thought(item: Mapping[str, Any]) -> str:
    parts = item.get("content") or item.get("summary") or []
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise ApiError(400, "input: a reasoning item must have parts", param="input")
    return "\n".join(str(part.get("text") or "") for part in parts)
