"""What answers tell of tokens, for a tokenizer that puts a BOS and a space before a text. The
engine's part is played by hand."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.models.text.detokenizer import OutputText
from flexllm_jax.models.text.tokenizer import encode_text, token_starts
from flexllm_jax.server.engines.protocol import Output
from flexllm_jax.server.inference.chat import _Chat
from flexllm_jax.server.inference.completions import _Completion, _Prompt
from flexllm_jax.server.inference.conversing import ConversationAnswer
from flexllm_jax.server.inference.requests import Answer
from flexllm_jax.server.inference.schema import ChatCompletionRequest, CompletionRequest
from flexllm_jax.server.inference.text import TextCodec
from tests.small_tokenizers import sentencepiece_tokenizer

TOKENIZER = sentencepiece_tokenizer(["\u2581the", "\u2581two"])
CODEC = TextCodec(TOKENIZER)
TWO, MARK = cast(list[int], TOKENIZER.convert_tokens_to_ids(["\u2581two", "!"]))


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


class Engine:
    """Says `tokens`, one at a time, each with a log-probability and that of "▁two"."""

    def __init__(self, prompt: list[int], tokens: list[int], reason: str):
        values = [{TWO: -2.0, token: -1.0} for token in [*prompt, *tokens]]
        before = [None, *values[1 : len(prompt)]]
        self.outputs = [
            Output(
                request_id=0,
                token_ids=[token],
                logprobs=[values[len(prompt) + at]],
                prompt_logprobs=None if at else before,
                finish_reason=reason if at == len(tokens) - 1 else None,
            )
            for at, token in enumerate(tokens)
        ]

    async def __aiter__(self) -> AsyncIterator[tuple[int, float, Output]]:
        for output in self.outputs:
            yield 0, 0.0, output

    def drop(self, index: int) -> None:
        self.outputs.clear()


class Metrics:
    def token(self, at: float, queued_s: float | None, cached_tokens: int = 0) -> None: ...

    def end(self, reason: str) -> None: ...


def answer_of(prompt: list[int], said: str, reason: str = "length", **fields: Any) -> Answer:
    params = SamplingParams(max_tokens=50, **fields)
    include = params.include_stop_str_in_output
    text = OutputText(CODEC.detokenizer, prompt, params.stop, include_stop=include)
    engine = Engine(prompt, tokens_of(said), reason)
    return Answer(
        [prompt], cast(Any, engine), [text], [cast(Any, Metrics())], params, CODEC.detokenizer
    )


def completed(prompt: str | list[int], said: str, *, echo: bool = True) -> dict[str, Any]:
    """The choice of a completion with log-probabilities."""
    sent = (
        _Prompt(encode_text(TOKENIZER, prompt), prompt, token_starts(TOKENIZER, [prompt])[0])
        if isinstance(prompt, str)
        else _Prompt(prompt, None, [])
    )
    answer = answer_of(sent.tokens, said)
    body = CompletionRequest(model="m", prompt=prompt, logprobs=2, echo=echo)
    completion = _Completion(body, answer, [sent], CODEC, "m")

    async def run() -> None:
        async for delta in answer:
            completion.take(delta)

    asyncio.run(run())
    return completion.choice(0, completion.choices[0].text)


def test_echo_is_the_prompt_as_it_was_sent_and_its_tokens_have_the_bos() -> None:
    choice = completed("the 中", "two!")
    assert choice["text"] == "the 中 two!"
    report = choice["logprobs"]
    assert report["tokens"] == ["<s>", "the", " ", "", "", "中", " two", "!"]
    assert report["text_offset"] == [0, 0, 3, 4, 4, 4, 5, 9]


def test_without_echo_offsets_are_those_of_the_output() -> None:
    choice = completed("the", "two two", echo=False)
    assert choice["text"] == " two two"
    assert choice["logprobs"]["tokens"] == [" two", " two"]
    assert choice["logprobs"]["text_offset"] == [0, 4]


def test_other_tokens_are_told_as_they_would_stand_there() -> None:
    top = completed("the x", "two")["logprobs"]["top_logprobs"]
    assert top[0] is None
    assert top[1] == {"the": -1.0, "two": -2.0}  # where the text begins
    assert top[2] == {" ": -1.0, " two": -2.0}


def test_a_prompt_of_tokens_is_echoed_as_their_text() -> None:
    prompt = TOKENIZER.encode("the")
    choice = completed(prompt, "two")
    assert choice["text"] == TOKENIZER.decode(prompt) + " two" == "<s> the two"
    assert choice["logprobs"]["tokens"] == ["<s>", " the", " two"]
    assert choice["logprobs"]["text_offset"] == [0, 3, 7]


@pytest.mark.parametrize(
    ("fields", "reason", "text", "ending"),
    [
        ({"stop_token_ids": (MARK,)}, "stop", " two", "!"),
        ({"stop": ("!",)}, "length", " two", "!"),
        ({"stop": ("wo",)}, "length", " t", "wo"),
    ],
    ids=["token", "string", "within a token"],
)
@pytest.mark.parametrize("include", [False, True])
def test_what_ended_an_output_is_left_out_unless_asked_for(fields, reason, text, ending, include):
    fields = {**fields, "include_stop_str_in_output": include}
    answer = answer_of(TOKENIZER.encode("the"), "two!", reason, **fields)

    async def run() -> list:
        return [delta async for delta in answer]

    deltas = asyncio.run(run())
    assert "".join(delta.text for delta in deltas) == text + ending * include
    assert deltas[-1].finish_reason == "stop"


def test_bytes_in_a_chat_are_those_of_the_content() -> None:
    """OpenAI: bytes of tokens are put together where a character has several."""
    answer = answer_of(TOKENIZER.encode("the"), "two 中!")
    body = ChatCompletionRequest(
        model="m", messages=[{"role": "user", "content": "x"}], logprobs=True, top_logprobs=1
    )
    conversation = _Chat(body, ConversationAnswer(body, answer, None, None), CODEC, "m")

    async def run() -> tuple[str, list[dict[str, Any]]]:
        text, entries = "", []
        async for said in conversation.answer:
            text += said.text
            entries.append(cast(dict, conversation.logprobs(said.delta)))
        return text, entries

    text, entries = asyncio.run(run())
    assert text == " two 中!"
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == text.encode()
    assert [entry["token"] for entry in entries] == [" two", " ", "", "", "中", "!"]
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries)
