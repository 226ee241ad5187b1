"""vLLM's fields for clients that think in tokens: ids in and out, cut prompts, what was likely in a
prompt; against transformers."""

import json
import math

import openai
import pytest

from tests.engines import random_prompts, reference_greedy, reference_logprobs
from tests.server.running import KEY

PROMPT = random_prompts([17])[0]
MESSAGES = [{"role": "user", "content": "Who are you?"}]


def complete(client, extra, prompt=PROMPT, **fields):
    ask = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 0}
    return client.completions.create(**ask | fields, extra_body={"ignore_eos": True} | extra)


def chat(client, extra, **fields):
    ask = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    return client.chat.completions.create(**ask | fields, extra_body={"ignore_eos": True} | extra)


def rendered(server):
    body = json.dumps({"messages": MESSAGES}).encode()
    return json.loads(server.post("/tokenize", body)[2])["tokens"]


def test_completions_tell_ids_of_tokens(client, llama_reference):
    expected = reference_greedy(llama_reference, PROMPT, 6)
    choice = complete(client, {"return_token_ids": True}).choices[0]
    assert (choice.prompt_token_ids, choice.token_ids) == (PROMPT, expected)
    chunks = [c.choices[0] for c in complete(client, {"return_token_ids": True}, stream=True)]
    assert [token for chunk in chunks for token in chunk.token_ids] == expected
    assert [getattr(chunk, "prompt_token_ids", None) for chunk in chunks] == [PROMPT] + [None] * 5
    unasked = complete(client, {}).choices[0]
    assert unasked.token_ids is unasked.prompt_token_ids is unasked.prompt_logprobs is None


def test_chats_tell_ids_of_tokens(client, server, llama_reference):
    prompt = rendered(server)
    expected = reference_greedy(llama_reference, prompt, 6)
    answer = chat(client, {"return_token_ids": True})
    assert (answer.prompt_token_ids, answer.choices[0].token_ids) == (prompt, expected)
    chunks = list(chat(client, {"return_token_ids": True}, stream=True))
    assert chunks[0].prompt_token_ids == prompt
    assert [chunk.choices[0].token_ids for chunk in chunks[1:]] == [[t] for t in expected]


def test_tokens_are_named_by_their_ids(client, llama_reference):
    expected = reference_greedy(llama_reference, PROMPT, 6)
    names = [f"token_id:{token}" for token in expected]
    extra = {"return_tokens_as_token_ids": True}
    report = complete(client, extra, logprobs=2).choices[0].logprobs
    assert report.tokens == names
    assert all(name in top for name, top in zip(names, report.top_logprobs, strict=True))
    content = chat(client, extra, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert all(entry.token == entry.top_logprobs[0].token for entry in content)
    assert all(entry.token.startswith("token_id:") for entry in content)


def test_without_alternatives_the_chosen_token_is_listed(client):
    report = complete(client, {}, logprobs=0).choices[0].logprobs
    pairs = zip(report.tokens, report.token_logprobs, strict=True)
    assert report.top_logprobs == [{token: value} for token, value in pairs]


@pytest.mark.parametrize("count", [0, 2])
def test_what_was_likely_in_a_prompt(client, server, llama_reference, count):
    for prompt, told in (
        (PROMPT, complete(client, {"prompt_logprobs": count}).choices[0].prompt_logprobs),
        (rendered(server), chat(client, {"prompt_logprobs": count}).prompt_logprobs),
    ):
        expected = reference_logprobs(llama_reference, prompt)
        assert told[0] is None and len(told) == len(prompt)
        for at, (token, table) in enumerate(zip(prompt[1:], told[1:], strict=True)):
            ranked = expected[at].argsort()[::-1].tolist()
            assert set(table) == {str(t) for t in [*ranked[:count], token]}
            for name, entry in table.items():
                assert entry["logprob"] == pytest.approx(expected[at, int(name)], abs=1e-4)
                rank = ranked.index(int(name)) + 1
                assert entry["rank"] == (rank if rank <= count else None)
                assert isinstance(entry["decoded_token"], str)
            assert math.fsum(math.exp(e["logprob"]) for e in table.values()) <= 1 + 1e-5
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs: is not told in a stream"):
        complete(client, {"prompt_logprobs": 1}, stream=True)


def test_of_a_prompt_that_is_cut_the_end_is_kept(client, tokenizer, llama_reference):
    extra = {"truncate_prompt_tokens": 5, "return_token_ids": True}
    choice = complete(client, extra).choices[0]
    assert choice.prompt_token_ids == PROMPT[-5:]
    cut = complete(client, extra | {"truncation_side": "right"}).choices[0]
    assert cut.prompt_token_ids == PROMPT[:5]
    assert choice.token_ids == reference_greedy(llama_reference, PROMPT[-5:], 6)
    text = "words " * 400  # more than fit
    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        complete(client, {}, prompt=text)
    choice = complete(client, extra, prompt=text, echo=True).choices[0]
    assert choice.prompt_token_ids == tokenizer.encode(text)[-5:]
    assert choice.text.startswith(tokenizer.decode(tokenizer.encode(text)[-5:]))


def test_special_tokens_are_told_if_asked_for(client, tokenizer):
    begin = tokenizer.bos_token_id
    extra = {"structured_outputs": {"grammar": f"start: <[{begin}]> <[{begin}]>"}}
    assert complete(client, extra, max_tokens=2).choices[0].text == ""
    shown = complete(client, extra | {"skip_special_tokens": False}, max_tokens=2).choices[0].text
    assert shown == 2 * tokenizer.bos_token


def test_running_usage_needs_the_usage_and_a_role_is_no_token(client):
    def usages(**options):
        chunks = chat(client, {}, stream=True, stream_options=options)
        return [c.usage and c.usage.completion_tokens for c in chunks]

    assert usages(include_usage=True, continuous_usage_stats=True) == [0, 1, 2, 3, 4, 5, 6, 6]
    assert usages(include_usage=False, continuous_usage_stats=True) == [None] * 7
    with pytest.raises(openai.BadRequestError, match="stream_options: needs stream=true"):
        chat(client, {}, stream_options={"include_usage": True})


def test_a_grammar_in_ebnf(client):
    def answer(grammar):
        extra = {"structured_outputs": {"grammar": grammar}, "ignore_eos": False}
        return complete(client, extra, temperature=1, seed=1).choices[0].text

    assert answer('root ::= "yes" | no-word\nno-word ::= "no" [!?]') in ("yes", "no!", "no?")
    with pytest.raises(openai.BadRequestError, match="structured_outputs: Rule 'other' not found"):
        answer("root ::= other")
    with pytest.raises(openai.BadRequestError, match="write it in Lark's syntax"):
        answer("root ::= " + '"a" ' * 3000)


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "(yes|no)"},
        {"ebnf": 'root ::= "yes" | "no"'},
        {"json_schema": '{"const": "yes"}'},
    ],
)
def test_structures_by_sglangs_names(client, fields):
    text = complete(client, fields | {"ignore_eos": False}, max_tokens=12).choices[0].text
    assert text.strip('"') in ("yes", "no")
    with pytest.raises(openai.BadRequestError, match="exactly one of"):
        complete(client, fields | {"structured_outputs": {"choice": ["yes"]}})


