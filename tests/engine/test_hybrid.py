"""A model with recurrent layers, in an engine: what it answers is the same however its prompts are
cut, whoever loses its pages, and wherever a prefix comes from."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flexllm_jax import SamplingParams
from tests.checkpoints import make_qwen3_5, save_tokenizer
from tests.engines import (
    job_config,
    letter_rows,
    prompt_logprob_errors,
    random_prompts,
    reference_greedy,
    reference_logprobs,
    start_engine,
    write_rows,
)

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


def assert_greedy(reference, prompts, outputs):
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.token_ids == reference_greedy(reference, prompt, 12)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return save_tokenizer(make_qwen3_5(tmp_path_factory.mktemp("hybrid"), vocab_size=272))


@pytest.fixture(scope="module")
def reference(hybrid):
    return AutoModelForCausalLM.from_pretrained(hybrid, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(hybrid, tmp_path_factory):
    llm = start_engine(hybrid, tmp_path_factory.mktemp("runs"), cache={"snapshot_every": 64})
    yield llm
    llm.close()


@pytest.fixture
def read(engine):
    """How many snapshots were read since the test began."""
    snapshots = engine.engine.scheduler.pool.snapshots
    before = snapshots.hits
    return lambda: snapshots.hits - before


@pytest.mark.parametrize("length", [1, 7, 48])
def test_chunks_of_any_length_give_the_same(engine, reference, monkeypatch, length):
    policy = engine.engine.scheduler.policy
    monkeypatch.setattr(policy, "token_limit", lambda step: min(48, len(step.decode) + length))
    prompts = random_prompts([5, 64, 37], seed=length)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=6, prompt_logprobs=3))
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = reference_logprobs(reference, prompt)
        errors = prompt_logprob_errors(output, expected)
        assert errors.max() < 5e-4 * np.abs(expected).max()


def test_a_prefix_is_gone_on_from_where_a_snapshot_is(engine, reference, read):
    (system, *questions) = random_prompts([43, 9, 21, 9, 2], seed=21)
    prompts = [system + question for question in questions]
    outputs = []
    for prompt in prompts:
        outputs += engine.generate([prompt], PARAMS)
    assert read() == 2  # the second has found where it parts from the first, after five pages
    again = engine.generate(prompts, PARAMS)
    assert read() == 2 + 4
    assert_greedy(reference, prompts * 2, outputs + again)


def test_several_turns_go_on_from_one_another(engine, reference, read):
    (prompt, more) = random_prompts([30, 11], seed=31)
    (first,) = engine.generate([prompt], SamplingParams(max_tokens=40, ignore_eos=True))
    second = [*prompt, *first.token_ids, *more]
    outputs = engine.generate([second], PARAMS)
    assert read() == 1
    assert_greedy(reference, [second], outputs)


def test_the_preempted_go_on_as_if_nothing_had_been(engine, reference, read):
    """Three sequences of 17 pages share 48: who lost its pages finds the snapshot behind its prompt
    again, as the others need few of them."""
    prompts = random_prompts([66, 67, 68], seed=41)
    futures = [engine.submit(p, SamplingParams(max_tokens=66, ignore_eos=True)) for p in prompts]
    states = [future.result(120) for (future,) in futures]
    assert sum(state.preemptions for state in states), "none was preempted: nothing is shown"
    assert read() >= 1, "prompts share nothing, so only who comes back could read one"
    for prompt, state in zip(prompts, states, strict=True):
        assert state.output == reference_greedy(reference, prompt, 66)


def test_a_job_beside_changes_no_answer(engine, reference, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", letter_rows(20, longest=60))
    job = engine.finetune(job_config("beside", rows, steps=300))
    while not job.steps:
        assert job.status == "running", job.reason
    prompts = random_prompts([43, 20], seed=51)
    outputs = engine.generate(prompts * 2, PARAMS)
    assert job.status == "running"
    job.cancel()
    assert_greedy(reference, prompts * 2, outputs)


def test_states_are_planned_and_nothing_compiles(engine):
    runner = engine.engine.runner
    assert runner.sizes.recurrent == (0,)
    states = runner.pages[0]
    assert {x.shape[0] for x in states.values()} == {6 + 2 + 3}
    assert runner.memory.parts["states"] == sum(x.nbytes for x in states.values())
    assert "states " in runner.memory.describe()
    assert runner.compilations.count == 0
