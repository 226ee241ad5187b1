"""A finetuning job on the host: its device state, its source of work, and what it has achieved.

The engine carries out what the source hands over whenever the scheduler finds time, and tells the
job when an optimizer step is dispatched and, a step later, what it measured. A microbatch belongs
to one job alone, so a job that diverges can never touch another's gradients.
"""

import enum
import logging
import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flexllm_jax.config import FinetuneConfig
from flexllm_jax.finetune.calls.source import CalledConfig, CallSource, ModelGone
from flexllm_jax.finetune.dataset import DatasetSource
from flexllm_jax.finetune.microbatch import PackedMicrobatch
from flexllm_jax.finetune.reinforcement.episodes import Sampler
from flexllm_jax.finetune.reinforcement.source import ReinforcementSource
from flexllm_jax.finetune.source import Aside, Measured, Step
from flexllm_jax.peft.adapter import Adapter, AdapterConfig, LoraConfig, Site

log = logging.getLogger(__name__)


class JobStatus(enum.Enum):
    """Where a job is."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass
class FinetuneJob:
    """One job in the engine that runs it: its source of work, what it has achieved, and the device
    state that the engine keeps in it. (`llm.JobHandle` is a user's handle on it, the
    scheduler's `Share` its part of the finetuning tokens, the server's `JobRow` what the database
    says of it, `JobReport` what an engine tells the server.)

    `step` counts optimizer steps whose results are known; `dispatched` those under way too.
    """

    config: FinetuneConfig | CalledConfig
    peft: AdapterConfig
    adapter: Adapter  # the adapter it starts from
    source: DatasetSource | ReinforcementSource | CallSource
    bank_slot: int = 0
    state: dict = field(default_factory=dict, repr=False)  # on the device
    scales: list = field(
        default_factory=list, repr=False
    )  # of the adapter, by layer, on the device
    status: JobStatus = JobStatus.RUNNING
    closed: bool = False  # there is no more to do for it than to write what it leaves behind
    paused: bool = False  # it is running, and waits to be resumed
    reason: str | None = None
    step: int = 0
    dispatched: int = 0
    has_gradient: bool = False  # a microbatch is committed since the last step
    in_order: deque[PackedMicrobatch | Step | Aside] = field(default_factory=deque, repr=False)
    trained_ranks: Any = field(default=None, repr=False)  # `bank.trained_ranks`, on the device
    weights_version: int = 0  # steps handed over, and what else changes the adapter
    metrics: list[dict[str, float]] = field(default_factory=list)  # of every step
    step_times: list[float] = field(default_factory=list)  # of this run's steps, time.monotonic
    validations: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    tokens: int = 0  # forward tokens of this run, up to the last step done
    tokens_pending: int = 0  # the same, up to the last microbatch dispatched
    earlier_tokens: int = 0  # the same, of the runs that it goes on from
    forwarded: int = 0  # tokens of this run that went forward, validation's and repeats too
    backwarded: int = 0  # tokens of this run whose gradients are computed
    resumed_from: int = 0
    made_with: dict[str, Any] = field(default_factory=dict, repr=False)  # see `resume`
    started_at: float = field(default_factory=time.monotonic)
    finished_at: float | None = None
    adapter_dir: Path | None = None
    messages: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event, repr=False)

    def __post_init__(self):
        self._position = self.source.position()
        self.versions: dict[int, Any] = {}  # that its source needs after `dispatched` steps

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The answers that a reinforcement job was trained on last."""
        return self.reinforcement.samples if self.reinforcement else []

    @property
    def sampled_tokens(self) -> int:
        """Tokens of its own answers in this run."""
        return self.sampler.tokens if self.sampler else 0

    @property
    def sampler(self) -> Sampler | None:
        """Who plays the episodes of a reinforcement job."""
        return self.reinforcement.sampler if self.reinforcement else None

    @property
    def name(self) -> str:
        """The job's name, also its adapter's."""
        return self.config.name

    @property
    def optimizer(self) -> str:
        """Which optimizer it has."""
        return self.config.optimizer.type

    @property
    def method(self) -> str:
        """How it is trained: `method.type`, or by calls."""
        return self.config.method.type if isinstance(self.config, FinetuneConfig) else "calls"

    @property
    def writes_checkpoints(self) -> bool:
        """Whether it goes on from its own checkpoints; else its client saves what it needs."""
        return isinstance(self.config, FinetuneConfig)

    @property
    def shapes(self) -> dict[Site, dict[str, tuple[int, ...]]]:
        """Shapes of the adapter's weights."""
        return self.adapter.shapes

    @property
    def lora_dropout(self) -> float:
        """Probability of dropout in training; 0: none."""
        return self.peft.lora_dropout if isinstance(self.peft, LoraConfig) else 0.0

    @property
    def total_steps(self) -> int:
        """Optimizer steps in all; 0: no end is known."""
        return self.source.total_steps or 0

    @property
    def losses(self) -> list[float]:
        """Mean loss of every step."""
        return [metrics["loss"] for metrics in self.metrics]

    @property
    def gradient_norms(self) -> list[float]:
        """Norm of every step's gradient, before clipping."""
        return [metrics["gradient_norm"] for metrics in self.metrics]

    @property
    def validation_losses(self) -> list[tuple[int, float]]:
        """(optimizer step, mean loss) of every validation."""
        return [(step, m["loss"]) for step, m in self.validations if "loss" in m]

    @property
    def running(self) -> bool:
        """Whether the job has not ended; it may be paused."""
        return self.status is JobStatus.RUNNING and not self.closed

    @property
    def tokens_per_s(self) -> float:
        """Forward tokens over wall time, as the paper counts."""
        wall = (self.finished_at or time.monotonic()) - self.started_at
        return self.tokens / wall if wall > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds to the last step at the pace so far; None before the first step, or when there is
        no last one."""
        done = self.step - self.resumed_from
        if not done or not self.total_steps:
            return None
        return (time.monotonic() - self.started_at) / done * (self.total_steps - self.step)

    @property
    def position(self) -> dict[str, Any]:
        """Where its source is after `dispatched` optimizer steps."""
        return self._position

    def restore(self, step: int, info: dict) -> None:
        """Go on from a checkpoint taken after optimizer step `step`. ValueError, naming the field,
        when its source cannot."""
        if "metrics" not in info:  # an older checkpoint has these two alone
            kept = zip(info["losses"], info["gradient_norms"], strict=True)
            info = info | {
                "metrics": [{"loss": loss, "gradient_norm": norm} for loss, norm in kept],
                "validations": [(at, {"loss": loss}) for at, loss in info["validation_losses"]],
            }
        self.source.restore(step, info)
        self._position = self.source.position()
        self.step = self.dispatched = self.resumed_from = step
        self.earlier_tokens = int(info.get("tokens", 0))  # older checkpoints do not say
        self.metrics = list(info["metrics"])
        self.validations = [(int(at), measured) for at, measured in info["validations"]]

    @property
    def reinforcement(self) -> ReinforcementSource | None:
        """Its source, if it learns from rewards."""
        return self.source if isinstance(self.source, ReinforcementSource) else None

    def checkpoint_info(self, position: dict[str, Any]) -> dict:
        """What a checkpoint of the steps done so far keeps beside the arrays."""
        return position | {
            "tokens": self.earlier_tokens + self.tokens,
            "metrics": list(self.metrics),
            "validations": list(self.validations),
            "total_steps": self.total_steps,
            "made_with": self.made_with,
        }

    def next(self) -> PackedMicrobatch | Step | Aside | None:
        """What its source hands over next, noted in `in_order` until it is carried out."""
        while isinstance(item := self.source.next() if self.running else None, Measured):
            self.validations.append((item.step, item.metrics))
        if item is not None:
            self.in_order.append(item)
            aside = isinstance(item, Aside) and item.changes_weights
            self.weights_version += isinstance(item, Step) or aside
        return item

    # -- progress ---------------------------------------------------------------------------------

    def step_dispatched(self, step: Step) -> None:
        """An optimizer step is on its way."""
        self.dispatched += 1
        self.has_gradient = False
        self._position, self.versions = step.position, step.versions

    def step_done(self, measured: dict[str, float], tokens: int) -> str | None:
        """An optimizer step's results (see `optimizer_step`), and the run's tokens up to it.

        Returns why the job cannot go on when a result is not finite.
        """
        metrics = self.source.stepped(measured)
        self.tokens = tokens
        if metrics is None:  # its client is told
            return None
        wrong = [f"{name} {v}" for name, v in metrics.items() if not math.isfinite(v)]
        if wrong:
            return (
                f"job {self.name!r} stopped: {', '.join(wrong)} at step {self.step + 1} is not "
                f"finite; lower optimizer.lr ({self.config.optimizer.lr}), optimizer.clip or what "
                f"method {self.method} is set to, and resume"
            )
        del metrics["weight_norm"]
        self.step += 1
        self.metrics.append(metrics)
        self.step_times.append(time.monotonic())
        return None

    def scored(self, packed: PackedMicrobatch, logprob: np.ndarray) -> None:
        """The log-probabilities of a microbatch's labels [tokens]."""
        if validation := self.source.scored(packed, logprob):
            self.validations.append((self.step, validation))

    @property
    def complete(self) -> bool:
        """Whether all is done that its source has to do."""
        return self.source.finished

    def note(self, text: str) -> None:
        """Keep a warning, and log it; once, however often it is given."""
        if text not in self.messages:
            self.messages.append(text)
            log.warning("job %s: %s", self.name, text)

    def close(self) -> None:
        """Hand out nothing more; `finish` follows once all that it leaves behind is written."""
        self.closed = True
        self.in_order.clear()
        if isinstance(self.source, CallSource):
            self.source.fail(ModelGone(self.reason or "the engine was stopped"))

    def finish(self, status: JobStatus, reason: str | None = None) -> None:
        """The job has ended, and what `status` promises is on disk."""
        self.status, self.reason = status, reason
        self.close()
        self.finished_at = time.monotonic()
        self.ended.set()
