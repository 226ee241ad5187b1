"""Answers under way: a group of episodes for each prompt, and who plays the other side.

An episode is a sequence of tokens of which the model has said some, in one turn or in several; the
others (the prompt, what an environment answers) are never trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from flexllm_jax.finetune.microbatch import Datum
from flexllm_jax.finetune.reinforcement.prompts import Prompt


@dataclass(eq=False)
class Episode:
    """One answer to a prompt.

    tokens: the prompt, what was said and what was answered, in order. logprob: of each token when
    it was sampled. said: whether the model said it. text: what it said last. reward: None until it
    is graded, and then a number. reference: log-probabilities under the start weights, where they
    are wanted.
    """

    seed: int
    tokens: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    said: list[bool] = field(default_factory=list)
    text: str = ""
    turns: int = 0
    cut: bool = False  # its last turn has as many tokens as it may have
    over: bool = False  # nothing more will be said
    reward: float | None = None
    error: str | None = None  # why it has no reward of its own
    scores: dict[str, float] = field(default_factory=dict)
    reference: list[float] | None = None
    environment: Any = None
    conversation: Any = None  # what was said and heard, for who goes on with it
    request: Any = None  # the last one of its turns, once finished

    @property
    def length(self) -> int:
        """Tokens that the model said."""
        return sum(self.said)

    def hear(self, tokens: Sequence[int]) -> None:
        """Tokens that the model did not say."""
        self.tokens += tokens
        self.logprob += [0.0] * len(tokens)
        self.said += [False] * len(tokens)

    def say(self, tokens: Sequence[int], logprob: Sequence[float]) -> None:
        """A turn of the model."""
        self.tokens += tokens
        self.logprob += logprob
        self.said += [True] * len(tokens)
        self.turns += 1

    def fail(self, reason: str) -> None:
        """It cannot be graded: it counts as without reward."""
        self.error, self.reward, self.over = reason, 0.0, True

    def datum(self, advantage: np.ndarray | float) -> Datum:
        """For training. advantage: of each token, or of all alike; 0 where it was not said. What
        comes after the last label changes nothing, and is left out."""
        said = np.array(self.said)
        token = np.array(self.tokens, np.int32)
        of_each = np.where(said, advantage, 0.0)
        label = np.full(len(token), -1, np.int32)
        label[:-1] = np.where(said[1:], token[1:], -1)
        kept = slice(np.flatnonzero(label >= 0).max(initial=0) + 1)

        def before(values: np.ndarray) -> np.ndarray:  # what is said of a token, at the one before
            return np.append(values[1:], 0).astype(np.float32)[kept]

        return Datum(
            token[kept],
            label[kept],
            before(said),
            before(np.array(self.logprob)),
            before(of_each),
        )


@dataclass(eq=False)
class Group:
    """The episodes of one prompt. `done`: all are over and graded. `key`: what its seeds, and so
    its answers, follow from."""

    prompt: Prompt
    episodes: list[Episode]
    key: tuple[int, ...] = ()
    done: bool = False

    @classmethod
    def of(cls, prompt: Prompt, count: int, key: tuple[int, ...]) -> Group:
        """A group with a seed for each episode."""
        seeds = np.random.SeedSequence(key).generate_state(count)
        return cls(prompt, [Episode(int(seed) & 0x7FFFFFFF) for seed in seeds], key)

    @property
    def rewards(self) -> list[float]:
        """Of its episodes, which are all graded."""
        return [episode.reward or 0.0 for episode in self.episodes]

    @property
    def equal(self) -> bool:
        """Whether there is nothing to learn from it."""
        return len(set(self.rewards)) == 1

    @property
    def told(self) -> list[dict[str, Any]]:
        """For people: what was asked, said and given."""
        return [
            {"item": self.prompt.item, "text": e.text, "reward": e.reward}
            | ({"error": e.error} if e.error else {})
            for e in self.episodes
        ]


class Game(Protocol):
    """The other side of an episode. Its methods are called in threads of workers, one group at a
    time in each; what they raise fails their episode, or all of the group."""

    one_turn: bool  # an episode is over after its first turn

    def begin(self, group: Group) -> None:
        """Give every episode its first tokens (`Episode.hear`), where `Prompt` has none."""
        ...

    def answer(self, episode: Episode) -> None:
        """After a turn: `Episode.hear` what is answered, or set `over`."""
        ...

    def grade(self, group: Group) -> None:
        """Every episode is over: give each that has none its reward."""
        ...


class Sampler(Protocol):
    """Plays groups with the weights of a job as they were at some time."""

    @property
    def tokens(self) -> int:
        """Said so far."""
        ...

    @property
    def computed(self) -> int:
        """Tokens that went through for it so far: what was said, and prompts."""
        ...

    def freeze(self) -> Any:
        """The adapter as it is now, as a version that stays."""
        ...

    def thaw(self, values: list, scales: list) -> Any:
        """A version that a checkpoint kept."""
        ...

    def read(self, version: Any) -> list:
        """What a checkpoint keeps of a version."""
        ...

    def play(self, groups: Sequence[Group], version: Any) -> None:
        """Begin what is not over; each group says when it is `done`."""
        ...

    def release(self, version: Any) -> None:
        """No more groups of a version will come."""
        ...

    def text(self, episode: Episode) -> str:
        """What an episode has said last."""
        ...

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do for the engine until a worker is done."""
        ...

    def poll(self) -> None:
        """Between two steps: take in what others have done."""
        ...

    def pause(self) -> None:
        """Drop what is under way, to begin it again."""
        ...

    def resume(self) -> None:
        """Go on."""
        ...

    def close(self) -> None:
        """Drop everything."""
        ...
