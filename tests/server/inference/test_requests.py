"""OpenAI's inference interfaces through the unmodified openai SDK, against transformers and LLM."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import openai
import pytest

from flexllm_jax import SamplingParams
from flexllm_jax.models.text.chat_template import ChatTemplate
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.inference.requests import Inference
from flexllm_jax.server.inference.schema import TokenizeRequest
from flexllm_jax.server.inference.text import TextCodec
from tests.engines import (
    load_with_adapter,
    random_prompts,
    reference_greedy,
    reference_logprobs,
)

PROMPTS = random_prompts([5, 17, 33])
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True)


def told(tokenizer, before, token):
    """What a token adds to a text, as transformers decodes it: bytes of a character that is not
    complete add nothing yet. Special tokens are named."""
    if token in tokenizer.all_special_ids:
        return tokenizer.decode([token])
    texts = [text_of(tokenizer, tokens).rstrip("\ufffd") for tokens in (before, [*before, token])]
    return texts[1].removeprefix(texts[0])


def counted(usage):
    """Without what was cached, which a second request finds."""
    return usage.model_dump(exclude={"prompt_tokens_details"})


def test_greedy_completions_are_those_of_transformers(client, tokenizer, llama_reference):
    answer = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=12, **GREEDY)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for prompt, choice in zip(PROMPTS, answer.choices, strict=True):
        expected = reference_greedy(llama_reference, prompt, 12)
        assert choice.text == text_of(tokenizer, expected)
        assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == 5 + 17 + 33
    assert answer.usage.completion_tokens == 36


def test_usage_tells_what_of_the_prompts_was_cached(client):
    prompts = random_prompts([33, 20], seed=99)
    ask = {"model": "tiny", "prompt": prompts, "max_tokens": 3, "n": 2}
    usages = [client.completions.create(**ask).usage for _ in range(2)]
    assert [usage.prompt_tokens for usage in usages] == [53, 53]
    cached = [usage.prompt_tokens_details.cached_tokens for usage in usages]
    assert cached == [0, 32 + 16]  # whole pages of 8, and one token at least is computed


def test_a_text_is_tokenized_as_transformers_does(client, tokenizer, llama_reference):
    text = "Grüße, 世界"
    expected = reference_greedy(llama_reference, tokenizer.encode(text), 8)
    answer = client.completions.create(model="tiny", prompt=text, max_tokens=8, **GREEDY)
    assert answer.choices[0].text == text_of(tokenizer, expected)


def test_a_stream_has_a_chunk_for_every_token_and_the_same_text(client):
    ask = {"model": "tiny", "prompt": PROMPTS[1], "max_tokens": 20, **GREEDY}
    whole = client.completions.create(**ask)
    # guidellm sends a field of stream_options that the SDK does not know
    options = {"include_usage": True, "continuous_usage_stats": True, "unheard_of": 1}
    chunks = list(client.completions.create(**ask, stream=True, stream_options=options))
    assert len(chunks) == 21
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 19 + ["length"]
    assert [c.usage.completion_tokens for c in chunks[:-1]] == list(range(1, 21))
    assert chunks[-1].choices == []
    assert counted(chunks[-1].usage) == counted(whole.usage)


def test_logprobs_are_those_of_transformers(client, llama_reference, tokenizer):
    prompt = PROMPTS[2]
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=6, logprobs=3, **GREEDY
    )
    tokens = reference_greedy(llama_reference, prompt, 6)
    expected = reference_logprobs(llama_reference, prompt + tokens)[len(prompt) - 1 :]
    report = answer.choices[0].logprobs
    text = answer.choices[0].text
    assert "".join(report.tokens) == text == text_of(tokenizer, tokens)
    for i, token in enumerate(tokens):
        assert text[report.text_offset[i] :].startswith(report.tokens[i])
        assert report.token_logprobs[i] == pytest.approx(expected[i, token], abs=1e-4)
        if i == 5:  # the last one says what is left of broken characters too
            break
        assert report.tokens[i] == told(tokenizer, tokens[:i], token)
        best: dict[str, float] = {}
        for other in np.argsort(-expected[i])[:3]:  # tokens that look alike count once
            best.setdefault(told(tokenizer, tokens[:i], other), expected[i, other])
        assert report.top_logprobs[i] == pytest.approx(best, abs=1e-4)


def test_lm_eval_loglikelihoods_are_those_of_transformers(client, llama_reference):
    """What lm-eval's local-completions sends and reads."""
    answer = client.completions.create(
        model="tiny", prompt=PROMPTS, max_tokens=1, temperature=0, echo=True, logprobs=1
    )
    for prompt, choice in zip(PROMPTS, answer.choices, strict=True):
        report = choice.logprobs
        assert len(report.tokens) == len(prompt) + 1
        assert report.token_logprobs[0] is None and report.top_logprobs[0] is None
        expected = reference_logprobs(llama_reference, prompt)
        for i, token in enumerate(prompt[1:]):
            value, top = report.token_logprobs[i + 1], report.top_logprobs[i + 1]
            assert value == pytest.approx(expected[i, token], abs=1e-4)
            assert (value == max(top.values())) == (expected[i].argmax() == token)


