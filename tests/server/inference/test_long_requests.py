"""Requests whose size alone would keep the server from everything else."""

import asyncio
import json
import time
from itertools import chain

import pytest
from pydantic import ValidationError

from flexllm_jax.server.finetuning import schema as finetuning_schema
from flexllm_jax.server.http.body import Body
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference import adapters_routes, schema
from flexllm_jax.server.inference.text import TextCodec

MODULES = (schema, finetuning_schema, adapters_routes)
BODIES = [
    kind
    for kind in chain.from_iterable(vars(module).values() for module in MODULES)
    if isinstance(kind, type) and issubclass(kind, Body) and kind is not Body
]
LONG = ["ab " * 200_000]
MANY = ["ab " * 1000] * 200


@pytest.mark.parametrize("texts", [LONG, MANY], ids=["one text", "many texts"])
def test_the_event_loop_goes_on_while_texts_are_tokenized(tokenizer, texts):
    codec, lag = TextCodec(tokenizer), 0.0

    async def tick():
        nonlocal lag
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.005)
            lag = max(lag, time.monotonic() - began)

    async def encode():
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0.02)
        began = time.monotonic()
        tokens = await codec.encode(texts, 10**6)
        took = time.monotonic() - began
        await asyncio.sleep(0.02)
        ticking.cancel()
        return tokens, took

    tokens, took = asyncio.run(encode())
    assert tokens == [tokenizer.encode(text) for text in texts]
    assert lag < 0.4 * took, f"{lag:.2f} of {took:.2f} s"


def test_long_texts_are_decoded_as_others(tokenizer):
    tokens = tokenizer.encode("ab c. " * 2000)
    assert len(tokens) > 4000
    assert asyncio.run(TextCodec(tokenizer).decode(tokens)) == "ab c. " * 2000


def test_what_cannot_fit_is_not_tokenized(tokenizer):
    codec = TextCodec(tokenizer)
    codec.tokenizer = None  # whoever asks it fails
    with pytest.raises(ApiError, match="characters, and max_model_len is 10 tokens"):
        asyncio.run(codec.encode(["a", "a" * (10 * codec.longest_token + 1)], 10))


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_of_a_million_wrong_items_few_are_told(body):
    """pydantic tells all of them, which takes it 20 s."""
    for field in body.model_fields.values():
        name = field.alias or next(n for n, f in body.model_fields.items() if f is field)
        for wrong in ([object()] * 5000, {str(i): object() for i in range(5000)}):
            told = 0
            try:
                body.model_validate({name: wrong})
            except ValidationError as error:
                told = error.error_count()
            assert told < 50, name


ASK = {"model": "tiny", "max_tokens": 1}
TOO_LONG = {
    "/tokenize": {"prompt": "a " * 5000},
    "/v1/completions": {**ASK, "prompt": ["a", "a " * 5000]},
    "/v1/chat/completions": {**ASK, "messages": [{"role": "user", "content": "a " * 5000}]},
}
MESSAGE = {"role": "user", "content": ""}


@pytest.mark.parametrize("path", TOO_LONG)
def test_a_text_that_fits_in_no_request(server, path):
    status, _, answer = server.post(path, json.dumps(TOO_LONG[path]).encode())
    error = json.loads(answer)["error"]
    assert (status, error["code"]) == (400, "context_length_exceeded"), answer
    assert "max_model_len" in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions"])
def test_more_messages_than_tokens_are_not_rendered(server, path):
    body = {"model": "tiny", "messages": [MESSAGE] * 161}
    status, _, answer = server.post(path, json.dumps(body).encode())
    error = json.loads(answer)["error"]
    assert (status, error["code"]) == (400, "context_length_exceeded"), answer
    assert error["param"] == "messages"


def test_lists_are_limited(server):
    body = {**ASK, "prompt": ["a"] * 10_000}
    status, _, answer = server.post("/v1/completions", json.dumps(body).encode())
    assert status == 400 and json.loads(answer)["error"]["param"] == "prompt"
    body = {**ASK, "prompt": "a", "stop": ["a"] * 10_000}
    status, _, answer = server.post("/v1/completions", json.dumps(body).encode())
    assert status == 400 and json.loads(answer)["error"]["param"] == "stop"


def test_nesting_is_limited(server):
    depth = 40_000
    for field in ("messages", "tools", "prompt", "response_format", "chat_template_kwargs"):
        body = f'{{"model": "tiny", "{field}": {"[" * depth}{"]" * depth}}}'
        for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
            status, _, answer = server.post(path, body.encode())
            assert status == 400, answer
    deep = f'{{"a": {"[" * 900}{"]" * 900}}}'
    for field in ("response_format", "structured_outputs"):
        form = f'{{"type": "json_schema", "json_schema": {{"name": "a", "schema": {deep}}}}}'
        form = form if field == "response_format" else f'{{"json": {deep}}}'
        body = f'{{"model": "tiny", "messages": [{json.dumps(MESSAGE)}], "{field}": {form}}}'
        status, _, answer = server.post("/v1/chat/completions", body.encode())
        assert status == 400, answer
    function = f'{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}'
    body = f'{{"model": "tiny", "messages": [{json.dumps(MESSAGE)}], "tools": [{function}]}}'
    for choice in ('"required"', '"auto"'):
        with_choice = f'{body[:-1]}, "tool_choice": {choice}, "max_tokens": 1}}'
        status, _, answer = server.post("/v1/chat/completions", with_choice.encode())
        assert status in (200, 400), answer
    assert server.get("/health")[0] == 200
