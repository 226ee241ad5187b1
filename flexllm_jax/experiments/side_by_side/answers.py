"""Learning from rewards: the same task for this engine and for TRL's GRPOTrainer, in turns.

The task is that of `make demo-rl`: prompts with their facts, and a reward between 0 and 1 for how
close an answer is to them, by one function for both. A round is a fresh adapter with each, trained
for as many steps. Of one batch of theirs, advantages and loss are moreover computed here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np

from flexllm_jax.config import FinetuneConfig, OptimizerConfig, PeftConfig, ReinforcementConfig
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.finetune.losses import Loss
from flexllm_jax.finetune.microbatch import PackedMicrobatch
from flexllm_jax.finetune.reinforcement.advantages import advantages, divisor, token_weight
from flexllm_jax.finetune.reinforcement.episodes import Episode
from flexllm_jax.graders import Sample
from flexllm_jax.llm import LLM

FACTS = ("answer", "city", "job", "pet")
CLIP = (0.8, 1.2)  # TRL's epsilon 0.2
_SMOOTHED = 3  # steps whose mean reward has to reach the target


@dataclass(frozen=True)
class AnswerTask:
    """What both sides train: GRPO with rewards divided by their group's deviation, DAPO's mean."""

    model: Path
    rows: Path
    batch_size: int = 8  # prompts of a step
    generations: int = 8
    max_tokens: int = 16
    rank: int = 16
    lr: float = 1e-3
    steps: int = 20
    reward: float = 0.5  # to be reached

    @property
    def answers(self) -> int:
        """Of a step."""
        return self.batch_size * self.generations


def reward_of(text: str, facts: Mapping[str, Any]) -> float:
    """A third each for being close to the answer, for being it, and for the facts in it."""
    close = SequenceMatcher(None, text, facts["answer"]).ratio()
    found = sum(facts[name] in text for name in FACTS[1:]) / 3
    return (close + (text == facts["answer"]) + found) / 3


@dataclass
class Curve:
    """A run: seconds from its start to the end of every step, mean rewards, tokens answered, and
    CPU time of all threads, which other work on the machine changes little."""

    ends_s: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    tokens: float = 0.0
    cpu_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Answered, over the whole run."""
        return self.tokens / self.ends_s[-1]

    def seconds_to(self, reward: float) -> float | None:
        """Until the mean of a few steps' rewards is as much; None if it never was."""
        for last in range(_SMOOTHED - 1, len(self.rewards)):
            if np.mean(self.rewards[last + 1 - _SMOOTHED : last + 1]) >= reward:
                return self.ends_s[last]
        return None


@dataclass
class ScoredBatch:
    """A batch as the other side trained on it: rewards [P, G], tokens of each answer behind its
    prompt's, log-probabilities, advantages [P * G], and the loss."""

    rewards: np.ndarray
    prompts: list[list[int]]
    answers: list[list[int]]
    logprobs: list[np.ndarray]
    advantages: np.ndarray
    loss: float


class OtherSide(Protocol):
    """TRL; a class of its own as it needs what the engine does not."""

    first: ScoredBatch | None  # of its first run

    def train(self, seed: int) -> Curve:
        """A run with a fresh adapter."""
        ...


