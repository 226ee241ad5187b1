"""What a job does, as a sequence of microbatches and optimizer steps in order.

A job is device state (`job.FinetuneJob`) and a source. The source owns the order and the numbers:
data, losses, what a step divides by, the schedule; `engine.jobs.trainer` carries out what it hands
over, and tells it the results in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from flexllm_jax.errors import UserError
from flexllm_jax.finetune.microbatch import PackedMicrobatch

if TYPE_CHECKING:
    from flexllm_jax.finetune.job import FinetuneJob


@dataclass(frozen=True, eq=False)
class Step:
    """An optimizer step with the gradient of the microbatches since the one before.

    values: `optimizer.HYPERPARAMETERS`, float32. position: of the source after it, for a
    checkpoint (`Source.restore`). versions: of the adapter that the work after it needs, by number,
    where it is not the adapter as it is then.
    """

    values: np.ndarray
    position: dict[str, Any] = field(default_factory=dict)
    versions: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Aside:
    """Something that is done with a job's state on the device as it is after what comes before.

    do: called in the engine's thread, it dispatches alone; what it returns is called once the
    results of what comes before are read. changes_weights: whether it changes the adapter.
    """

    do: Callable[[FinetuneJob], Callable[[], None]]
    changes_weights: bool = False


@dataclass(frozen=True)
class Measured:
    """A validation, after `step` steps, that took no microbatch."""

    step: int
    metrics: dict[str, float]


class CannotGoOn(UserError):
    """A job's work cannot be handed over; one line that says why and what to do."""


class Source(Protocol):
    """Hands a job's work over in order. It must draw nothing from time or chance between calls: a
    resumed job does what it would have done.

    page: tokens that sequences of a microbatch may share together (`PackedMicrobatch.page`); the
    engine sets it before it asks for anything.
    """

    page: int

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps in all; None: no end is known."""
        ...

    @property
    def finished(self) -> bool:
        """Whether all work is handed over and its results are in."""
        ...

    @property
    def waiting(self) -> bool:
        """Whether nothing comes next until something outside of the engine has happened, which
        will wake it."""
        ...

    def next(self) -> PackedMicrobatch | Step | Aside | Measured | None:
        """What comes next; None while there is nothing. CannotGoOn fails the job."""
        ...

    def scored(self, packed: PackedMicrobatch, logprob: np.ndarray) -> dict[str, float] | None:
        """The log-probabilities of a microbatch's labels, float32 [tokens]. Returns the metrics
        (`loss` among them) of a validation that is complete with it."""
        ...

    def stepped(self, measured: dict[str, float]) -> dict[str, float] | None:
        """The next of the steps handed over is done, which the device `measured`: its metrics,
        `loss` among them, of which one that is not finite ends the job. None: nothing is kept of
        them, whatever they are."""
        ...

    def position(self) -> dict[str, Any]:
        """Where it begins, as plain data for a checkpoint; later `Step.position` says it."""
        ...

    def restore(self, step: int, position: dict[str, Any]) -> None:
        """Go on from a checkpoint taken after `step` steps. ValueError, naming the field, if that
        cannot be."""
        ...
