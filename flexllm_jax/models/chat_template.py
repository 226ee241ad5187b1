"""A checkpoint's chat template: conversations to the text of a prompt.

The HTTP server, the Python API and the datasets all render here, so the same messages are the same
prompt. Nothing that was said may get lost: templates differ in which roles they know, in whether
they expect the arguments of a call as an object or as text, contents as text or as parts. Which way
of writing a conversation this template shows in whole is found out by rendering one of the same
shape whose texts are made-up words. What it shows in no way is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any, ClassVar

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import render_jinja_template

from flexllm_jax.models.messages import SYSTEM_ROLES, Conversation, ConversationError

# What a template reads that is not for a client to set, or has a field of its own.
_OWN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
_FUNCTIONS = {"raise_exception", "strftime_now", "namespace", "range", "dict"}
_MOST_SHAPES = 10_000
_WORD = "zq{}qz"  # made up: no template says it by itself

Message = dict[str, Any]
Shape = tuple[tuple[str, int, bool], ...]  # of each message: role, calls, whether it has content


@dataclass(frozen=True)
class _Style:
    """How a conversation is written for a template."""

    keep_developer: bool  # else such messages are system messages
    keep_places: bool  # else all system messages are one, the first
    values: bool  # the arguments of calls as values, else as JSON text
    empty_text: bool  # no content is "", else None
    texts: bool  # contents are texts, else lists of parts

    def write(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in this style."""
        written = [self._write(message) for message in messages]
        if self.keep_places:
            return written
        system = [message for message in written if message["role"] in SYSTEM_ROLES]
        content = "\n\n".join(message["content"] for message in system)
        others = [message for message in written if message["role"] not in SYSTEM_ROLES]
        return [self._part({**system[0], "content": content}), *map(self._part, others)]

    def _write(self, message: Message) -> Message:
        message = dict(message)
        if message["role"] == "developer" and not self.keep_developer:
            message["role"] = "system"
        if calls := message.get("tool_calls"):
            if not self.values:
                message["tool_calls"] = [_with_text_arguments(call) for call in calls]
            if not message["content"] and not self.empty_text:
                message["content"] = None
        return self._part(message) if self.keep_places else message

    def _part(self, message: Message) -> Message:
        if self.texts or message["content"] is None:
            return message
        return {**message, "content": [{"type": "text", "text": message["content"]}]}


