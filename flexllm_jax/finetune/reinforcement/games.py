"""The other side of an episode: a reward function or a grader, or an environment of several turns.

    class Calculator:
        def __init__(self, item): self.item = item                     # a row of the dataset
        def reset(self): return self.item["question"]                  # a text, or messages
        def step(self, text): return observation, reward, done

A reward function is the environment of one turn: `reward(samples) -> rewards`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from flexllm_jax.finetune.reinforcement.episodes import Episode, Group
from flexllm_jax.finetune.reinforcement.prompts import Given, PromptReader
from flexllm_jax.graders import (
    Complete,
    Completion,
    Grade,
    Grader,
    GradingError,
    Question,
    Sample,
)

Reward = Callable[[Sequence[Sample]], Sequence[float]]


class Environment(Protocol):
    """What a model acts in. Made for every episode from a row of the dataset."""

    def reset(self) -> Given:
        """The prompt: a text, or messages of which the last is not the assistant's."""
        ...

    def step(self, text: str) -> tuple[Given, float, bool]:
        """After what the model said: what it sees next (a text that follows as it is, or
        messages), the reward of this step, and whether the episode is over."""
        ...


class Asking:
    """Asks models for a grader, by the engine that the job runs in, once it does."""

    def __init__(self) -> None:
        self.engine: Complete | None = None

    def __call__(self, question: Question) -> Completion:
        """What a model answers. GradingError where none does."""
        if self.engine is None:
            reason = f"{question.field}: the job does not run"
            raise GradingError("model_grader_server_error", reason)
        return self.engine(question)


class RewardFunction:
    """A plain function as a grader. What it returns for a sample must be a finite number."""

    reads: frozenset[str] = frozenset()

    def __init__(self, function: Reward):
        self._function = function

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """One call for all samples."""
        began = time.monotonic()
        rewards = list(self._function(samples))
        if len(rewards) != len(samples):
            raise ValueError(
                f"the reward function returned {len(rewards)} rewards for {len(samples)} samples; "
                "return one for each"
            )
        seconds = (time.monotonic() - began) / max(1, len(samples))
        return [_grade(reward, seconds) for reward in rewards]


def _grade(reward: Any, seconds: float) -> Grade:
    try:
        value = float(reward)
    except (TypeError, ValueError):
        return Grade(math.nan, f"reward {reward!r} is no number", seconds=seconds)
    if not math.isfinite(value):
        return Grade(math.nan, f"reward {value} is not finite", seconds=seconds)
    return Grade(value, seconds=seconds)


class Graded:
    """Episodes of one turn, graded in groups (`episodes.Game`)."""

    one_turn = True

    def __init__(self, grader: Grader):
        self._grader = grader

    def begin(self, group: Group) -> None:
        """Prompts are read already."""

    def answer(self, episode: Episode) -> None:
        """It is over."""
        episode.over = True

    def grade(self, group: Group) -> None:
        """All answers of a prompt at once."""
        episodes = [episode for episode in group.episodes if episode.reward is None]
        samples = [Sample(text=episode.text, item=group.prompt.item) for episode in episodes]
        grades = self._grader.grade(samples)
        if len(grades) != len(samples):
            raise ValueError(f"{len(grades)} grades for {len(samples)} samples")
        for episode, grade in zip(episodes, grades, strict=True):
            episode.scores = dict(grade.scores)
            if grade.error is not None or not math.isfinite(grade.reward):
                episode.fail(grade.error or f"reward {grade.reward} is not finite")
            else:
                episode.reward = float(grade.reward)


class Played:
    """Episodes in environments. `make`: the environment of a row.

    What an environment answers follows what the model said: a text as it is; messages as the chat
    template writes them behind it.
    """

    one_turn = False

    def __init__(
        self,
        make: Callable[[dict[str, Any]], Environment],
        reader: PromptReader,
        max_turns: int,
        most_tokens: int,
    ):
        self._make, self._reader = make, reader
        self._max_turns, self._most_tokens = max_turns, most_tokens

    def begin(self, group: Group) -> None:
        """Every episode has an environment of its own."""
        for episode in group.episodes:
            if episode.over:
                continue
            try:
                episode.environment = environment = self._make(group.prompt.item)
                given = environment.reset()
                episode.hear(self._reader.tokens(given))
                episode.conversation = _Conversation(self._reader, given)
            except Exception as error:  # a user's program
                episode.fail(f"reset: {_one_line(error)}")

    def answer(self, episode: Episode) -> None:
        """A step of its environment."""
        try:
            observation, reward, done = episode.environment.step(episode.text)
            value = float(reward)
            if not math.isfinite(value):
                raise ValueError(f"reward {value} is not finite")
            episode.reward = (episode.reward or 0.0) + value
            if done or episode.turns >= self._max_turns:
                episode.over = True
                return
            heard = episode.conversation.goes_on(episode, observation)
        except Exception as error:  # a user's program
            episode.fail(f"step: {_one_line(error)}")
            return
        if len(episode.tokens) + len(heard) >= self._most_tokens:
            episode.over = episode.cut = True  # no room to say anything more
        else:
            episode.hear(heard)

    def grade(self, group: Group) -> None:
        """Rewards came with the steps."""


class _Conversation:
    """What an episode's tokens say, as messages: so the chat template can write what follows."""

    def __init__(self, reader: PromptReader, given: Given):
        self._reader = reader
        self._messages = None if isinstance(given, str) else list(given)
        self._text = reader.text(given)

    def goes_on(self, episode: Episode, observation: Given) -> list[int]:
        """The tokens behind what was said last, with which the next turn begins."""
        if isinstance(observation, str):
            self._messages = None  # what follows is no message any more
            return self._reader.continuation(observation)
        if self._messages is None:
            raise ValueError("after a text there is no message: answer with a text")
        said = {"role": "assistant", "content": episode.text}
        self._messages = [*self._messages, said, *observation]
        before, whole = self._text + episode.text, self._reader.text(self._messages)
        if not whole.startswith(before):
            raise ValueError(
                "the chat template writes earlier turns otherwise than they were said: answer "
                "with a text, which follows as it is"
            )
        self._text = whole
        return self._reader.continuation(whole[len(before) :], after=episode.tokens)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
