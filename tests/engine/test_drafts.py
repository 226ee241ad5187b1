"""Speculative decoding: drafts of prompt lookup change when tokens come, never which."""

import numpy as np
import pytest

from flexllm_jax import SamplingParams
from flexllm_jax.engine.sampling.structured_outputs import StructuredOutputsParams
from scheduler.latency.model import LatencyModel
from tests.engines import job_config, letter_rows, random_prompts, reference_greedy, write_rows

# What a small random model says soon repeats, and so do these.
PROMPTS = [(random_prompts([n], seed=n)[0] * 4)[:40] for n in (7, 11, 13, 29)]


@pytest.fixture(autouse=True)
def drafts_cost_nothing(llm):
    """By what is predicted, whatever this machine was timed at."""
    scheduler = llm.engine.scheduler
    timed, scheduler.latency = scheduler.latency, LatencyModel({8: 4e-3, 48: 4.1e-3}, online=False)
    yield
    scheduler.latency = timed


def outputs(llm, tried, prompts=PROMPTS, **fields):
    """The outputs with drafts of up to so many tokens, and how many of those tokens came."""
    llm.engine.observations.clear()
    params = SamplingParams(**{"max_tokens": 40, "ignore_eos": True} | fields)
    params = [SamplingParams(**vars(params) | {"num_speculative_tokens": tried}) for _ in prompts]
    results = llm.generate(prompts, params)
    seen = llm.engine.observations
    return results, sum(o.accepted_tokens for o in seen), sum(o.draft_tokens for o in seen)


def ids(results):
    return [output.token_ids for result in results for output in result.outputs]


def test_greedy_text_is_that_of_transformers(llm, llama_reference):
    results, accepted, tried = outputs(llm, 16, PROMPTS[:2])
    assert ids(results) == [reference_greedy(llama_reference, p, 40) for p in PROMPTS[:2]]
    assert 20 <= accepted <= tried
    before = llm.engine.steps
    outputs(llm, 16, PROMPTS[:1])
    assert llm.engine.steps - before < 30  # for 40 tokens
    _, accepted, tried = outputs(llm, 0, PROMPTS[:1])
    assert accepted == tried == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.05, "seed": 3},
        {"temperature": 0.1, "seed": 4, "top_k": 8, "top_p": 0.9, "n": 2, "logprobs": 2},
        {"min_tokens": 12, "ignore_eos": False, "stop_token_ids": tuple(range(60, 75))},
        {"stop": ("e", "a"), "logprobs": 0},
    ],
    ids=["drawn", "filtered", "min_tokens", "stop"],
)
def test_draws_are_the_same_draws(llm, fields):
    """A token depends on its seed and its place alone, so it is the draft's or it is not."""
    with_drafts, _, tried = outputs(llm, 8, PROMPTS[:2], **fields)
    without, _, _ = outputs(llm, 0, PROMPTS[:2], **fields)
    assert ids(with_drafts) == ids(without) and tried
    assert [r.text for r in with_drafts] == [r.text for r in without]
    assert [r.finish_reason for r in with_drafts] == [r.finish_reason for r in without]
    for a, b in zip(with_drafts, without, strict=True):
        for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
            assert x.keys() == y.keys()
            np.testing.assert_allclose([*x.values()], [*y.values()], atol=1e-4)


def test_beside_a_job_preemption_structures_and_the_prefix_cache(llm, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", letter_rows(12))
    alone = llm.finetune(job_config("alone", rows)).wait()
    prompts = [p[:30] for p in (*PROMPTS, PROMPTS[0])]  # more than there are pages for
    expected = ids(outputs(llm, 0, prompts, max_tokens=100)[0])
    beside = llm.finetune(job_config("beside", rows))
    results, accepted, _ = outputs(llm, 8, prompts, max_tokens=100)
    beside.wait()
    assert ids(results) == expected and accepted > 20
    assert sum(o.preempted for o in llm.engine.observations)
    np.testing.assert_allclose(beside.losses, alone.losses, rtol=1e-5)
    form = StructuredOutputsParams(regex="(ab|cd){3,8}")
    asked = [SamplingParams(max_tokens=40, num_speculative_tokens=8, structured_outputs=form)]
    asked += [SamplingParams(max_tokens=40, num_speculative_tokens=8, ignore_eos=True)]
    first, second = llm.generate(prompts[:2], asked)
    assert set(first.text) <= set("abcd") and second.token_ids == expected[1][:40]


def test_a_number_that_cannot_be(llm):
    with pytest.raises(ValueError, match="num_speculative_tokens=17 must be between 0 and 16"):
        SamplingParams(num_speculative_tokens=17)
