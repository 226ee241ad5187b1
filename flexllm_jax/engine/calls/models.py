"""Adapters that clients train by calls, as jobs of the engine (`finetune.calls`).

Calls are made in any thread, and added to a model in the engine's; a future answers each.
ValueError in the making of a call, or in its future, is the client's fault. A call that fails has
changed nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexllm_jax.engine.calls.saved_state import (
    CHOICES,
    SavedState,
    describe,
    load_state,
    optimizer_parts,
    save_state,
    save_weights,
    with_parts,
)
from flexllm_jax.engine.calls.turns import Model, ModelTurns, Parked
from flexllm_jax.engine.device.out_of_memory import OutOfMemory, room_for
from flexllm_jax.engine.engine import Engine
from flexllm_jax.engine.memory.sizes import FINETUNE_SEQUENCES
from flexllm_jax.errors import UserError
from flexllm_jax.finetune.calls.data import GivenDatum, read_data, read_loss
from flexllm_jax.finetune.calls.source import (
    AsideCall,
    Call,
    CalledConfig,
    CallSource,
    ForwardCall,
)
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.peft.adapter import TARGET_MODULES, Adapter, LoraConfig, init_adapter
from flexllm_jax.peft.bank import from_row, to_row
from flexllm_jax.peft.directory import NoFreeSlot


class ModelError(UserError):
    """A model that cannot be made, or a call to one that is not there; one line."""


@dataclass(frozen=True, eq=False)
class ReadyState:
    """A state in the bank's shapes, but for the adapter, which says what it is like: its weights
    take no memory."""

    adapter: Adapter
    kept: dict[str, Any]
    scales: list
    step: int


class TrainingModels:
    """All models of an engine."""

    def __init__(self, engine: Engine):
        self._engine, self._base = engine, engine.config.model.path
        self._turns = ModelTurns(engine)
        runner, section = engine.runner, engine.config.finetune
        self._max_tokens, page = section.max_tokens, runner.sizes.page_size
        # Two microbatches shall fit at once, and a unit costs the same however full its slice is.
        unit = section.unit_tokens
        self._pack_tokens = max(unit, section.max_tokens // 2 // unit * unit)
        # Each sequence has pages of its own.
        pages = runner.num_pages - self._pack_tokens // page
        self._most_sequences = max(1, min(FINETUNE_SEQUENCES, pages))
        self.max_datum_tokens = min(
            section.max_tokens, runner.sizes.max_model_len, runner.num_pages * page
        )

    @property
    def models(self) -> Mapping[str, Model]:
        """By name."""
        return self._turns.models

    @property
    def num_resting(self) -> int:
        """Those that have a slot and nothing to do with it."""
        return len(self._turns.resting)

    def park_one(self) -> bool:
        """Free the slot of one of those; whether there was one."""
        return self._turns.park_one()

    # -- making them ------------------------------------------------------------------------------

    def fresh(self, rank: int, seed: int, alpha: float = 32.0, **choices: bool) -> SavedState:
        """In any thread: an adapter that changes nothing yet, of the modules that are chosen (all
        of `saved_state.CHOICES` unless they are False). ModelError, naming both ways out, when the
        bank has no room for such a one."""
        bank = self._engine.runner.sizes.bank
        if not 1 <= rank <= bank.rank:
            raise ModelError(
                f"rank={rank}: this server trains ranks from 1 to {bank.rank}; choose one of them, "
                "or raise adapters.max_rank in its configuration"
            )
        modules: list[str] = []
        model = self._engine.runner.model
        for choice, known in CHOICES.items():
            names = [name for name in known if TARGET_MODULES[name] in model.projections]
            lacking = [name for name in names if TARGET_MODULES[name] not in bank.modules]
            if choices.get(choice, True) and lacking:
                raise ModelError(
                    f"{choice}=True: this server has no room for LoRA on {', '.join(lacking)}; "
                    f"create the model with {choice}=False, or add them to adapters.target_modules "
                    "in its configuration"
                )
            modules += names if choices.get(choice, True) else ()
        if not modules:
            raise ModelError(f"{', '.join(CHOICES)} are all false: choose at least one")
        config = LoraConfig(rank, alpha, tuple(modules))
        return SavedState(init_adapter(config, model, seed))

    def read(self, folder: Path, *, optimizer: bool) -> SavedState:
        """In any thread: a state that was saved; without `optimizer` the weights of any PEFT folder
        of LoRA. AdapterError."""
        return load_state(folder, self._engine.runner.model, self._base, optimizer=optimizer)

    def ready(self, start: SavedState) -> ReadyState:
        """In any thread: a state as the device takes it. AdapterError when the bank cannot hold
        it."""
        sizes, config = self._engine.runner.sizes, start.adapter.config
        to_bank = partial(to_row, config=sizes.model, shape=sizes.bank, name="of the model")
        values, scales = to_bank(start.adapter)
        kept: dict[str, Any] = {"master": values}
        if start.moments is not None:
            parts = {
                part: to_bank(Adapter(config, own)).weights for part, own in start.moments.items()
            }
            shapes = sizes.job_states["adamw"]["optimizer"]
            kept["optimizer"] = with_parts(shapes, parts, start.step)
        return ReadyState(_hollow(start.adapter), kept, scales, start.step)

    def create(self, name: str, start: ReadyState, weight: float = 1.0) -> dict[str, Any]:
        """In the engine's thread: make a model; returns what it is like."""
        if name in self.models:
            if self.models[name].job.running:
                raise ModelError(f"model {name!r} is there already")
            self.delete(name)
        config, trainer = start.adapter.config, self._engine.trainer
        source = CallSource(self._max_tokens, self._pack_tokens, self._most_sequences)
        source.held, source.steps = True, start.step
        job = FinetuneJob(CalledConfig(name, weight), config, start.adapter, source)
        trainer.enter(job)
        self._turns.models[name] = Model(job, source, start.scales, Parked(start.kept))
        return {
            **describe(_lora(config)),
            "step": start.step,
            "max_datum_tokens": self.max_datum_tokens,
        }

    def delete(self, name: str) -> None:
        """In the engine's thread: forget a model, if it is there; its calls fail."""
        model = self._turns.models.pop(name, None)
        if model is not None:
            self._engine.trainer.fail(name, "the model was deleted")
            self._engine.trainer.jobs.pop(name, None)

    def _model(self, name: str) -> Model:
        model = self.models.get(name)
        if model is None or not model.job.running:
            why = f" any more: {model.job.reason}" if model else ""
            raise ModelError(f"model {name!r} is not there{why}; create one from a saved state")
        return model

    # -- calls ------------------------------------------------------------------------------------

    def forward_call(
        self,
        data: Sequence[GivenDatum],
        loss: str,
        settings: Mapping[str, Any],
        *,
        backward: bool,
    ) -> ForwardCall:
        """Log-probabilities (`source.Scores`), and unless `backward` is False a part of the next
        step's gradient. ValueError, naming the datum and the field."""
        kind = read_loss(loss, settings)
        vocab_size = self._engine.runner.model.vocab_size
        read = read_data(data, kind, vocab_size, self.max_datum_tokens)
        return ForwardCall(data=read, loss=kind, backward=backward)

    def save_state_call(self, folder: Path) -> AsideCall:
        """The bytes that the model's state takes on disk, once it is there."""
        model, base = self._engine.runner.model, self._base
        call = AsideCall()
        call.do = partial(self._save, call, lambda state: save_state(state, model, base, folder))
        return call

    def save_adapter_call(self, folder: Path, serve_as: str | None = None) -> AsideCall:
        """The bytes that the model's adapter takes on disk, once it is there; it is served as it is
        then by the name `serve_as`, if there is a slot, from before that."""
        model, base = self._engine.runner.model, self._base
        write = partial(save_weights, model=model, base=base, folder=folder)
        call = AsideCall()
        call.do = partial(self._save, call, lambda state: write(state.adapter), serve_as=serve_as)
        return call

    def load_call(self) -> AsideCall:
        """Holds the place in the order of a state that is still to be read; `loaded` brings it. The
        steps that it had done are the answer."""
        return AsideCall(changes_weights=True, ready=False)

    def add(self, name: str, call: Call) -> None:
        """Have a call carried out after those before it; its future is answered then. ModelError
        when the model is not there."""
        model = self._model(name)
        now = time.monotonic()
        if model.parked is not None and not model.source.unanswered:
            model.since = now
        model.used = now
        model.source.add(call)

    def loaded(self, name: str, call: AsideCall, state: ReadyState | Exception) -> None:
        """What a place is held for has been read, or cannot be."""
        call.ready = True
        try:
            if isinstance(state, Exception):
                raise state
            model = self._model(name)
            config, own = _lora(state.adapter.config), _lora(model.job.peft)
            if model.job.shapes != state.adapter.shapes or config.alpha != own.alpha:
                raise ModelError(
                    f"the state is of {describe(config)}, the model of {describe(own)}: create a "
                    "model from the state instead"
                )
        except Exception as error:
            call.fail(error)
        else:
            call.do = partial(self._load, call, model, state)

    # -- in their turn ----------------------------------------------------------------------------

    def _save(
        self,
        call: AsideCall,
        write: Callable[[SavedState], int],
        job: FinetuneJob,
        serve_as: str | None = None,
    ) -> Callable[[], None]:
        runner = self._engine.runner
        try:
            with room_for(f"a copy of model {job.name!r}"):
                snapshot = runner.copy_state(job.state, job.optimizer)
                if serve_as is not None:
                    self._serve(job, serve_as)
        except OutOfMemory as error:
            call.fail(RuntimeError(str(error)))
            return _nothing

        def in_writer() -> None:
            try:
                size = write(self._saved_state(job, jax.tree.map(np.asarray, snapshot)))
            except Exception as error:  # a full disk, a lost device: of many kinds
                call.fail(RuntimeError(" ".join(str(error).split()) or type(error).__name__))
            else:
                call.answer(size)

        self._engine.trainer.writer.submit(in_writer)
        return _nothing

    def _serve(self, job: FinetuneJob, name: str) -> None:
        """Serve a model's adapter as it is; without a slot it is loaded from its folder."""
        try:
            published = self._engine.adapters.directory.publish(name, job.peft, job.shapes)
        except NoFreeSlot:
            return
        self._engine.runner.copy_adapter(job.bank_slot, published.bank_slot)

    def _saved_state(self, job: FinetuneJob, arrays: dict[str, Any]) -> SavedState:
        """What a copy of a job's state says, without the bank's padding."""
        stacks = self._engine.runner.sizes.stacks
        whole = partial(from_row, config=job.peft, shapes=job.shapes, stacks=stacks)
        parts, step = optimizer_parts(arrays["optimizer"])
        moments = {name: whole(values).weights for name, values in parts.items()}
        return SavedState(whole(arrays["master"]), moments, step)

    def _load(
        self, call: AsideCall, model: Model, state: ReadyState, job: FinetuneJob
    ) -> Callable[[], None]:
        try:
            with room_for(f"a state of model {job.name!r}"):
                self._engine.trainer.place(job, state.kept, state.scales)
        except OutOfMemory as error:
            call.fail(RuntimeError(str(error)))
            return _nothing
        job.has_gradient = False

        def read() -> None:
            model.source.steps = state.step
            call.answer(state.step)

        return read


def _nothing() -> None:
    """No results are to be read."""


def _lora(config: Any) -> LoraConfig:
    assert isinstance(config, LoraConfig)
    return config


def _hollow(adapter: Adapter) -> Adapter:
    """An adapter of the same shapes without memory for its weights."""
    weights = {
        site: {name: np.broadcast_to(np.float32(0), shape) for name, shape in own.items()}
        for site, own in adapter.shapes.items()
    }
    return Adapter(adapter.config, weights)
