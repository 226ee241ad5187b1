"""Text to tokens and back, in the HTTP process.

Long texts are tokenized in a thread; the tokenizer's own backend is called, which many threads may
use at once. Output is decoded token by token: what is sent is never taken back, so characters that
are not complete and text that may become a stop string are held until they are decided.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from tokenizers.decoders import DecodeStream

from flexllm_jax.engine.structured_outputs import quote
from flexllm_jax.models.chat_template import ChatTemplate
from flexllm_jax.models.messages import ConversationError, read_conversation
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.tool_calls import Format, find_format

_LONG_TEXT = 4000  # characters; tokenizing them takes about a millisecond
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_letters() -> dict[str, int]:
    """Byte-level tokenizers write every byte as a letter: printable ones of Latin-1 as themselves,
    the others in order from U+0100 on (GPT-2's `bytes_to_unicode`)."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_letters()


class TextCodec:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.template = ChatTemplate(tokenizer)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.longest_token = max(map(len, vocabulary))
        self.token_text = lru_cache(maxsize=100_000)(self._token_text)
        self.token_bytes = lru_cache(maxsize=100_000)(self._token_bytes)
        decoder = self.backend.decoder
        kinds = decoder.__getstate__().decode() if decoder else ""  # its JSON
        self._byte_level, self._byte_fallback = '"ByteLevel"' in kinds, '"ByteFallback"' in kinds

    def _token_text(self, token: int) -> str:
        return self.backend.decode([token], skip_special_tokens=False)

    def _token_bytes(self, token: int) -> bytes:
        """The bytes of a token, which may be a part of a character."""
        name = self.backend.id_to_token(token) or ""
        is_added = token in self.backend.get_added_tokens_decoder()
        if self._byte_level and not is_added and all(letter in _BYTES for letter in name):
            return bytes(_BYTES[letter] for letter in name)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(match[1], 16)])
        return self.token_text(token).encode()

    async def encode(
        self, text: str, max_tokens: int, *, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of a prompt; ApiError at once when it must have over `max_tokens`."""
        if len(text) > max_tokens * self.longest_token:
            raise ApiError(
                400,
                f"the prompt has {len(text)} characters, and max_model_len is {max_tokens} tokens "
                f"of at most {self.longest_token} characters: shorten it",
                param="prompt",
                code="context_length_exceeded",
            )

        try:
            text.encode()
        except UnicodeEncodeError:
            message = "prompt: it has half a surrogate pair, which is no character"
            raise ApiError(400, message, param="prompt") from None

        def run() -> list[int]:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

        return run() if len(text) < _LONG_TEXT else await asyncio.to_thread(run)

    def is_special(self, text: str) -> bool:
        """Whether `text` is a token that detokenizers leave out."""
        added = self.backend.get_added_tokens_decoder().values()
        return any(token.special and token.content == text for token in added)

    def literal(self, text: str) -> str:
        """`text` in a Lark grammar: a special token by its id, as it is not spelled out."""
        return f"<[{self.backend.token_to_id(text)}]>" if self.is_special(text) else quote(text)

    def tool_format(self) -> Format | None:
        """How this model's chat template asks for tool calls; ApiError when there is none."""
        try:
            return find_format(self.template.source(with_tools=True))
        except ConversationError as error:
            raise ApiError(400, str(error), param=error.field) from None

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        return self.backend.decode(list(tokens), skip_special_tokens=False)

    async def render(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        source: str | None = None,
    ) -> str:
        """A conversation through the chat template, in a thread: templates are programs. ApiError
        for one that cannot be used."""

        def run() -> str:
            return self.template.render(
                read_conversation(messages, tools, documents, options),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                source=source,
            )

        try:
            return await asyncio.to_thread(run)
        except ConversationError as error:
            raise ApiError(400, str(error).replace("`", ""), param=error.field) from None


class Detokenizer:
    """One output's text, token by token, up to the first of its stop strings.

    `text` is what is known of it; a stop string is looked for after more than `min_tokens` tokens.
    """

    def __init__(
        self,
        codec: TextCodec,
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        *,
        skip_special_tokens: bool = True,
    ):
        self._backend, self._stop, self._min_tokens = codec.backend, stop, min_tokens
        self._longest = max(map(len, stop), default=0)
        self._skip_special = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._tokens: list[int] = []
        self._sent = 0
        self.text = ""
        self.stop: str | None = None  # the stop string that ended it

    def push(self, token: int) -> bool:
        """Take in a token; whether a stop string ends the output here."""
        self._tokens.append(token)
        piece = self._stream.step(self._backend, token)
        if piece:
            self._append(piece)
        return self.stopped

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the output."""
        return self.stop is not None

    def _append(self, piece: str) -> None:
        searched = max(0, len(self.text) - self._longest + 1)
        self.text += piece
        if self._stop and len(self._tokens) > self._min_tokens:
            found = [(at, s) for s in self._stop if (at := self.text.find(s, searched)) >= 0]
            if found:
                at, self.stop = min(found)
                self.text = self.text[:at]

    def take(self, *, final: bool) -> str:
        """Text that was not taken yet and will not change; at the end, all of it."""
        if final and not self.stopped:
            whole = self._backend.decode(self._tokens, skip_special_tokens=self._skip_special)
            if len(whole) > len(self.text) and whole.startswith(self.text):
                self._append(whole[len(self.text) :])  # bytes that never became a character
        end = len(self.text) if final or self.stopped else len(self.text) - self._undecided()
        piece = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece

    def _undecided(self) -> int:
        """Characters at the end that a stop string may begin with."""
        for length in range(min(self._longest - 1, len(self.text)), 0, -1):
            tail = self.text[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return length
        return 0
