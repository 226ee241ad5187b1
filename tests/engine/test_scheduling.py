"""However the scheduler cuts, orders, caches and preempts, every request gets the same tokens."""

import time

import pytest

from flexllm_jax import SamplingParams
from tests.engines import (
    job_config,
    letter_rows,
    prompt_logprob_errors,
    random_prompts,
    reference_greedy,
    reference_logprobs,
    save_random_adapter,
    write_rows,
)


def assert_greedy(model, prompts, outputs, count):
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == reference_greedy(model, prompt, count)


def test_more_requests_than_rows(llm, llama_reference):
    prompts = random_prompts([4, 33, 12, 70, 8, 21, 16, 55, 9, 40, 2, 27, 30, 61, 5])
    outputs = llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    assert_greedy(llama_reference, prompts, outputs, 20)
    assert all(output.ttft_s > 0 and output.tpot_s > 0 for output in outputs)


def test_prompts_longer_than_a_step(llm, llama_reference):
    prompts = random_prompts([48, 49, 97, 140])
    assert max(llm.engine.runner.sizes.buckets) == 48
    outputs = llm.generate(prompts, SamplingParams(max_tokens=18, ignore_eos=True))
    assert_greedy(llama_reference, prompts, outputs, 18)


def test_the_longest_request_the_context_allows(llm, llama_reference):
    prompts = random_prompts([1, 159])
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (159, 1)]
    outputs = llm.generate(prompts, params)
    for prompt, output, one in zip(prompts, outputs, params, strict=True):
        assert output.token_ids == reference_greedy(llama_reference, prompt, one.max_tokens)


class TestPreemption:
    """Six requests need 78 pages, the pool has 48."""

    PROMPTS = random_prompts([44, 38, 41, 47, 36, 43], seed=5)

    def states(self, llm, params):
        futures = [llm.submit(prompt, params)[0] for prompt in self.PROMPTS]
        states = [future.result(120) for future in futures]
        assert sum(max(0, s.preemptions) for s in states), "nothing was preempted"
        return states

    @pytest.mark.parametrize("fields", [{}, {"repetition_penalty": 1.3}], ids=str)
    def test_recomputes_the_same_tokens(self, llm, llama_reference, fields):
        states = self.states(llm, SamplingParams(max_tokens=60, ignore_eos=True, **fields))
        for state in states:
            expected = reference_greedy(llama_reference, state.prompt, 60, **fields)
            assert state.output == expected

    def test_draws_and_prompt_logprobs_stay(self, llm, llama_reference):
        params = SamplingParams(
            max_tokens=60, temperature=1.0, seed=9, ignore_eos=True, prompt_logprobs=2, logprobs=0
        )
        for state in self.states(llm, params):
            expected = reference_logprobs(llama_reference, [*state.prompt, *state.output])
            assert len(state.prompt_logprobs) == len(state.prompt)
            for i, logprobs in enumerate(state.prompt_logprobs[1:]):
                assert logprobs[state.prompt[i + 1]] == pytest.approx(
                    expected[i, state.prompt[i + 1]], abs=1e-4
                )
            for i, logprobs in enumerate(state.logprobs):
                (value,) = logprobs.values()
                at = len(state.prompt) - 1 + i
                assert value == pytest.approx(expected[at, state.output[i]], abs=1e-4)
            (alone,) = llm.generate([list(state.prompt)], params)
            assert alone.token_ids == state.output

    def test_prompt_logprobs_of_a_prompt_that_was_begun_twice(
        self, llm, llama_reference, monkeypatch
    ):
        """A long prompt is preempted between its chunks; the cache has forgotten the first ones."""
        scheduler = llm.engine.scheduler
        monkeypatch.setattr(scheduler.policy, "token_limit", lambda step: 8)
        monkeypatch.setattr(scheduler.inference, "publish", lambda sequence: None)
        params = SamplingParams(max_tokens=80, ignore_eos=True)
        older = [llm.submit(p, params)[0] for p in random_prompts([20, 22, 24, 26], seed=60)]
        while not all(len(future.state.output) > 20 for future in older):
            time.sleep(0.001)
        (prompt,) = random_prompts([120], seed=61)
        (long,) = llm.submit(prompt, SamplingParams(max_tokens=1, prompt_logprobs=0))
        state = long.result(60)
        assert state.preemptions > 0, "it was not preempted: nothing is shown"
        expected = reference_logprobs(llama_reference, prompt)
        for i, logprobs in enumerate(state.prompt_logprobs[1:]):
            assert logprobs == {prompt[i + 1]: pytest.approx(expected[i, prompt[i + 1]], abs=1e-3)}
        for future in older:
            expected = reference_greedy(llama_reference, future.state.prompt, 80)
            assert future.result(60).output == expected

    def test_with_a_job_beside_that_loses_its_pages(self, llm, llama_reference, tmp_path):
        rows = write_rows(tmp_path / "rows.jsonl", letter_rows(20, longest=80))
        job = llm.finetune(job_config("parked", rows, steps=300))
        while not job.steps:
            assert job.status == "running", job.reason
        outputs = llm.generate(self.PROMPTS, SamplingParams(max_tokens=60, ignore_eos=True))
        job.cancel()
        assert_greedy(llama_reference, self.PROMPTS, outputs, 60)


