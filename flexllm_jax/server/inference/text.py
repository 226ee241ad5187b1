"""Text to tokens, in the HTTP process.

Long texts are tokenized in a thread; the tokenizer's own backend is called, which many threads may
use at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from flexllm_jax.engine.structured_outputs import quote
from flexllm_jax.models.chat_template import ChatTemplate
from flexllm_jax.models.detokenizer import Detokenizer
from flexllm_jax.models.messages import ConversationError, read_conversation
from flexllm_jax.models.tokenizer import encode_text, token_starts
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.tool_calls import Format, find_format

_LONG_TEXT = 4000  # characters; tokenizing them takes about a millisecond


class TextCodec:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.detokenizer = Detokenizer(tokenizer)
        self.backend = tokenizer.backend_tokenizer
        self.template = ChatTemplate(tokenizer)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.longest_token = max(map(len, vocabulary))

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
        return await self._run(encode_text, text, add_special_tokens)

    async def token_starts(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Where the tokens of a prompt stand in its text, in characters."""
        return await self._run(token_starts, text, add_special_tokens)

    async def _run(
        self, function: Callable[..., list[int]], text: str, add_special_tokens: bool
    ) -> list[int]:
        call = partial(function, self.tokenizer, text, add_special_tokens=add_special_tokens)
        return call() if len(text) < _LONG_TEXT else await asyncio.to_thread(call)

    def is_special(self, text: str) -> bool:
        """Whether `text` is a token that detokenizers leave out."""
        return text in self.detokenizer.special.values()

    def literal(self, text: str) -> str:
        """`text` in a Lark grammar: a special token by its id, as it is not spelled out."""
        return f"<[{self.backend.token_to_id(text)}]>" if self.is_special(text) else quote(text)

    def tool_format(self) -> Format | None:
        """How this model's chat template asks for tool calls; ApiError when there is none."""
        try:
            return find_format(self.template.source(with_tools=True))
        except ConversationError as error:
            raise ApiError(400, str(error), param=error.field) from None

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
