"""Slots of the bank by turns, where there are more models than have one at once.

Those that have nothing to do, or have had a slot for long, wait in the host's memory with all that
makes them what they are: a model goes on with the same numbers wherever it has been. One slot is
left to adapters that are served.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np

from flexllm_jax.engine.device.out_of_memory import OutOfMemory, room_for
from flexllm_jax.engine.memory.plan import models_at_once
from flexllm_jax.finetune.calls.source import CallSource
from flexllm_jax.peft.directory import NoFreeSlot

if TYPE_CHECKING:
    from flexllm_jax.engine.engine import Engine
    from flexllm_jax.finetune.job import FinetuneJob

_TURN_S = 2.0  # that a model keeps its slot at least while others wait


class Turns(Protocol):
    """Who gives jobs their slots of the bank."""

    @property
    def due(self) -> bool:
        """Whether a job without a slot can get one."""
        ...

    def take(self) -> None:
        """Between two steps: give slots to those that wait."""
        ...


class NoTurns:
    """All have one from their start."""

    due = False

    def take(self) -> None:
        """Nothing."""


@dataclass(eq=False)
class Parked:
    """A job's state on the host, or still on its way there."""

    state: dict[str, Any]

    def come_to_host(self) -> None:
        """In any thread: wait for it; the device's memory is free then."""
        self.state = jax.tree.map(np.asarray, self.state)


@dataclass(eq=False)
class Model:
    """A model that is trained by calls: on the device, or `parked`. `scales`: of its adapter, on
    the host."""

    job: FinetuneJob
    source: CallSource
    scales: list
    parked: Parked | None
    since: float = field(default_factory=time.monotonic)  # that it has, or wants, a slot
    used: float = field(default_factory=time.monotonic)  # when it was last called

    @property
    def idle(self) -> bool:
        """Whether nothing of it is under way on the device."""
        return not (self.source.under_way or self.job.in_order)

    @property
    def wants_slot(self) -> bool:
        """Whether there is something to do for it, and it has no slot."""
        return self.parked is not None and self.source.asked and self.job.running


class ModelTurns:
    """The turns of models. All of it is the engine's thread's."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._most = max(1, models_at_once(engine.config))
        self.models: dict[str, Model] = {}
        engine.trainer.turns = self

    @property
    def _waiting(self) -> list[Model]:
        return sorted((m for m in self.models.values() if m.wants_slot), key=lambda m: m.since)

    @property
    def _placed(self) -> list[Model]:
        return [m for m in self.models.values() if m.parked is None and m.job.running]

    @property
    def resting(self) -> list[Model]:
        """Those that have a slot and nothing to do with it."""
        return [m for m in self._placed if m.idle and (m.source.held or not m.source.asked)]

    @property
    def due(self) -> bool:
        """Whether a model that waits for a slot can get one now, or need not make room any more."""
        if not self._waiting:
            return any(model.source.held and model.source.asked for model in self._placed)
        if self.resting:
            return True
        free = self._engine.adapters.directory.num_to_be_had
        return len(self._placed) < self._most and free > 0

    def take(self) -> None:
        """Give slots to models that wait, the first come first."""
        waiting = self._waiting
        if not waiting:
            for model in self._placed:
                model.source.held = False
        for model in waiting:
            if len(self._placed) >= self._most:
                self._make_room()
            if len(self._placed) < self._most:
                try:
                    self._place(model)
                    continue
                except NoFreeSlot:
                    self._make_room()
            return  # in its turn

    def park_one(self) -> bool:
        """Free the slot of the model that was called the longest ago, of those with nothing to do;
        whether there was one."""
        model = min(self.resting, key=lambda m: m.used, default=None)
        if model is not None:
            self._park(model)
        return model is not None

    def _make_room(self) -> None:
        """Park an idle model, or let the one that has had its slot the longest come to rest."""
        if self.park_one():
            return
        longest = min(self._placed, key=lambda m: m.since, default=None)
        if longest is not None and time.monotonic() - longest.since > _TURN_S:
            longest.source.held = True

    def _place(self, model: Model) -> None:
        """NoFreeSlot."""
        job, trainer = model.job, self._engine.trainer
        job.bank_slot = self._engine.adapters.directory.start_training(job.name)
        assert model.parked is not None
        model.parked.come_to_host()
        try:
            with room_for(f"model {job.name!r}"):
                trainer.place(job, model.parked.state, model.scales)
        except OutOfMemory as error:
            trainer.fail(job.name, str(error))
            return
        model.parked, model.source.held, model.since = None, False, time.monotonic()

    def _park(self, model: Model) -> None:
        job = model.job
        jax.tree.map(lambda x: x.copy_to_host_async(), job.state)
        model.parked = Parked(job.state)
        self._engine.trainer.writer.submit(model.parked.come_to_host)
        job.state, model.source.held, model.since = {}, True, time.monotonic()
        self._engine.adapters.directory.stop_training(job.name)
