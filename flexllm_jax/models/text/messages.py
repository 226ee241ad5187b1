"""Conversations as they are given, checked and in one form, before a chat template writes them out.

Requests, rows to train on and the Python API all pass through here: text parts are joined, the
arguments of calls are read from their JSON text, and OpenAI's older names for calls (`functions`,
`function_call`) mean the same as the newer ones. Keys without a value are left out, as templates
look whether a key is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SYSTEM_ROLES = ("system", "developer")
_PARTS_WITH_TEXT = ("text", "input_text", "output_text", "refusal")


class ConversationError(ValueError):
    """A conversation that cannot be used; `field` is the part of it, the message is the reason."""

    def __init__(self, field: str, reason: str):
        super().__init__(reason)
        self.field = field


@dataclass(frozen=True)
class Conversation:
    """What a chat template makes a prompt of; checked. `options` are further variables of it."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    documents: Sequence[dict[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def read_conversation(
    messages: Any, tools: Any = None, documents: Any = None, options: Any = None
) -> Conversation:
    """A conversation from what was given. Raises ConversationError."""
    return Conversation(
        read_messages(messages), read_tools(tools), read_documents(documents), read_options(options)
    )


def read_messages(given: Any, field: str = "messages") -> list[dict[str, Any]]:
    """OpenAI-style messages in the form that templates expect. Raises ConversationError."""
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise ConversationError(field, f"`{field}` must be a list of messages, not {short(given)}")
    return [_read_message(message, f"{field}[{i}]", field) for i, message in enumerate(given)]


def read_tools(given: Any, field: str = "tools") -> list[dict[str, Any]]:
    """Functions that may be called: a list, or its JSON text; each as OpenAI's `tools` or its older
    `functions` give it, returned as the former. Raises ConversationError."""
    tools = []
    for index, tool in enumerate(_objects(given, field)):
        if "function" not in tool and isinstance(tool.get("name"), str):
            tool = {"type": "function", "function": tool}
        function = tool.get("function")
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            reason = f"{field}[{index}] must have `function` with a `name`, not be {short(tool)}"
            raise ConversationError(field, reason)
        tools.append({"type": "function", **tool})
    return tools


def read_documents(given: Any) -> list[dict[str, Any]]:
    """Documents that an answer may use, as templates expect them. Raises ConversationError."""
    return _objects(given, "documents")


def read_options(given: Any) -> dict[str, Any]:
    """Further variables of a template. Raises ConversationError."""
    if given is not None and not isinstance(given, Mapping):
        raise ConversationError("chat_template_kwargs", f"must be an object, not {short(given)}")
    return dict(given or {})


def _objects(given: Any, field: str) -> list[dict[str, Any]]:
    if isinstance(given, str):
        try:
            value = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError):
            value = given
    else:
        value = given
    if value is None:
        return []
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        raise ConversationError(field, f"`{field}` must be a list, not {short(given)}")
    for index, item in enumerate(value):
        if not isinstance(item, Mapping):
            raise ConversationError(field, f"{field}[{index}] must be an object, not {short(item)}")
    return [dict(item) for item in value]


def _read_message(given: Any, where: str, field: str) -> dict[str, Any]:
    if callable(dump := getattr(given, "model_dump", None)):  # as the openai SDK returns them
        given = dump()
    if not isinstance(given, Mapping):
        reason = f"{where} must have `role` and `content`, not be {short(given)}"
        raise ConversationError(field, reason)
    message = {key: value for key, value in given.items() if value is not None}
    role = message.get("role")
    if role not in ROLES:
        raise ConversationError(field, f"{where}.role is {short(role)}, not one of {ROLES}")
    if role == "function":  # before there were tools
        message["role"] = "tool"
    calls = message.pop("tool_calls", [])
    if (call := message.pop("function_call", None)) is not None and not calls:
        calls = [{"type": "function", "function": call}]
    if calls:
        message["tool_calls"] = _read_calls(calls, f"{where}.tool_calls", field)
    # Two names of what was thought; templates read the one or the other.
    thought = message.get("reasoning_content", message.get("reasoning"))
    if isinstance(thought, str):
        message["reasoning_content"] = message["reasoning"] = thought
    message["content"] = read_content(message, where, field)
    return message


def read_content(message: Mapping[str, Any], where: str, field: str) -> str:
    """The text of a message. What an assistant called or refused stands for it. Raises
    ConversationError."""
    content = message.get("content")
    if content is None and message.get("role") == "assistant":
        content = message.get("refusal")
        if content is None and message.keys() & {"tool_calls", "reasoning_content", "reasoning"}:
            content = ""
    if isinstance(content, list | tuple):
        texts = [_text_of_part(part) for part in content]
        if None in texts:
            raise ConversationError(field, f"{where}.content has parts that are not text")
        content = "".join(text for text in texts if text is not None)
    if not isinstance(content, str):
        raise ConversationError(field, f"{where}.content must be text, not {short(content)}")
    return content


def _text_of_part(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type", "text") not in _PARTS_WITH_TEXT:
        return None
    text = part.get("text", part.get("refusal"))
    return text if isinstance(text, str) else None


def _read_calls(calls: Any, where: str, field: str) -> list[dict[str, Any]]:
    """Calls with arguments as values, as templates expect them; OpenAI sends them as JSON text."""
    if not isinstance(calls, list | tuple):
        raise ConversationError(field, f"{where} must be a list, not {short(calls)}")
    read = []
    for index, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            reason = f"{where}[{index}] must have `function` with `name` and `arguments`"
            raise ConversationError(field, reason)
        arguments = _read_arguments(function.get("arguments"))
        read.append({**call, "function": {**function, "arguments": arguments}})
    return read


def _read_arguments(given: Any) -> Any:
    """What a model wrote may be no object, or no JSON at all; it stays what it is."""
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError):
            return given
    return {} if given is None else given


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
