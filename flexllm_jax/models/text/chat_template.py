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
from typing import Any, ClassVar, Literal, NamedTuple

from jinja2 import TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexllm_jax.models.text.messages import SYSTEM_ROLES, Conversation, ConversationError

# What a template reads that is not for a client to set, or has a field of its own.
_OWN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
_FUNCTIONS = {"raise_exception", "strftime_now", "namespace", "range", "dict"}
_MOST_SHAPES = 10_000
_WORD = "zq{}qz"  # made up: no template says it by itself

Message = dict[str, Any]


class _Form(NamedTuple):
    """What of a message can make a template write it otherwise."""

    role: str
    calls: int
    has_content: bool
    has_objects: bool  # all arguments of its calls are objects


Shape = tuple[_Form, ...]  # of a conversation


@dataclass(frozen=True)
class _Style:
    """How a conversation is written for a template."""

    keep_developer: bool  # else such messages are system messages
    keep_places: bool  # else all system messages are one, the first
    arguments: Literal["values", "text", "objects"]  # of calls: as they are, as JSON, in an object
    empty: Literal["text", "none", "absent"]  # what no content beside calls is
    texts: bool  # contents are texts, else lists of parts
    short_ids: bool  # ids of calls have nine letters and digits, as Mistral's templates want them

    def write(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in this style."""
        written = [self._write(message) for message in messages]
        if not self.keep_places:
            system = [message for message in written if message["role"] in SYSTEM_ROLES]
            content = "\n\n".join(message["content"] for message in system)
            others = [message for message in written if message["role"] not in SYSTEM_ROLES]
            written = [{**system[0], "content": content}, *others]
        return written if self.texts else [_in_parts(message) for message in written]

    def _write(self, message: Message) -> Message:
        message = dict(message)
        if self.short_ids and isinstance(call_id := message.get("tool_call_id"), str):
            message["tool_call_id"] = _short_id(call_id)
        if message["role"] == "developer" and not self.keep_developer:
            message["role"] = "system"
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [self._call(call) for call in calls]
            if not message["content"] and self.empty != "text":
                message["content"] = None
                if self.empty == "absent":
                    del message["content"]
        return message

    def _call(self, call: Mapping[str, Any]) -> Message:
        function = call["function"]
        arguments = function["arguments"]
        if self.arguments == "text" and not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if self.arguments == "objects" and not isinstance(arguments, Mapping):
            arguments = {"arguments": arguments}
        call = {**call, "function": {**function, "arguments": arguments}}
        if self.short_ids and isinstance(call.get("id"), str):
            call["id"] = _short_id(call["id"])
        return call


def _short_id(call_id: str) -> str:
    """The same of the same, wherever it is."""
    if len(call_id) == 9 and call_id.isascii() and call_id.isalnum():
        return call_id
    return hashlib.blake2b(call_id.encode(errors="replace"), digest_size=5).hexdigest()[:9]


def _in_parts(message: Message) -> Message:
    if message.get("content") is None:
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


class ChatTemplate:
    """The chat template of a tokenizer, if it has one."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._styles: dict[bytes, _Style] = {}  # by a digest: shapes can be long

    @property
    def exists(self) -> bool:
        """Whether there is one."""
        return bool(self.tokenizer.chat_template)

    def source(self, *, with_tools: bool = False) -> str:
        """Its text; some tokenizers have another one for conversations with tools."""
        if not self.exists:
            reason = "this model's tokenizer has no chat template: give a prompt instead"
            raise ConversationError("messages", reason)
        try:
            return self.tokenizer.get_chat_template(tools=[{}] if with_tools else None)
        except ValueError as error:  # it has several, and none for this
            raise ConversationError("messages", " ".join(str(error).split())) from None

    def reads(self, name: str) -> bool:
        """Whether it makes use of a variable."""
        return self.exists and name in _names(self.source())

    def effort(self, effort: str) -> dict[str, Any] | None:
        """The variables that ask for an effort of reasoning, by the names that templates have for
        it; None: it reads none of them. With `none` a model does not think."""
        thinks = effort != "none"
        ways = {"reasoning_effort": effort, "enable_thinking": thinks, "thinking": thinks}
        if not thinks:
            ways["thinking_budget"] = 0
        return next(({name: value} for name, value in ways.items() if self.reads(name)), None)

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
        # Imported late: transformers takes seconds, and others than engines import this module.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # As `apply_chat_template` does it, which leaves out contents that are None.
            (text,), _ = render_jinja_template(
                conversations=[messages],
                tools=list(conversation.tools) or None,
                documents=list(conversation.documents) or None,
                chat_template=source,
                **{**self.tokenizer.special_tokens_map, **conversation.options, **options},
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
            f"messages[{missing}]: the chat template leaves out {shape[missing].role} messages, "
            "or this one where it stands; it cannot be there",
        )


def _styles(shape: Shape, source: str) -> Iterator[_Style]:
    has_calls = any(form.calls for form in shape)
    has_empty = any(form.calls and not form.has_content for form in shape)
    has_odd = not all(form.has_objects for form in shape)
    late = any(form.role in SYSTEM_ROLES for form in shape[1:])
    knows_developer = "developer" in source and any(form.role == "developer" for form in shape)
    yield from (
        _Style(developer, places, arguments, empty, texts, short_ids)
        for short_ids, texts, arguments, empty, places, developer in product(
            (False, True) if has_calls else (False,),
            (True, False),
            ("values", "text", "objects")[: 1 + has_calls + has_odd],
            ("text", "none", "absent") if has_empty else ("text",),
            (True, False) if late else (True,),
            (True, False) if knows_developer else (False,),
        )
    )


def _shape(messages: Sequence[Message]) -> Shape:
    return tuple(
        _Form(m["role"], len(calls), bool(m["content"]), all(map(_has_object, calls)))
        for m in messages
        for calls in [m.get("tool_calls", ())]
    )


def _has_object(call: Mapping[str, Any]) -> bool:
    return isinstance(call["function"]["arguments"], Mapping)


def _sample(shape: Shape) -> list[Message]:
    """A conversation of made-up words: a message's own is its content, or in each of its calls."""
    messages: list[Message] = []
    call_id = ""
    for i, form in enumerate(shape):
        word = _WORD.format(i)
        content = word if form.has_content or not form.calls else ""
        message: Message = {"role": form.role, "content": content}
        if form.calls:
            call_id = f"call_{i:024d}"  # of OpenAI's form
            function = {"name": word, "arguments": {"a": word} if form.has_objects else [word]}
            message["tool_calls"] = [
                {"id": call_id, "type": "function", "function": function} for _ in range(form.calls)
            ]
        if form.role == "tool":
            message |= {"tool_call_id": call_id, "name": "f"}
        messages.append(message)
    return messages


def _shows(text: str, index: int, form: _Form) -> bool:
    """Whether a message is in the text. Of an assistant's, templates leave out what was thought
    before a later turn, or said beside a call: only its calls have to be there."""
    return text.count(_WORD.format(index)) >= (form.calls if form.role == "assistant" else 1)


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
