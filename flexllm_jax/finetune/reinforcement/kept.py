"""Answers in a checkpoint: those of batches that are not trained yet, as far as they are complete.

Their numbers are arrays; what is told of them is JSON data. What is not complete is sampled again
after a restart, with the same seed, and so are episodes whose environment goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from flexllm_jax.finetune.reinforcement.episodes import Episode, Group

# Of every token; `reference` is 0 where it is not wanted.
_NUMBERS = {"tokens": np.int32, "said": np.bool_, "logprob": np.float32, "reference": np.float32}
_TOLD = ("seed", "turns", "cut", "error", "reward", "scores", "text")

Told = list[dict[str, Any]]  # of every group: its key, whether it is done, its episodes by place


def keep(
    groups: Iterable[Group], text: Callable[[Episode], str]
) -> tuple[Told, dict[str, np.ndarray]]:
    """What of these groups is complete: JSON data and arrays [tokens]. `text`: what an episode that
    is not graded yet has said; workers may be at it meanwhile."""
    told: Told = []
    kept: list[Episode] = []
    for group in groups:
        done, episodes = group.done, {}
        for place, episode in enumerate(group.episodes):
            if not episode.over:
                continue
            own = {name: getattr(episode, name) for name in _TOLD}
            if own["reward"] is None:  # read after its error, which comes before it
                own |= {"error": None, "scores": {}, "text": text(episode)}
            own |= {"length": len(episode.tokens), "scored": episode.reference is not None}
            episodes[str(place)] = own
            kept.append(episode)
        told.append({"key": list(group.key), "done": done, "episodes": episodes})
    numbers = {
        name: [value for episode in kept for value in _numbers(episode, name)] for name in _NUMBERS
    }
    return told, {name: np.array(numbers[name], dtype) for name, dtype in _NUMBERS.items()}


def _numbers(episode: Episode, name: str) -> list:
    values = getattr(episode, name)
    return [0.0] * len(episode.tokens) if values is None else values


def shapes(told: Told) -> dict[str, np.ndarray]:
    """Arrays like those that `keep` gave with it."""
    total = sum(e["length"] for group in told for e in group["episodes"].values())
    return {name: np.zeros(total, dtype) for name, dtype in _NUMBERS.items()}


class Kept:
    """The answers of a checkpoint, until their groups begin again."""

    def __init__(self, told: Told, arrays: Mapping[str, np.ndarray]):
        self._groups: dict[tuple[int, ...], tuple[bool, dict[int, Episode]]] = {}
        start = 0
        for group in told:
            episodes = {}
            for place, own in group["episodes"].items():
                stop = start + own["length"]
                numbers = {name: arrays[name][start:stop].tolist() for name in _NUMBERS}
                if not own["scored"]:
                    numbers["reference"] = None
                episodes[int(place)] = Episode(
                    over=True, **numbers, **{name: own[name] for name in _TOLD}
                )
                start = stop
            self._groups[tuple(group["key"])] = bool(group["done"]), episodes

    def fill(self, group: Group) -> None:
        """Put in a group what is known of it."""
        group.done, episodes = self._groups.pop(group.key, (False, {}))
        for place, episode in episodes.items():
            group.episodes[place] = episode