def test_echo_without_tokens_is_the_prompt(client):
    answer = client.completions.create(model="tiny", prompt="abc", max_tokens=0, echo=True)
    assert answer.choices[0].text == "abc"
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_draws_are_those_of_the_python_api(client, llm, tokenizer, stream):
    params = SamplingParams(
        max_tokens=15, temperature=1.0, top_p=0.9, seed=7, n=3, presence_penalty=0.5
    )
    expected = [output.text for output in llm.generate([PROMPTS[0]], params)[0].outputs]
    answer = client.completions.create(
        model="tiny",
        prompt=PROMPTS[0],
        max_tokens=15,
        temperature=1.0,
        top_p=0.9,
        seed=7,
        n=3,
        presence_penalty=0.5,
        stream=stream,
    )
    texts = [""] * 3
    for choice in (c for part in (answer if stream else [answer]) for c in part.choices):
        texts[choice.index] += choice.text
    assert texts == expected
    assert len(set(texts)) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_output_before_it(client, stream):
    ask = {"model": "tiny", "prompt": PROMPTS[1], "max_tokens": 60, **GREEDY}
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[20:23]
    answer = client.completions.create(**ask, stop=["never said", stop], stream=stream)
    choices = [c for part in (answer if stream else [answer]) for c in part.choices]
    assert "".join(c.text for c in choices) == whole[: whole.index(stop)]
    assert (choices[-1].finish_reason, choices[-1].stop_reason) == ("stop", stop)


def test_an_adapter_answers_by_its_name(client, adapter, llama, tokenizer):
    reference = load_with_adapter(llama, adapter)
    answer = client.completions.create(model="random", prompt=PROMPTS[0], max_tokens=10, **GREEDY)
    expected = reference_greedy(reference, PROMPTS[0], 10)
    assert answer.choices[0].text == text_of(tokenizer, expected)
    assert answer.model == "random"
    base = client.completions.create(model="tiny", prompt=PROMPTS[0], max_tokens=10, **GREEDY)
    assert base.choices[0].text != answer.choices[0].text


def test_models_are_listed(client, adapter):
    assert [model.id for model in client.models.list()][:2] == ["tiny", "random"]
    described = client.models.retrieve("random").model_dump()
    assert (described["parent"], described["root"]) == ("tiny", str(adapter))
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("absent")
    assert error.value.code == "model_not_found"


SHOWN = "{% for message in messages %} {{ message.content }}{% endfor %}"
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


def test_chat_goes_through_the_template(client, tokenizer, llama_reference):
    prompt = tokenizer.encode(
        "<system>be brief\n<user>hello\n<assistant>", add_special_tokens=False
    )
    expected = reference_greedy(llama_reference, prompt, 9)
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_completion_tokens=9,
        logprobs=True,
        top_logprobs=2,
        **GREEDY,
    )
    choice = answer.choices[0]
    assert choice.message.content == text_of(tokenizer, expected)
    assert choice.message.role == "assistant"
    assert answer.usage.prompt_tokens == len(prompt)
    logprobs = reference_logprobs(llama_reference, prompt + expected)[len(prompt) - 1 :]
    assert len(choice.logprobs.content) == 9
    data = bytes(byte for entry in choice.logprobs.content for byte in entry.bytes)
    assert data.decode(errors="replace") == choice.message.content
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    for i, entry in enumerate(choice.logprobs.content):
        assert len(entry.bytes) == 1  # of the token itself, be it half a character
        assert entry.logprob == pytest.approx(logprobs[i, expected[i]], abs=1e-4)
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy: its own is the best