def test_fields_of_several_types_name_them_all(server):
    def refused(**fields):
        body = json.dumps({"model": "tiny", "prompt": "a"} | fields).encode()
        status, _, answer = server.post("/v1/completions", body)
        assert status == 400
        return json.loads(answer)["error"]["message"]

    one = refused(prompt={"a": 1})
    assert one == "prompt: got {'a': 1}; must be a valid string, or must be a valid list"
    assert refused(stop=["a", 5]).startswith("stop: got ['a', 5]; must be a valid string, or 1 ")
    missing = refused(response_format={})
    assert missing == "response_format.type: got {}; Field required"


def test_an_answer_may_begin_with_the_message_it_continues(client):
    said = {"role": "assistant", "content": [{"type": "text", "text": "I am"}]}
    ask, more = {"messages": [*MESSAGES, said]}, {"continue_final_message": True}
    own = chat(client, more, **ask).choices[0].message.content
    assert chat(client, more | {"echo": True}, **ask).choices[0].message.content == "I am" + own
    chunks = list(chat(client, more | {"echo": True}, **ask, stream=True))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "I am" + own
    users = [chat(client, {"echo": echo}).choices[0].message.content for echo in (False, True)]
    assert users[0] == users[1]


@pytest.mark.parametrize(
    ("path", "asked"),
    [("/v1/completions", {"prompt": PROMPT}), ("/v1/chat/completions", {"messages": MESSAGES})],
)
def test_invocations_are_both_and_a_model_need_not_be_named(server, path, asked):
    def post(to, **fields):
        body = {"max_tokens": 6, "temperature": 0, **asked, **fields}
        status, _, answer = server.post(to, json.dumps(body).encode())
        return status, json.loads(answer)

    status, named = post(path, model="tiny")
    (_, unnamed), (_, invoked) = post(path), post("/invocations")
    told = [
        (a["object"], a["model"], a["usage"]["prompt_tokens"]) for a in (named, unnamed, invoked)
    ]
    assert (status, told) == (200, told[:1] * 3)
    assert named["choices"] == unnamed["choices"] == invoked["choices"]
    assert post("/invocations", n=0) == post(path, n=0)
    assert post("/invocations", n=0)[0] == 400