class OurSide:
    """The engine."""

    def __init__(self, task: AnswerTask, out: Path):
        self.task, self.jobs = task, 0
        self.llm = LLM(
            task.model,
            progress=False,
            max_model_len=128,
            dtype="float32",
            # A quarter of the rows is for others; all answers of a step shall run at once.
            scheduler={"max_tokens_per_step": 512, "max_sequences": task.answers * 4 // 3 + 1},
            # What answers share of prompts of a dozen tokens are whole pages.
            cache={"page_size": 4},
            compile={"token_buckets": [task.answers // 4, task.answers, 256, 512]},
            adapter_bank={"slots": 5, "max_rank": task.rank},
            finetune={
                "max_tokens": 4096,
                "saved": "all",
                "checkpoint_every": 0,
                "idle_step_ms": 10_000,
            },
            output_dir=str(out),
        )

    def train(self, seed: int, steps_ahead: int) -> Curve:
        """A run with a fresh adapter, with answers of so many batches before."""
        self.jobs += 1
        task = self.task
        config = FinetuneConfig(
            name=f"answers{self.jobs}",
            dataset=task.rows,
            method=ReinforcementConfig(
                batch_size=task.batch_size,
                num_generations=task.generations,
                max_tokens=task.max_tokens,
                scale_rewards="group",
                loss="ppo",
                clip_low=CLIP[0],
                clip_high=CLIP[1],
                steps_ahead=steps_ahead,
            ),
            steps=task.steps,
            peft=PeftConfig(r=task.rank, alpha=2 * task.rank),
            optimizer=OptimizerConfig(lr=task.lr, schedule="constant"),
            seed=seed,
            resume=False,
        )
        job = self.llm.finetune(config, reward=_rewards).wait()
        if job.status != "succeeded":
            raise RuntimeError(job.reason)
        started = job._job.started_at
        self.llm.unload_adapter(job.name)
        return Curve(
            [at - started for at in job.step_times],
            [metrics["reward"] for metrics in job.metrics],
            sum(metrics["length"] for metrics in job.metrics) * task.answers,
        )


def _rewards(samples: Sequence[Sample]) -> list[float]:
    return [reward_of(sample.text, sample.item) for sample in samples]


def differences(llm: LLM, batch: ScoredBatch) -> dict[str, float]:
    """The largest between what the other side computed of its first batch, whose adapter
    changes nothing yet, and what is computed of the same answers here."""
    own = np.concatenate(advantages(batch.rewards.tolist(), "group"))
    texts = [p + a for p, a in zip(batch.prompts, batch.answers, strict=True)]
    scored = llm.generate(texts, SamplingParams(max_tokens=1, prompt_logprobs=0))
    lengths = [len(answer) for answer in batch.answers]
    losses, logprob_gap = 0.0, 0.0
    for text, length, gain, output, theirs in zip(
        texts, lengths, own, scored, batch.logprobs, strict=True
    ):
        known = zip(text[-length:], (output.prompt_logprobs or [])[-length:], strict=True)
        logprob = [(entry or {})[token] for token, entry in known]
        logprob_gap = max(logprob_gap, float(np.abs(logprob - theirs).max()))
        episode = Episode(0)
        episode.hear(text[:-length])
        episode.say(text[-length:], logprob)
        datum = episode.datum(gain * token_weight("dapo", length))
        packed = PackedMicrobatch((datum,), Loss.of("ppo", low=CLIP[0], high=CLIP[1]), (), 0)
        losses += float(packed.evaluate(datum.reference)[0].sum())
    loss = losses / divisor("dapo", lengths, 0)
    return {
        "advantages": float(np.abs(own - batch.advantages).max()),
        "log-probabilities": logprob_gap,
        "loss": abs(loss - batch.loss),
    }


def read_prompts(rows: Path) -> list[dict[str, Any]]:
    """Rows of messages and facts. ValueError names the line without them."""
    read = []
    for number, line in enumerate(rows.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if missing := {"messages", *FACTS} - set(row):
            raise ValueError(f"{rows}:{number}: has no {', '.join(sorted(missing))}")
        read.append(row)
    return read


def compare_answers(task: AnswerTask, theirs: OtherSide, out: Path, rounds: int) -> dict[str, Any]:
    """Runs in turn, after one of each that does not count; prints each round, returns all."""
    ours = OurSide(task, out)
    sides: dict[str, Callable[[int], Curve]] = {
        "TRL": theirs.train,
        "flexllm_jax": partial(ours.train, steps_ahead=0),
        "flexllm_jax, a step ahead": partial(ours.train, steps_ahead=1),
    }
    curves: dict[str, list[Curve]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, train in sides.items():
            began, cpu_s = time.perf_counter(), time.process_time()
            curve = train(number)
            curve.cpu_s = time.process_time() - cpu_s
            if number:
                curves[name].append(curve)
            told = f"{curve.tokens_per_s:.0f} tokens/s, {time.perf_counter() - began:.1f} s"
            told += f", {curve.cpu_s:.1f} s of CPU"
            print(f"round {number}, {name}: {told}", file=sys.stderr)
    assert theirs.first is not None
    first = differences(ours.llm, theirs.first)
    ours.llm.close()
    return {
        "first_step": first,
        "reward": task.reward,
        "sides": {name: _summary(task, own) for name, own in curves.items()},
        "ratio": {name: _ratios(task, curves["TRL"], curves[name]) for name in list(sides)[1:]},
    }


def _summary(task: AnswerTask, curves: list[Curve]) -> dict[str, Any]:
    return {
        "tokens_per_s": [curve.tokens_per_s for curve in curves],
        "cpu_seconds": [curve.cpu_s for curve in curves],
        "seconds": [curve.ends_s[-1] for curve in curves],
        "seconds_to_reward": _mean(curves).seconds_to(task.reward),
        "rewards": [curve.rewards for curve in curves],
    }


def _ratios(task: AnswerTask, theirs: list[Curve], ours: list[Curve]) -> dict[str, float | None]:
    """Medians over the rounds; the time to the reward is that of their mean, as the reward of one
    round comes and goes by several steps: None where a side did not come so far."""
    pairs = list(zip(theirs, ours, strict=True))
    reached = [_mean(curves).seconds_to(task.reward) for curves in (theirs, ours)]
    return {
        "tokens_per_s": median(b.tokens_per_s / a.tokens_per_s for a, b in pairs),
        "cpu_time": median(a.cpu_s / b.cpu_s for a, b in pairs),
        "time": median(a.ends_s[-1] / b.ends_s[-1] for a, b in pairs),
        "time_to_reward": reached[0] / reached[1] if reached[0] and reached[1] else None,
    }


def _mean(curves: list[Curve]) -> Curve:
    """When the steps of several rounds ended, and their rewards, on average."""
    ends, rewards = (
        [float(np.mean(own)) for own in zip(*of_each, strict=False)]
        for of_each in ([c.ends_s for c in curves], [c.rewards for c in curves])
    )
    return Curve(ends, rewards)
