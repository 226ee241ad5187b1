"""Text to tokens, in the HTTP process.

Long texts are tokenized in threads, in which the tokenizer's own backend lets others run; of very
long ones, one at a time, so that they keep no thread from shorter ones. Templates are rendered in
threads, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from flexllm_jax.engine.sampling.reasoning import Thinking, find_thinking
from flexllm_jax.engine.sampling.structured_outputs import literal
from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.models.text.detokenizer import Detokenizer
from flexllm_jax.models.text.messages import ConversationError, read_conversation
from flexllm_jax.models.text.tokenizer import encode_texts, token_starts
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.tools.formats import Format, find_format

_LONG_TEXT = 4000  # characters; tokenizing them takes about a millisecond
_VERY_LONG_TEXT = 200_000


def too_long(what: str, param: str = "prompt") -> ApiError:
    """What is answered to a prompt that fits in no request."""
    return ApiError(400, f"{what}: shorten it", param=param, code="context_length_exceeded")


class TextCodec:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.detokenizer = Detokenizer(tokenizer)
        self.backend = tokenizer.backend_tokenizer
        self.template = ChatTemplate(tokenizer)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.longest_token = max(map(len, vocabulary))
        self._one_at_a_time = ThreadPoolExecutor(1, thread_name_prefix="long-text")

    async def encode(
        self, texts: Sequence[str], max_tokens: int, *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Token ids of prompts; ApiError at once when one must have over `max_tokens`."""
        for text in texts:
            if len(text) > max_tokens * self.longest_token:
                raise too_long(
                    f"the prompt has {len(text)} characters, and max_model_len is {max_tokens} "
                    f"tokens of at most {self.longest_token} characters"
                )
            try:
                text.encode()
            except UnicodeEncodeError:
                message = "prompt: it has half a surrogate pair, which is no character"
                raise ApiError(400, message, param="prompt") from None
        return await self._run(encode_texts, texts, add_special_tokens)

    async def token_starts(
        self, texts: Sequence[str], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """Where the tokens of prompts stand in their texts, in characters."""
        return await self._run(token_starts, texts, add_special_tokens)

    async def _run(
        self, function: Callable[..., list[list[int]]], texts: Sequence[str], special: bool
    ) -> list[list[int]]:
        call = partial(function, self.tokenizer, texts, add_special_tokens=special)
        length = sum(map(len, texts))
        if length < _LONG_TEXT:
            return call()
        thread = self._one_at_a_time if length > _VERY_LONG_TEXT else None
        return await asyncio.get_running_loop().run_in_executor(thread, call)

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included."""
        if len(tokens) < _LONG_TEXT:
            return self.detokenizer.decode(tokens)
        call = partial(self.backend.decode_batch, [tokens], skip_special_tokens=False)
        (text,) = await asyncio.get_running_loop().run_in_executor(self._one_at_a_time, call)
        return text

    def literal(self, text: str) -> str:
        """`text` in a Lark grammar."""
        return literal(self.tokenizer, text)

    def thinks(self) -> bool:
        """Whether answers may begin with thoughts that are told apart."""
        return find_thinking(self.template.source(), "") is not None

    def thinking(self, prompt: str, budget: int | None) -> Thinking | None:
        """How the answer to a rendered prompt may begin; None: with nothing that is told apart."""
        return find_thinking(self.template.source(), prompt, budget)

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
