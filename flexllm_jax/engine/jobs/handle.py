"""A user's handle on a finetuning job that runs in the engine's thread."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexllm_jax.engine.loop import EngineLoop
from flexllm_jax.finetune.job import FinetuneJob


@dataclass
class JobHandle:
    """A user's handle on a finetuning job: how far it is, and what can be done with it."""

    _job: FinetuneJob
    _loop: EngineLoop
    name: str = field(init=False)

    def __post_init__(self):
        self.name = self._job.name

    @property
    def status(self) -> str:
        """running, paused, succeeded, failed or cancelled."""
        return "paused" if self._job.running and self._job.paused else self._job.status.value

    @property
    def reason(self) -> str | None:
        """Why it failed or was cancelled."""
        return self._job.reason

    @property
    def losses(self) -> list[float]:
        """Mean loss of every optimizer step so far."""
        return list(self._job.losses)

    @property
    def validation_losses(self) -> list[tuple[int, float]]:
        """(optimizer step, mean loss) of every validation so far."""
        return list(self._job.validation_losses)

    @property
    def metrics(self) -> list[dict[str, float]]:
        """What every optimizer step so far measured: `loss`, `gradient_norm`, and what the job's
        method reports."""
        return list(self._job.metrics)

    @property
    def validations(self) -> list[tuple[int, dict[str, float]]]:
        """(optimizer step, what was measured) of every validation so far."""
        return list(self._job.validations)

    @property
    def sampled_tokens(self) -> int:
        """Of a reinforcement job: tokens of the answers that it has given itself in this run."""
        return self._job.sampled_tokens

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Of a reinforcement job: the answers that the last batch was trained on, each with its
        `item` (the row), `text`, `reward`, and `error` if it could not be graded."""
        return list(self._job.samples)

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self._job.step

    @property
    def total_steps(self) -> int:
        """Optimizer steps in all."""
        return self._job.total_steps

    @property
    def tokens(self) -> int:
        """Forward tokens of this run, up to the last step done."""
        return self._job.tokens

    @property
    def tokens_per_s(self) -> float:
        """Forward tokens over wall time."""
        return self._job.tokens_per_s

    @property
    def step_times(self) -> list[float]:
        """When each optimizer step of this run was done (time.monotonic)."""
        return list(self._job.step_times)

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the pace so far."""
        return self._job.eta_s

    @property
    def messages(self) -> list[str]:
        """Warnings: rows skipped, checkpoints that could not be written."""
        return list(self._job.messages)

    @property
    def adapter_dir(self) -> Path | None:
        """Where the finished adapter lies in PEFT's format."""
        return self._job.adapter_dir

    def wait(self, timeout: float | None = None) -> "JobHandle":
        """Wait until it has ended and what it leaves behind is on disk: its last checkpoint, and
        its adapter if it succeeded. TimeoutError after `timeout` seconds."""
        if not self._job.ended.wait(timeout):
            raise TimeoutError(f"job {self.name!r} is still running after {timeout} s")
        return self

    def publish(self) -> int:
        """Serve what it has learnt so far under its name; returns the version."""
        return self._loop.call(lambda: self._loop.engine.adapters.publish_job(self._job).version)

    def pause(self) -> None:
        """Let it wait from the next step on; what it has learnt stays on the device."""
        self._loop.call(lambda: self._loop.engine.trainer.pause(self._job))

    def resume(self) -> None:
        """Let it go on."""
        self._loop.call(lambda: self._loop.engine.trainer.resume(self._job))

    def cancel(self) -> None:
        """Stop it, and wait until it has ended; its last checkpoint stays."""
        self._loop.call(lambda: self._loop.engine.trainer.cancel(self._job))
        self._job.ended.wait()