class ChatTemplate:
    """The chat template of a tokenizer, if it has one."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._styles: dict[bytes, _Style] = {}  # by a digest: shapes can be long

    @property
    def exists(self) -> bool:
        """Whether there is one."""
        return bool(self._tokenizer.chat_template)

    def source(self, *, with_tools: bool = False) -> str:
        """Its text; some tokenizers have another one for conversations with tools."""
        if not self.exists:
            reason = "this model's tokenizer has no chat template: give a prompt instead"
            raise ConversationError("messages", reason)
        return self._tokenizer.get_chat_template(tools=[{}] if with_tools else None)

    def reads(self, name: str) -> bool:
        """Whether it makes use of a variable."""
        return self.exists and name in _names(self.source())

    def render(
        self,
        conversation: Conversation,
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        source: str | None = None,
    ) -> str:
        """The text of a conversation, which ends where an answer begins unless the last message is
        to be continued. `source`: another template. Raises ConversationError."""
        if continue_final_message and add_generation_prompt:
            raise ConversationError(
                "continue_final_message",
                "an answer either begins (add_generation_prompt) or is continued "
                "(continue_final_message): leave out one of them",
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        has_tools = bool(conversation.tools)
        source = self.source(with_tools=has_tools) if source is None else source
        self._check(conversation, source)
        messages = conversation.messages
        style = self._style(_shape(messages), has_tools, source)
        return self._render(
            source,
            style.write(messages),
            conversation,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def _check(self, conversation: Conversation, source: str) -> None:
        """Refuse what the template does not read."""
        reads = _names(source)
        for field in ("tools", "documents"):
            if getattr(conversation, field) and field not in reads:
                reason = "this model's chat template has no place for them; leave them out"
                raise ConversationError(field, f"{field}: {reason}")
        known = {n for n in reads - _OWN - _FUNCTIONS if not n.endswith("_token")}  # as bos_token
        if unknown := sorted(conversation.options.keys() - known):
            what = "has a field of its own" if unknown[0] in _OWN else "is not read by the template"
            raise ConversationError(
                "chat_template_kwargs",
                f"chat_template_kwargs: {unknown[0]!r} {what}; "
                f"it reads {', '.join(sorted(known)) or 'none'}",
            )

    def _render(
        self, source: str, messages: list[Message], conversation: Conversation, **options: bool
    ) -> str:
        try:
            # As `apply_chat_template` does it, which leaves out contents that are None.
            (text,), _ = render_jinja_template(
                conversations=[messages],
                tools=list(conversation.tools) or None,
                documents=list(conversation.documents) or None,
                chat_template=source,
                **{**self._tokenizer.special_tokens_map, **conversation.options, **options},
            )
        except Exception as error:  # templates are programs: they raise what they like
            reason = " ".join(str(error).split())[:300]
            message = f"the chat template refuses the conversation: {reason}"
            raise ConversationError("messages", message) from None
        return text

    # -- which style ------------------------------------------------------------------------------

    def _style(self, shape: Shape, has_tools: bool, source: str) -> _Style:
        key = hashlib.blake2b(repr((shape, has_tools, source)).encode(errors="replace")).digest()
        if key not in self._styles:
            if len(self._styles) >= _MOST_SHAPES:
                self._styles.clear()
            self._styles[key] = self._find_style(shape, has_tools, source)
        return self._styles[key]

    def _find_style(self, shape: Shape, has_tools: bool, source: str) -> _Style:
        """The first style in which the template shows all of a conversation of this shape."""
        tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
        sample = Conversation(_sample(shape), tools if has_tools else ())
        styles = list(_styles(shape, source))
        missing: int | None = None
        for style in styles:
            try:
                text = self._render(source, style.write(sample.messages), sample)
            except ConversationError:
                continue
            lost = [i for i in range(len(shape)) if not _shows(text, i, shape[i])]
            if not lost:
                return style
            missing = lost[0] if missing is None else missing
        if missing is None:  # refused whatever it is: with the reason for what was really said
            return styles[0]
        raise ConversationError(
            "messages",
            f"messages[{missing}]: the chat template leaves out this {shape[missing][0]} message; "
            "it cannot be there",
        )


def _styles(shape: Shape, source: str) -> Iterator[_Style]:
    roles = {role for role, _, _ in shape}
    has_calls = any(calls for _, calls, _ in shape)
    has_empty = any(calls and not content for _, calls, content in shape)
    late = any(role in SYSTEM_ROLES for role, _, _ in shape[1:])
    knows_developer = "developer" in source and "developer" in roles
    yield from (
        _Style(developer, places, values, empty, texts)
        for texts, values, empty, places, developer in product(
            (True, False),
            (True, False) if has_calls else (True,),
            (True, False) if has_empty else (True,),
            (True, False) if late else (True,),
            (True, False) if knows_developer else (False,),
        )
    )


def _shape(messages: Sequence[Message]) -> Shape:
    return tuple((m["role"], len(m.get("tool_calls", ())), bool(m["content"])) for m in messages)


def _sample(shape: Shape) -> list[Message]:
    """A conversation of made-up words: a message's own is its content, or in each of its calls."""
    messages: list[Message] = []
    call_id = ""
    for i, (role, calls, content) in enumerate(shape):
        word = _WORD.format(i)
        message: Message = {"role": role, "content": word if content or not calls else ""}
        if calls:
            call_id = f"{i:09d}"[-9:]  # as long as Mistral's are
            function = {"name": word, "arguments": {"a": word}}
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": function} for _ in range(calls)
            ]
        if role == "tool":
            message |= {"tool_call_id": call_id, "name": "f"}
        messages.append(message)
    return messages


def _shows(text: str, index: int, form: tuple[str, int, bool]) -> bool:
    """Whether a message is in the text. Of an assistant's, templates leave out what was thought
    before a later turn, or said beside a call: only its calls have to be there."""
    role, calls, _ = form
    return text.count(_WORD.format(index)) >= (calls if role == "assistant" else 1)


def _with_text_arguments(call: Mapping[str, Any]) -> Message:
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}


class _Generation(Extension):
    """transformers' mark around what the model says, of which only the inside matters here."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=64)
def _names(source: str) -> frozenset[str]:
    """The variables that a template reads."""
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols])
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(source)))
    except TemplateSyntaxError as error:
        reason = f"chat_template: not a Jinja template ({error.message})"
        raise ConversationError("chat_template", reason) from None