class TestPrefixCache:
    def hits(self, llm):
        return llm.engine.scheduler.pool.hits

    def test_a_shared_prefix_is_read_from_the_cache(self, llm, llama_reference):
        (prefix, *tails) = random_prompts([64, 5, 9, 1], seed=21)
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        first = llm.generate([prefix + tails[0]], params)
        hits = self.hits(llm)
        rest = [prefix + tail for tail in tails[1:]]
        outputs = llm.generate(rest, params)
        assert self.hits(llm) - hits == 2 * 64 // 8
        assert_greedy(llama_reference, [prefix + tails[0], *rest], first + outputs, 12)

    def test_an_adapter_never_reads_the_pages_of_another_version(self, llm, llama, tmp_path):
        (prompt,) = random_prompts([50], seed=22)
        params = SamplingParams(max_tokens=10, ignore_eos=True)
        adapters = [save_random_adapter(llama, tmp_path / str(i), seed=i) for i in range(2)]
        outputs = [llm.generate([prompt], params)[0].token_ids]
        hits = self.hits(llm)
        for path in adapters:
            llm.load_adapter("versions", path)
            outputs.append(llm.generate([prompt], params, adapter="versions")[0].token_ids)
        assert self.hits(llm) == hits
        assert len(set(map(tuple, outputs))) == 3
        again = llm.generate([prompt], params, adapter="versions")[0].token_ids
        assert self.hits(llm) > hits
        assert again == outputs[-1]

    def test_prompt_logprobs_are_complete_when_the_prompt_is_cached(self, llm, llama_reference):
        (prompt,) = random_prompts([60], seed=23)
        llm.generate([prompt], SamplingParams(max_tokens=2))
        (output,) = llm.generate([prompt], SamplingParams(max_tokens=2, prompt_logprobs=3))
        errors = prompt_logprob_errors(output, reference_logprobs(llama_reference, prompt))
        assert errors.max() < 1e-3


def test_cancelled_requests_give_their_pages_back(llm, llama_reference):
    prompts = random_prompts([30] * 6, seed=30)
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    futures = [llm.submit(prompt, params)[0] for prompt in prompts]
    while not futures[0].state.output:
        time.sleep(0.001)
    for future in futures:
        llm._loop.cancel(future, "the client has gone")
        state = future.result(10)
        assert (state.finish_reason, state.error) == ("cancelled", "the client has gone")
    assert llm.engine.scheduler.pool_usage == 0
    outputs = llm.generate(prompts, SamplingParams(max_tokens=15, ignore_eos=True))
    assert_greedy(llama_reference, prompts, outputs, 15)