def test_an_id_of_a_request_is_kept(server):
    given = {"X-Request-Id": "trace-1/a"}
    assert server.post("/detokenize", b'{"tokens": []}', **given)[1]["x-request-id"] == "trace-1/a"
    for odd in ("a b", "x" * 200):
        headers = {"Authorization": f"Bearer {KEY}", "X-Request-Id": odd}
        assert (
            len(server.post("/detokenize", b'{"tokens": []}', **headers)[1]["x-request-id"]) == 32
        )


def test_biases_allowed_tokens_and_bad_words_reach_the_model(client, tokenizer):
    def drawn(**extra):
        text = complete(client, extra, temperature=1.0, seed=4, max_tokens=12).choices[0].text
        return set(text)

    (a,), (b,) = (tokenizer.encode(x, add_special_tokens=False) for x in "ab")
    assert drawn(allowed_token_ids=[a, b]) == {"a", "b"}
    assert drawn(allowed_token_ids=[a, b], bad_words=["a"]) == {"b"}
    assert drawn(allowed_token_ids=[a, b], logit_bias={str(a): 100}) == {"a"}
    both = {"structured_outputs": {"regex": "[abc]{12}"}, "allowed_token_ids": [a, b, 2]}
    assert drawn(**both, ignore_eos=False) == {"a", "b"}


def test_log_probabilities_of_named_tokens(client, tokenizer):
    ask = {"logprob_token_ids": [100, 50], "allowed_token_ids": [42]}
    ask |= {"return_tokens_as_token_ids": True}
    (first, *_) = chat(client, ask, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert first.token == "token_id:42"
    assert {e.token for e in first.top_logprobs} == {"token_id:100", "token_id:50", "token_id:42"}
    told = complete(client, ask, logprobs=0, max_tokens=1).choices[0].logprobs
    assert set(told.top_logprobs[0]) == {"token_id:100", "token_id:50", "token_id:42"}
    plain = {"allowed_token_ids": [42], "logprobs_at_temperature": True}
    cold, warm = (
        complete(client, plain, logprobs=0, max_tokens=1, temperature=t).choices[0].logprobs
        for t in (1, 1000)
    )
    assert warm.token_logprobs[0] == pytest.approx(-math.log(272), abs=0.05)
    assert abs(cold.token_logprobs[0] + math.log(272)) > 0.2


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"logit_bias": {"x1": 5, "x2": 2}}, "logit_bias: .*'x1', 'x2' must be token ids"),
        ({"logit_bias": {"1": "a"}}, "logit_bias.1: got 'a'; must be a valid number"),
        ({"logit_bias": {"272": 1}}, "logit_bias: token id 272 is outside of the voc.* of 272"),
        ({"allowed_token_ids": [999]}, "allowed_token_ids: token id 999 is outside"),
        ({"logprob_token_ids": [3]}, "logprob_token_ids=.* must be beside logprobs"),
        ({"bad_words": [""]}, "bad_words.0: got ''"),
    ],
    ids=str,
)
def test_fields_of_tokens_are_checked(client, extra, reason):
    with pytest.raises(openai.BadRequestError, match=reason) as refused:
        complete(client, extra)
    assert refused.value.param == next(iter(extra))


def test_seeds_of_64_bits(client):
    texts = {
        complete(client, {}, temperature=1.0, seed=seed).choices[0].text
        for seed in (1, 1 + 2**31, 1 + 2**32, 2**63 - 1)
    }
    assert len(texts) == 4


def test_drafts_change_nothing_but_when_tokens_come(thinking_client, thinking_server):
    """Several tokens of a step arrive at once; a stop string among them ends the text there."""
    prompt = (PROMPT * 4)[:50]
    for extra in (
        {"model": "thinker", "max_tokens": 60},
        {"model": "thinker", "max_tokens": 60, "stop": "a", "logprobs": 1},
    ):
        before = accepted(thinking_server)
        told = []
        for tried in (8, 0):
            more = {"return_token_ids": True, "num_speculative_tokens": tried}
            choice = complete(thinking_client, more, prompt, **extra).choices[0]
            chunks = complete(thinking_client, more, prompt, stream=True, **extra)
            streamed = [c.choices[0] for c in chunks if c.choices]
            assert "".join(c.text for c in streamed) == choice.text
            assert [t for c in streamed for t in c.token_ids] == choice.token_ids
            told.append((choice.text, choice.token_ids, choice.finish_reason))
        assert told[0] == told[1]
        if "stop" not in extra:
            thinking_server.wait(lambda b=before: accepted(thinking_server) > b)
            assert accepted(thinking_server) <= thinking_server.metric(
                "vllm:spec_decode_num_draft_tokens_total"
            )
    with pytest.raises(openai.BadRequestError, match="num_speculative_tokens"):
        complete(thinking_client, {"num_speculative_tokens": 17}, model="thinker")


def accepted(server):
    return server.metric("vllm:spec_decode_num_accepted_tokens_total")
