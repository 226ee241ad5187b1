"""What a tracker is: something outside that is told how a finetuning job goes.

One module beside this one per kind; their libraries are imported when they are used. A run of a
tracker has a name of its own (`Run.id`): who starts it again goes on with it, and learns from
`start` what is there already, so that nothing is told twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Sample(NamedTuple):
    """What an adapter answers to a row's prompt, and what the row says."""

    prompt: str
    expected: str
    answer: str


@dataclass(frozen=True)
class Run:
    """What a tracker is told of a job before its first step.

    id       the same whenever it is gone on with: letters, digits, `.`, `_` and `-`
    config   plain data
    folder   where a tracker writes that is not told another place
    """

    id: str
    name: str
    config: Mapping[str, Any]
    folder: Path
    tags: tuple[str, ...] = field(default=())


class Logged(NamedTuple):
    """The last optimizer step of each kind that a run knows; 0: none."""

    step: int = 0
    validation: int = 0
    samples: int = 0


class Tracker(Protocol):
    """A run of a tracker. Called in one thread; may take its time, and may raise anything."""

    where: str  # after `start`: where people find the run

    def start(self, run: Run) -> Logged:
        """Begin a run, or go on with it; what it knows already."""
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """What an optimizer step measured, counted from 1."""
        ...

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """What validation after a step measured."""
        ...

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Answers of the adapter after a step."""
        ...

    def flush(self) -> None:
        """What was told outlives this process."""
        ...

    def finish(self, status: str | None) -> None:
        """The job has ended with `status`; None: the run may be gone on with later."""
        ...


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted name."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        below = isinstance(value, Mapping) and value
        leaves |= flat(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return leaves
