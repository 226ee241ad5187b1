"""What the HTTP process can ask of the engine beside generating: adapters and finetuning jobs.

Each method runs in a worker thread of the engine process, reads its files there, and asks the
engine's thread only for the last step. ValueError, in one line, is the caller's fault.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flexllm_jax.config import Config, FinetuneConfig, build_config
from flexllm_jax.engine.calls.models import TrainingModels
from flexllm_jax.engine.engine import Engine
from flexllm_jax.engine.loop import EngineLoop
from flexllm_jax.finetune.create import create_job
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.reinforcement.make import Play
from flexllm_jax.peft.adapter import Adapter
from flexllm_jax.peft.bank import AdapterRow
from flexllm_jax.peft.directory import NoFreeSlot
from flexllm_jax.peft.hf.peft import is_adapter, load_adapter, save_adapter
from flexllm_jax.server.engines.facts import FactBook

_FORGOTTEN_AFTER_S = 60.0  # a job's end
_YIELDS_S = 1.0  # that a job's answers leave a slot to who waits for it
_RESULT_S = 600.0  # a trained job waits so long for room on the disk


class EngineCalls:
    """The methods a `Call` may name."""

    def __init__(self, config: Config, engine: Engine, loop: EngineLoop, tokenizer: Any):
        self._config, self._engine, self._loop = config, engine, loop
        self._tokenizer = tokenizer
        # Of adapters that can be loaded again.
        self._paths = {a.name: str(a.path) for a in config.adapters.preload}
        self._used: dict[str, float] = {}  # when an adapter was last asked for
        self._loaded: dict[str, float] = {}  # and loaded
        self.on_unload: Callable[[str], None] = lambda name: None
        self.facts = FactBook(_FORGOTTEN_AFTER_S)
        self.models = TrainingModels(engine)
        directory = engine.adapters.directory
        directory.rooms.insert(0, self)  # before those of answers
        engine.trainer.writer.on_checkpoint = self._keep_checkpoint
        engine.trainer.writer.keep_trying_s = _RESULT_S

    # -- adapters ---------------------------------------------------------------------------------

    def load_adapter(self, name: str, path: str) -> int:
        """Serve a PEFT folder as a new version of `name`; returns the version, or 0 when all slots
        are in use: then it is loaded when it is asked for."""
        adapter, row = self.read_adapter(name, path)

        def publish() -> int:
            try:
                return self.publish(name, path, adapter, row)
            except NoFreeSlot:
                if name in self._engine.adapters.directory.current:
                    self._engine.adapters.unload(name)  # requests to it finish; none may follow
                self._paths[name] = path
                return 0

        return self._loop.call(publish)

    def read_adapter(self, name: str, path: str) -> tuple[Adapter, AdapterRow]:
        """A PEFT folder, and what it is in the bank."""
        model = self._engine.runner.model
        adapter = load_adapter(Path(path), model, self._config.model.path)
        return adapter, self._engine.adapters.to_row(name, adapter)

    def publish(self, name: str, path: str, adapter: Adapter, row: AdapterRow) -> int:
        """In the engine's thread: serve what was read; returns the version. NoFreeSlot."""
        version = self._engine.adapters.publish(name, adapter, row).version
        self._paths[name] = path
        self._used[name] = self._loaded[name] = time.monotonic()
        return version

    def slots_to_be_had(self) -> int:
        """In the engine's thread: free slots, and those of adapters that can be evicted."""
        return self._engine.adapters.directory.num_to_be_had

    @property
    def num_giving_up(self) -> int:
        """Adapters that only finish their requests; then their slots are free."""
        return len(self._engine.adapters.directory.retired)

    def give_up_oldest(self, before: float) -> None:
        """In the engine's thread: of adapters loaded `before`, the first takes no more requests;
        where there is none, the answers of jobs make room."""
        jobs = self._engine.trainer.jobs
        loaded = [
            name
            for name, own in self._engine.adapters.directory.current.items()
            if name in self._paths and name not in jobs and not own.pins
            if self._loaded.get(name, 0.0) < before
        ]
        if loaded:
            self._engine.adapters.unload(min(loaded, key=lambda n: self._loaded.get(n, 0.0)))
        else:
            self._engine.versions.yield_oldest(_YIELDS_S)

    def is_loaded(self, name: str) -> bool:
        """In the engine's thread: whether requests for `name` can be queued; counts as use."""
        self._used[name] = time.monotonic()
        return name in self._engine.adapters.directory.current

    @property
    def num_to_be_had(self) -> int:
        """Slots of what can be evicted (`directory.Room`)."""
        return len(self._idle()) + self.models.num_resting

    def make(self) -> bool:
        """Unload the idle adapter that was asked for the longest ago, of those that can come back,
        or let a model that is trained by calls wait in the host's memory; False: there is none."""
        name = min(self._idle(), key=lambda name: self._used.get(name, 0.0), default=None)
        if name is None:
            return self.models.park_one()
        self._engine.adapters.unload(name)
        return True

    def _idle(self) -> list[str]:
        current = self._engine.adapters.directory.current
        return [name for name in self._paths if name in current and not current[name].users]

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it finish."""

        def unload() -> None:
            self._paths.pop(name, None)
            if name in self._engine.adapters.directory.current:
                self._engine.adapters.unload(name)
            self.on_unload(name)

        self._loop.call(unload)

    def can_come_back(self, name: str, path: str) -> None:
        """In the engine's thread: an adapter that is served already may be loaded from there."""
        self._paths[name] = path
        self._used[name] = self._loaded[name] = time.monotonic()

    # -- models that clients train ----------------------------------------------------------------

    def create_training_model(
        self, model: str, rank: int, seed: int, weight: float = 1.0, **choices: Any
    ) -> dict[str, Any]:
        """Make a model that is trained by calls (`training`); returns what it is like. `choices`:
        alpha, train_mlp, train_attn, train_unembed."""
        start = self.models.ready(self.models.fresh(rank, seed, **choices))
        return self._loop.call(self.models.create, model, start, weight)

    def create_training_model_from(
        self, model: str, path: str, optimizer: bool, weight: float = 1.0
    ) -> dict[str, Any]:
        """The same from a state that was saved, or without `optimizer` from any PEFT folder."""
        start = self.models.ready(self.models.read(Path(path), optimizer=optimizer))
        return self._loop.call(self.models.create, model, start, weight)

    def delete_training_model(self, model: str) -> None:
        """Forget a model; its calls fail."""
        self._loop.call(self.models.delete, model)

    # -- jobs -------------------------------------------------------------------------------------

    def start_job(
        self, config: dict[str, Any], losses_known: int, asked: Mapping[str, str]
    ) -> None:
        """Start a job, or go on with it from its newest checkpoint. `losses_known`: steps from the
        first on whose losses need not be told. `asked`: adapters that its grader asks, and their
        folders. ValueError; it says "no free slot" where one may be free later."""
        job = create_job(
            build_config(config, "job", FinetuneConfig),
            self._engine.runner.model,
            self._config.model.path,
            self._tokenizer,
            self._config.finetune,
            self._engine.runner.sizes.max_model_len,
            Play(graders=self._config.graders),
        )
        job.messages.clear()  # the HTTP process has read the files too, and told of their rows

        read = {name: (path, *self.read_adapter(name, path)) for name, path in asked.items()}

        def start() -> None:
            directory, kept = self._engine.adapters.directory, []
            try:
                for name, content in read.items():
                    if not self.is_loaded(name):
                        self.publish(name, *content)
                    kept.append(directory.acquire(name))  # it is not evicted for the next
                self._engine.add_job(job)
            finally:
                for adapter in kept:
                    directory.release(adapter)
            self.facts.begin(job, losses_known)
            step = job.resumed_from
            if job.running and step and not is_adapter(self._adapter_folder(job.name, step)):
                self._engine.trainer.export_checkpoint(job)  # killed before it was written

        self._loop.call(start)
        self._paths[job.name] = str(self._config.output_dir / job.name / "adapter")

    def pause_job(self, name: str) -> None:
        """Let a job wait from the next step on."""
        self._loop.call(lambda: self._engine.trainer.pause(self._job(name)))

    def resume_job(self, name: str) -> None:
        """Let a paused job go on."""
        self._loop.call(lambda: self._engine.trainer.resume(self._job(name)))

    def cancel_job(self, name: str) -> None:
        """Stop a job; what it leaves behind is on disk then."""
        job = self._loop.call(self._job, name)
        self._loop.call(self._engine.trainer.cancel, job)
        job.ended.wait()

    def _job(self, name: str) -> FinetuneJob:
        job = self._engine.trainer.jobs.get(name)
        if job is None:
            raise ValueError(f"job {name!r} is not in the engine")
        return job

    def _adapter_folder(self, name: str, step: int) -> Path:
        return self._config.output_dir / name / "adapters" / f"step-{step}"

    def _keep_checkpoint(self, job: FinetuneJob, step: int, adapter: Adapter) -> None:
        """In the thread that writes checkpoints: the adapter of one in PEFT's format."""
        model, base = self._engine.runner.model, self._config.model.path
        save_adapter(adapter, model, base, self._adapter_folder(job.name, step))
        self.facts.checkpoint(job.name, step)

    def forget_ended(self) -> None:
        """Let go of jobs whose end has been heard of: an ended job holds its data."""
        for job in self.facts.forgettable():
            self._loop.post(partial(self._forget, job))

    def _forget(self, job: FinetuneJob) -> None:
        """In the engine's thread."""
        if self._engine.trainer.jobs.get(job.name) is job:
            del self._engine.trainer.jobs[job.name]
