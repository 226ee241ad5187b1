"""Learning from rewards beside TRL: what is computed again of a batch, how runs are compared."""

import json

import numpy as np
import pytest

from flexllm_jax.experiments.side_by_side.answers import (
    AnswerTask,
    Curve,
    ScoredBatch,
    _ratios,
    differences,
    read_prompts,
    reward_of,
)
from tests.engines import random_prompts, reference_logprobs, write_rows

FACTS = {"answer": "Rome, cook, cat.", "city": "Rome", "job": "cook", "pet": "cat"}


def test_rewards_are_for_closeness_the_answer_and_its_facts():
    assert reward_of("Rome, cook, cat.", FACTS) == 1
    assert reward_of("", FACTS) == 0
    assert reward_of("cat", FACTS) == pytest.approx((2 * 3 / 19 + 1 / 3) / 3)


def test_what_differs_from_the_other_side_is_found(llm, llama_reference):
    """A batch as TRL's formulas have it, in numpy, with transformers' log-probabilities."""
    random = np.random.default_rng(3)
    prompts = [own for own in random_prompts([9, 14]) for _ in range(3)]
    answers = [random.integers(3, 200, n).tolist() for n in (4, 1, 7, 3, 3, 6)]
    rewards = random.random((2, 3))
    logprobs = []
    for prompt, answer in zip(prompts, answers, strict=True):
        known = reference_logprobs(llama_reference, prompt + answer)[len(prompt) - 1 : -1]
        logprobs.append(known[range(len(answer)), answer])
    gains = rewards - rewards.mean(1, keepdims=True)
    gains = (gains / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)
    lengths = np.array([len(answer) for answer in answers])
    loss = -(gains * lengths).sum() / lengths.sum()  # all ratios are 1
    found = differences(llm, ScoredBatch(rewards, prompts, answers, logprobs, gains, float(loss)))
    assert max(found.values()) < 1e-4
    wrong = ScoredBatch(rewards, prompts, answers, logprobs, gains * 1.01, float(loss) + 0.01)
    found = differences(llm, wrong)
    assert found["advantages"] > 1e-3 and found["loss"] == pytest.approx(0.01, rel=0.01)
    assert found["log-probabilities"] < 1e-4


def test_runs_are_compared_by_round(tmp_path):
    task = AnswerTask(tmp_path, tmp_path, reward=0.5)
    slow = Curve([1.0, 2.0, 3.0, 4.0], [0.1, 0.4, 0.5, 0.7], tokens=40, cpu_s=4.0)
    fast = Curve([0.5, 1.0, 1.5, 2.0], [0.3, 0.5, 0.7, 0.7], tokens=30, cpu_s=1.0)
    assert slow.seconds_to(0.5) == 4.0 and fast.seconds_to(0.5) == 1.5
    assert slow.seconds_to(0.9) is None
    expected = {"tokens_per_s": 1.5, "cpu_time": 4.0, "time": 2.0, "time_to_reward": 4 / 1.5}
    assert _ratios(task, [slow], [fast]) == pytest.approx(expected)
    never = Curve([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], tokens=1, cpu_s=1.0)
    assert _ratios(task, [slow, slow], [fast, never])["time_to_reward"] is None
    # One round reached the mean of both after 2 steps, the other after 4: they do after 3.
    rewards = [0, 1.5, 1, 1], [0, 0, 0.5, 1]
    early, late = (Curve([1.0, 2.0, 3.0, 4.0], own, tokens=1, cpu_s=1.0) for own in rewards)
    assert _ratios(task, [early, late], [fast, fast])["time_to_reward"] == pytest.approx(3 / 1.5)


def test_a_row_without_its_facts_is_told(tmp_path):
    row = {"messages": [{"role": "user", "content": "Who?"}], **FACTS}
    rows = write_rows(tmp_path / "rows.jsonl", [row, {"messages": [], "answer": "a", "job": "b"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:2: has no city, pet"):
        read_prompts(rows)
    rows.write_text(json.dumps(row) + "\n")
    assert read_prompts(rows) == [row]
