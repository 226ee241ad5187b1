"""What requests say of tokens: biases, tokens that may come alone, words that may not, all of them
beside structures; against transformers' logits, and against what vLLM means by the names."""

import numpy as np
import pytest

from flexllm_jax import SamplingParams, StructuredOutputsParams
from tests.engines import random_prompts, reference_greedy, reference_logits, reference_logprobs

PROMPT = random_prompts([19], seed=21)[0]


def greedy(model, prompt, count, change):
    """Greedy tokens of logits that `change` has changed, given the output so far."""
    output: list[int] = []
    for _ in range(count):
        logits = reference_logits(model, [*prompt, *output])[-1]
        output.append(int(change(logits, output).argmax()))
    return output


def ask(llm, prompt=PROMPT, count=16, **fields):
    params = SamplingParams(**{"max_tokens": count, "ignore_eos": True} | fields)
    return llm.generate([prompt], params)[0]


def test_biases_are_added_to_logits(llm, llama_reference):
    free = reference_greedy(llama_reference, PROMPT, 16)
    least = int(reference_logits(llama_reference, PROMPT)[-1].argmin())
    biases = {free[0]: -100.0, free[3]: -2.5, least: 3.0, 7: 1.5}

    def change(logits, output):
        logits[list(biases)] += list(biases.values())
        return logits

    expected = greedy(llama_reference, PROMPT, 16, change)
    assert ask(llm, logit_bias=biases).token_ids == expected != free
    # Rows are used again: nothing of it stays, and others beside it have nothing of it.
    both = [SamplingParams(max_tokens=16, ignore_eos=True, logit_bias=b) for b in (biases, {})]
    outputs = llm.generate([PROMPT, PROMPT], both)
    assert [o.token_ids for o in outputs] == [expected, free]
    cold = SamplingParams(max_tokens=16, ignore_eos=True, temperature=1e-4)
    assert all(o.token_ids == free for o in llm.generate([PROMPT] * 6, cold))


def test_a_bias_of_100_leaves_its_token_alone_and_draws_heed_it(llm):
    biases = dict.fromkeys(range(3, 200), -100.0) | {88: 100.0, 99: 100.0}
    drawn = ask(llm, count=40, temperature=1.0, seed=5, logit_bias=biases).token_ids
    assert set(drawn) == {88, 99}


def test_allowed_tokens_alone_come(llm, llama_reference):
    allowed = [5, 40, 41, 90, 150, 271]

    def change(logits, output):
        masked = np.full_like(logits, -np.inf)
        masked[allowed] = logits[allowed]
        return masked

    expected = greedy(llama_reference, PROMPT, 16, change)
    assert ask(llm, allowed_token_ids=allowed).token_ids == expected
    drawn = ask(llm, count=60, temperature=5.0, seed=1, allowed_token_ids=allowed).token_ids
    assert set(drawn) == set(allowed)


def test_bad_words_do_not_come(llm, llama_reference):
    """One of a single token, and one of several, whose beginning may still come."""
    free = reference_greedy(llama_reference, PROMPT, 24)
    words = []
    for at in range(2, 20):
        pair, single = llm.tokenizer.decode(free[at : at + 2]), llm.tokenizer.decode(free[:1])
        if pair.isascii() and pair.strip() == pair and llm.encode(pair)[-2:] == free[at : at + 2]:
            words = [pair, single]
            break
    assert words, "the output has no two letters: nothing is shown"
    barred = [llm.tokenizer.encode(word, add_special_tokens=False) for word in words]
    barred += [llm.tokenizer.encode(" " + words[1], add_special_tokens=False)]
    barred = [tokens for tokens in barred if len(tokens) <= 2]

    def change(logits, output):
        for *before, last in barred[:2]:
            if output[len(output) - len(before) :] == before:
                logits[last] = -np.inf
        return logits

    expected = greedy(llama_reference, PROMPT, 24, change)
    output = ask(llm, count=24, bad_words=tuple(words))
    assert output.token_ids == expected != free
    assert barred[0][0] in output.token_ids


def test_all_of_it_beside_a_structure(llm):
    compiled = llm.engine.runner.compilations.count  # those of other tests' engines
    text = StructuredOutputsParams(regex="[abc]{8}")
    a, b, c = (llm.tokenizer.encode(x, add_special_tokens=False)[0] for x in "abc")
    fields = {"structured_outputs": text, "ignore_eos": False}
    output = ask(llm, **fields, logit_bias={a: 100.0}, bad_words=("aa",), temperature=1.0, seed=2)
    assert len(output.text) == 8 and "aa" not in output.text and output.text.count("a") == 4
    ends = llm.engine.end_token_ids
    output = ask(llm, **fields, allowed_token_ids=(b, c, *ends), temperature=1.0, seed=3)
    assert set(output.text) == {"b", "c"}
    with pytest.raises(RuntimeError, match="leave no token that may follow"):
        ask(llm, **fields, allowed_token_ids=(60,))
    assert llm.engine.runner.compilations.count == compiled


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"allowed_token_ids": [272]},
            "allowed_token_ids: token id 272 is outside of the voc.* 272",
        ),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: token id -1 is outside"),
        ({"logit_bias": {1: 101.0}}, "logit_bias=.* must be of -100 to 100"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias: it has 301 tokens, at most"),
        ({"logprob_token_ids": [3]}, "must be beside logprobs"),
        ({"bad_words": [" "]}, "bad_words=.* must be words"),
        (
            {"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 2},
            "allowed_token_ids: bad_words and min_tokens leave none of them",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(llm, fields, reason):
    with pytest.raises(ValueError, match=reason):
        ask(llm, **fields)


def test_log_probabilities_of_tokens_that_were_named(llm, llama_reference):
    output = ask(llm, count=5, logprobs=2, logprob_token_ids=(9, 200, 33))
    expected = reference_logprobs(llama_reference, PROMPT + output.token_ids)
    for i, told in enumerate(output.logprobs):
        assert set(told) == {9, 200, 33, output.token_ids[i]}
        own = expected[len(PROMPT) - 1 + i]
        assert list(told.values()) == pytest.approx([own[t] for t in told], abs=1e-4)


def test_log_probabilities_at_the_temperature(llm, llama_reference):
    fields = {"count": 6, "logprobs": 3, "temperature": 0.6, "seed": 9}
    output = ask(llm, **fields, logprobs_at_temperature=True)
    logits = reference_logits(llama_reference, PROMPT + output.token_ids)[len(PROMPT) - 1 :] / 0.6
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for told, own in zip(output.logprobs, expected, strict=False):
        assert list(told.values()) == pytest.approx([own[t] for t in told], abs=1e-4)
    assert ask(llm, **fields).token_ids == output.token_ids


def test_seeds_of_64_bits(llm):
    def drawn(seed):
        return tuple(ask(llm, temperature=1.0, seed=seed).token_ids)

    seeds = [3, 3 + 2**31, 3 + 2**32, 3 + 2**63 - 2**33, -3, -(2**63)]
    assert len({drawn(seed) for seed in seeds}) == len(seeds)
    assert drawn(seeds[2]) == drawn(seeds[2])
