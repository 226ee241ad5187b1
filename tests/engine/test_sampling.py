"""Sampling against transformers' own logits processors, and everything that ends an output."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flexllm_jax import SamplingParams
from scheduler.latency.model import Sampling
from tests.engines import (
    random_prompts,
    reference_greedy,
    reference_logits,
    reference_logprobs,
)

PROMPT = random_prompts([23], seed=7)[0]


@pytest.fixture(scope="module")
def logits(llama_reference):
    """What follows PROMPT."""
    return reference_logits(llama_reference, PROMPT)[-1]


class TestDraws:
    """Frequencies of many draws of one token are the probabilities that transformers leaves."""

    DRAWS = 600

    @pytest.mark.parametrize(
        ("fields", "warpers"),
        [
            ({"temperature": 1.0}, [TemperatureLogitsWarper(1.0)]),
            ({"temperature": 0.4}, [TemperatureLogitsWarper(0.4)]),
            ({"top_k": 5}, [TopKLogitsWarper(5)]),
            ({"top_p": 0.3}, [TopPLogitsWarper(0.3)]),
            ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
            (
                {"temperature": 0.6, "min_p": 0.05, "top_k": 12, "top_p": 0.7},
                [
                    TemperatureLogitsWarper(0.6),
                    MinPLogitsWarper(0.05),
                    TopKLogitsWarper(12),
                    TopPLogitsWarper(0.7),
                ],
            ),
        ],
        ids=["plain", "temperature", "top-k", "top-p", "min-p", "all"],
    )
    def test_frequencies(self, llm, logits, fields, warpers):
        processors: Any = LogitsProcessorList(warpers)
        left = processors(torch.tensor([PROMPT]), torch.tensor(logits[None], dtype=torch.float32))
        expected = torch.softmax(left[0].double(), -1).numpy()
        params = SamplingParams(
            **({"temperature": 1.0} | fields), max_tokens=1, seed=11, n=self.DRAWS
        )
        (output,) = llm.generate(PROMPT, params)
        drawn = np.array([o.token_ids[0] for o in output.outputs])
        assert not (set(drawn) - set(np.flatnonzero(expected))), "a token that was filtered out"
        counts = np.bincount(drawn, minlength=len(expected))
        likely = expected * self.DRAWS >= 5  # Pearson's rule; the rest is one bin
        bins = [*zip(counts[likely], expected[likely] * self.DRAWS, strict=True)]
        rest = expected[~likely].sum() * self.DRAWS
        if rest >= 5:
            bins.append((counts[~likely].sum(), rest))
        chi2 = sum((seen - mean) ** 2 / mean for seen, mean in bins)
        freedom = len(bins) - 1
        assert freedom >= 1
        assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 4

    @pytest.mark.parametrize(
        "fields", [{}, {"temperature": 1.0}, {"temperature": 0.9, "top_p": 0.8}], ids=str
    )
    def test_seeds_make_outputs_reproducible_whatever_else_runs(self, llm, fields):
        """Beside requests that need more than it does, too, in steps of another size."""
        seeded = SamplingParams(max_tokens=25, seed=3, ignore_eos=True, **fields)
        (alone,) = llm.generate(PROMPT, seeded)
        others = random_prompts([60, 8, 31, 90, 17, 5], seed=8)
        free = [
            SamplingParams(max_tokens=30, temperature=1.0),
            SamplingParams(max_tokens=30, temperature=1.0, top_k=5, top_p=0.5, min_p=0.1),
            SamplingParams(max_tokens=30, repetition_penalty=1.5, logprobs=2),
        ]
        crowd = llm.generate([*others, PROMPT], [*free, *free, seeded])
        assert crowd[-1].token_ids == alone.token_ids
        if fields:
            other = SamplingParams(max_tokens=25, seed=4, ignore_eos=True, **fields)
            assert llm.generate(PROMPT, other)[0].token_ids != alone.token_ids

    def test_without_a_seed_draws_differ(self, llm):
        params = SamplingParams(max_tokens=12, temperature=1.0, n=2, ignore_eos=True)
        (output,) = llm.generate(PROMPT, params)
        first, second = output.outputs
        assert first.token_ids != second.token_ids

    def test_several_outputs_of_a_prompt_have_seeds_of_their_own(self, llm):
        params = SamplingParams(max_tokens=12, temperature=1.0, seed=40, n=3, ignore_eos=True)
        (output,) = llm.generate(PROMPT, params)
        assert len({tuple(o.token_ids) for o in output.outputs}) == 3
        for i, one in enumerate(output.outputs):
            single = SamplingParams(max_tokens=12, temperature=1.0, seed=40 + i, ignore_eos=True)
            assert llm.generate(PROMPT, single)[0].token_ids == one.token_ids


@pytest.mark.parametrize(
    ("params", "sampling", "logprobs"),
    [
        (SamplingParams(), Sampling.GREEDY, False),
        (SamplingParams(logprobs=0), Sampling.GREEDY, True),
        (SamplingParams(top_p=0.5, top_k=3), Sampling.GREEDY, False),
        (SamplingParams(presence_penalty=0.1), Sampling.ADJUSTED, False),
        (SamplingParams(min_tokens=3), Sampling.ADJUSTED, False),
        (SamplingParams(temperature=0.1), Sampling.DRAWN, False),
        (SamplingParams(temperature=0.1, repetition_penalty=1.1), Sampling.DRAWN, False),
        (SamplingParams(temperature=0.1, top_k=3, logprobs=2), Sampling.FILTERED, True),
        (SamplingParams(temperature=0.1, top_p=0.5), Sampling.FILTERED, False),
        (SamplingParams(temperature=0.1, min_p=0.5), Sampling.FILTERED, False),
    ],
)
def test_the_latency_model_is_told_what_a_request_needs(llm, params, sampling, logprobs):
    llm.generate(PROMPT, params)
    features, _, _ = llm.engine.scheduler.latency.recent[-1]
    assert (features.sampling, features.logprobs) == (sampling, logprobs)


def penalized_greedy(model, prompt, count, repetition=1.0, presence=0.0, frequency=0.0, banned=()):
    """Greedy decoding, penalties by transformers and by OpenAI's formula, one token at a time.

    `banned`: tokens that cannot come before output token `banned[1]`.
    """
    processor: Any = RepetitionPenaltyLogitsProcessor(repetition)
    output: list[int] = []
    for index in range(count):
        tokens = [*prompt, *output]
        logits = torch.tensor(reference_logits(model, tokens)[-1])
        logits = processor(torch.tensor([tokens]), logits[None])[0]
        counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=len(logits))
        logits = logits - frequency * counts - presence * (counts > 0)
        if banned and index < banned[1]:
            logits[list(banned[0])] = -torch.inf
        output.append(int(logits.argmax()))
    return output


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.8},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    ],
    ids=str,
)
def test_penalties(llm, llama_reference, penalties):
    prompts = [PROMPT, *random_prompts([11, 70], seed=2)]
    params = SamplingParams(max_tokens=20, ignore_eos=True, **penalties)
    short = {name.split("_")[0]: value for name, value in penalties.items()}
    outputs = llm.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == penalized_greedy(llama_reference, prompt, 20, **short)
    assert outputs[0].token_ids != reference_greedy(llama_reference, PROMPT, 20)


@pytest.fixture(scope="module")
def greedy(llama_reference):
    return reference_greedy(llama_reference, PROMPT, 30)


@pytest.fixture(scope="module")
def text(llm, llama_reference):
    """A prompt, its greedy output, a piece of plain text within that, and where it starts."""
    for prompt in random_prompts([12] * 40, seed=3):
        tokens = reference_greedy(llama_reference, prompt, 30)
        pieces = [llm.tokenizer.decode([t]) for t in tokens]
        for i in range(3, 27):
            stop = "".join(pieces[i : i + 2])
            whole = llm.tokenizer.decode(tokens, skip_special_tokens=True)
            if stop.isascii() and stop.isprintable() and whole.count(stop) == 1:
                return prompt, tokens, stop, i
    raise AssertionError("no prompt has plain text in its output")


class TestEnds:
    def test_max_tokens(self, llm, greedy):
        for count in (1, 2, 17):
            (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=count, ignore_eos=True))
            assert output.token_ids == greedy[:count]
            assert output.finish_reason == "length"

    def test_stop_token_ids(self, llm, greedy):
        token = greedy[9]
        at = greedy.index(token)
        (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=30, stop_token_ids=(token,)))
        assert output.token_ids == greedy[: at + 1]
        assert output.finish_reason == "stop"
        assert output.text == llm.tokenizer.decode(greedy[:at], skip_special_tokens=True)

    def test_text_that_ends_an_output_is_in_it_if_asked_for(self, llm, text):
        prompt, tokens, stop, at = text
        fields = {"max_tokens": 30, "ignore_eos": True, "include_stop_str_in_output": True}
        by_string = llm.generate([prompt], SamplingParams(**fields, stop=stop))[0]
        assert by_string.text == llm.tokenizer.decode(tokens[: at + 2], skip_special_tokens=True)
        token = tokens[at]
        by_token = llm.generate([prompt], SamplingParams(**fields, stop_token_ids=(token,)))[0]
        ended = tokens[: tokens.index(token) + 1]
        assert by_token.token_ids == ended
        assert by_token.text == llm.tokenizer.decode(ended, skip_special_tokens=True)

    def test_min_tokens_holds_stop_tokens_back(self, llm, greedy, llama_reference):
        stops = (greedy[2], greedy[4])
        eos = 2
        params = SamplingParams(max_tokens=30, min_tokens=8, stop_token_ids=stops)
        (output,) = llm.generate(PROMPT, params)
        expected = penalized_greedy(llama_reference, PROMPT, 30, banned=((*stops, eos), 8))
        end = next((i + 1 for i, t in enumerate(expected) if t in stops and i >= 8), 30)
        assert output.token_ids == expected[:end]
        assert output.token_ids[:3] != greedy[:3]

    def test_stop_strings_span_tokens_and_are_left_out(self, llm, text):
        prompt, tokens, stop, at = text
        params = SamplingParams(max_tokens=30, ignore_eos=True, stop=("never this", stop))
        (output,) = llm.generate([prompt], params)
        assert output.token_ids == tokens[: at + 2]
        assert output.finish_reason == "stop"
        assert output.text == llm.tokenizer.decode(tokens[:at], skip_special_tokens=True)

    def test_stop_strings_wait_for_min_tokens(self, llm, text):
        prompt, tokens, stop, _ = text
        params = SamplingParams(max_tokens=30, min_tokens=30, ignore_eos=True, stop=stop)
        (output,) = llm.generate([prompt], params)
        assert output.token_ids == tokens
        assert output.finish_reason == "length"

    def test_end_of_sequence_ends_unless_ignored(self, llm):
        eos = 2
        fields = {"max_tokens": 30, "temperature": 2.0, "seed": 100, "n": 40}
        (ignoring,) = llm.generate(PROMPT, SamplingParams(**fields, ignore_eos=True))
        (ending,) = llm.generate(PROMPT, SamplingParams(**fields))
        ended = 0
        for long, short in zip(ignoring.outputs, ending.outputs, strict=True):
            assert len(long.token_ids) == 30
            if eos in long.token_ids:
                ended += 1
                at = long.token_ids.index(eos)
                assert short.token_ids == long.token_ids[: at + 1]
                assert short.finish_reason == "stop"
                assert short.text == llm.tokenizer.decode(short.token_ids[:at])
            else:
                assert short.token_ids == long.token_ids
        assert ended, "no output had an end: nothing is shown"


class TestLogprobs:
    def test_of_the_output(self, llm, llama_reference):
        params = SamplingParams(max_tokens=20, temperature=0.9, seed=1, logprobs=4, ignore_eos=True)
        (output,) = llm.generate(PROMPT, params)
        expected = reference_logprobs(llama_reference, PROMPT + output.token_ids)
        assert output.logprobs is not None
        assert len(output.logprobs) == 20
        for i, (token, logprobs) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            own = expected[len(PROMPT) - 1 + i]
            assert set(logprobs) == {token, *np.argsort(-own)[:4].tolist()}
            for other, value in logprobs.items():
                assert value == pytest.approx(own[other], abs=1e-4)

    def test_none_are_given_unasked(self, llm):
        (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=2))
        assert output.logprobs is None
        assert output.prompt_logprobs is None