@pytest.mark.parametrize(
    "fields",
    [
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True},
    ],
)
def test_what_follows_the_last_message_is_as_asked(
    server, client, tokenizer, llm, monkeypatch, fields
):
    """In chats, in /tokenize and in the Python API as transformers has it."""
    messages = [*MESSAGES, {"role": "assistant", "content": "I am"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, **fields)
    body = {"model": "tiny", "messages": messages, **fields}
    told = json.loads(server.post("/tokenize", json.dumps(body).encode())[2])
    assert tokenizer.decode(told["tokens"]) == text
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=1, extra_body=fields
    )
    assert answer.usage.prompt_tokens == told["count"]
    monkeypatch.setattr(llm, "template", ChatTemplate(tokenizer))
    (output,) = llm.chat(messages, SamplingParams(max_tokens=1), **fields)
    assert output.prompt_token_ids == told["tokens"]


def test_templates_are_not_rendered_on_the_event_loop(tokenizer, monkeypatch):
    codec, threads = TextCodec(tokenizer), []
    render = codec.template.render

    def watched(*args, **options):
        threads.append(threading.current_thread())
        return render(*args, **options)

    monkeypatch.setattr(codec.template, "render", watched)
    assert asyncio.run(codec.render(MESSAGES)).endswith("<assistant>")
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


def test_a_template_of_a_client_where_it_is_trusted(tokenizer):
    body = {"messages": MESSAGES, "chat_template": "{{ messages | length }}" + SHOWN}

    def render(trusted):
        server = SimpleNamespace(trust_request_chat_template=trusted)
        config = SimpleNamespace(server=server, scheduler=SimpleNamespace(slo_classes={}))
        unused: Any = None
        codec = TextCodec(tokenizer)
        engines = cast(Any, SimpleNamespace(info=SimpleNamespace(max_model_len=160)))
        inference = Inference(cast(Any, config), engines, codec, unused, unused, unused)
        return asyncio.run(inference.render(TokenizeRequest.model_validate(body), None))

    assert render(True) == "2 be brief hello"
    with pytest.raises(ApiError, match=r"server\.trust_request_chat_template"):
        render(False)


def test_a_stop_token_is_named(client, llama_reference):
    token = reference_greedy(llama_reference, PROMPTS[0], 6)[5]
    ask = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 20, "temperature": 0}
    choice = client.completions.create(**ask, extra_body={"stop_token_ids": [token]}).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", token)


def test_chat_streams_a_role_then_a_chunk_for_every_token(client):
    ask = {"model": "tiny", "messages": MESSAGES, "max_tokens": 9, **GREEDY}
    whole = client.chat.completions.create(**ask)
    chunks = list(
        client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) == 1 + 9 + 1
    text = "".join(c.choices[0].delta.content for c in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length"
    assert counted(chunks[-1].usage) == counted(whole.usage)


def test_tokens_and_back(server, tokenizer):
    status, _, body = server.post("/tokenize", json.dumps({"prompt": "Grüße"}).encode())
    assert (status, json.loads(body)["tokens"]) == (200, tokenizer.encode("Grüße"))
    tokens = json.dumps({"tokens": tokenizer.encode("Grüße")}).encode()
    status, _, body = server.post("/detokenize", tokens)
    assert (status, json.loads(body)) == (200, {"prompt": "Grüße"})


def test_clients_that_go_leave_nothing_behind(server, client):
    """Streams and waiting answers are cancelled; pages are free again."""
    ask = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 150, **GREEDY}
    ended = server.metric("vllm:request_success_total")
    for _ in range(3):
        with client.completions.create(**ask, stream=True) as stream:
            next(iter(stream))
    impatient = server.client(timeout=0.3)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(**ask, n=6)
    server.wait(lambda: server.metric("vllm:request_success_total") == ended + 9)
    assert server.metric('vllm:request_success_total{finished_reason="abort",model_name="tiny"}')
    server.wait(lambda: server.metric("vllm:num_requests_running") == 0)
    assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_too_many_requests_are_told_to_come_back(server, client):
    ask = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 100, **GREEDY}
    results = []
    barrier = threading.Barrier(40)

    def send(_):
        barrier.wait()
        try:
            return client.completions.create(**ask)
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(40) as pool:
        results = list(pool.map(send, range(40)))
    refused = [r for r in results if isinstance(r, openai.RateLimitError)]
    served = [r for r in results if not isinstance(r, openai.RateLimitError)]
    assert len(served) >= 24 and refused
    assert all(int(r.response.headers["Retry-After"]) >= 1 for r in refused)
    assert {r.choices[0].text for r in served} == {served[0].choices[0].text}
