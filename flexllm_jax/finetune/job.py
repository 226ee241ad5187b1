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
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flexllm_jax.config import (
    PREFERENCE_METHODS,
    FinetuneConfig,
    FinetuneSection,
    PeftConfig,
    ReinforcementConfig,
)
from flexllm_jax.finetune.data import load_dataset
from flexllm_jax.finetune.dataset import DatasetSource, Method, Supervised
from flexllm_jax.finetune.microbatch import PackedMicrobatch
from flexllm_jax.finetune.preference import Preference
from flexllm_jax.finetune.reinforcement.episodes import Sampler
from flexllm_jax.finetune.reinforcement.make import Play, reinforcement_source
from flexllm_jax.finetune.reinforcement.source import ReinforcementSource
from flexllm_jax.finetune.source import Measured, Step
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.hf_kernels import read_kernel
from flexllm_jax.peft.adapter import (
    Adapter,
    AdapterConfig,
    AdapterError,
    LoraConfig,
    Site,
    init_adapter,
)
from flexllm_jax.peft.bottleneck import BottleneckConfig
from flexllm_jax.peft.hf_peft import load_adapter
from flexllm_jax.peft.ia3 import Ia3Config
from flexllm_jax.peft.prefix import PrefixConfig
from flexllm_jax.peft.principal import initialize_from_base

log = logging.getLogger(__name__)

# By `method.type`: how rows are trained on.
_METHODS: dict[str, Callable[[Any], Method]] = {
    "supervised": lambda _: Supervised(),
    **dict.fromkeys(PREFERENCE_METHODS, Preference),
}


class JobStatus(enum.Enum):
    """Where a job is."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


def create_job(
    config: FinetuneConfig,
    model: ModelConfig,
    model_path: Path,
    tokenizer: Any,
    section: FinetuneSection,
    max_model_len: int,
    play: Play | None = None,
) -> "FinetuneJob":
    """Load a job's data and its first adapter. `section`: the engine's part of the configuration.
    `play`: who gives the rewards of a reinforcement job.

    Rows that cannot be used are skipped and counted in the job's messages. Raises DatasetError or
    AdapterError, in one line, when nothing can be done with the data or the adapter.
    """
    max_tokens = section.max_tokens
    longest = min(config.max_seq_len or max_tokens, max_tokens, max_model_len)
    if config.init_adapter:
        adapter = load_adapter(config.init_adapter, model, model_path)
        adapter = _with_dropout(adapter, config.peft.lora_dropout)
    else:
        adapter = _fresh_adapter(_adapter_config(config.peft), model, model_path, config.seed)
    if config.optimizer.b_lr_ratio != 1 and adapter.config.kind != "lora":
        raise AdapterError(
            f"optimizer.b_lr_ratio={config.optimizer.b_lr_ratio}: an adapter of kind "
            f"{adapter.config.kind} has no B with a learning rate of its own; leave it out"
        )
    if config.optimizer.type == "muon" and adapter.config.kind != "lora":
        raise AdapterError(
            f"optimizer.type=muon: it changes factors of LoRA, and an adapter of kind "
            f"{adapter.config.kind} has none; use adamw"
        )
    unit = section.unit_tokens
    # Two microbatches shall fit at once, and a unit costs the same however full its slice is.
    half = max(unit, max_tokens // 2 // unit * unit)
    prefix = adapter.config.prefix_tokens
    if isinstance(config.method, ReinforcementConfig):
        source = reinforcement_source(
            config, tokenizer, model.vocab_size, longest, play, max_tokens, half, prefix
        )
    else:
        load = partial(
            load_dataset,
            tokenizer=tokenizer,
            format=config.format,
            max_seq_len=longest,
            train_on=config.train_on,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            pairs=config.method.pairs,
            max_pair_tokens=max_tokens,
        )
        dataset = load(config.dataset)
        validation = load(config.validation) if config.validation else None
        method = _METHODS[config.method.type](config.method)
        source = DatasetSource(config, method, dataset, validation, max_tokens, half, prefix)
    job = FinetuneJob(config, adapter.config, adapter, source)
    told = [
        data
        for data in (source.dataset, source.validation)
        if data and (data.skipped or data.unread)
    ]
    job.messages += [data.summary() for data in told]
    return job


def _fresh_adapter(
    config: AdapterConfig, model: ModelConfig, model_path: Path, seed: int
) -> Adapter:
    if not (isinstance(config, LoraConfig) and config.from_base):
        return init_adapter(config, model, seed)
    config, kernel = config.difference(), partial(read_kernel, model_path, model)
    return Adapter(config, initialize_from_base(config, model, seed, kernel))


def _with_dropout(adapter: Adapter, lora_dropout: float | None) -> Adapter:
    """An adapter of a file, which has the dropout that it was trained with until now unless told
    otherwise."""
    if lora_dropout is None or not isinstance(adapter.config, LoraConfig):
        return adapter
    return replace(adapter, config=replace(adapter.config, lora_dropout=lora_dropout))


def _adapter_config(peft: PeftConfig) -> AdapterConfig:
    """What the adapter of a job is to be."""
    if peft.type == "ia3":
        return Ia3Config()
    if peft.type == "bottleneck":
        return BottleneckConfig(peft.bottleneck_size)
    if peft.type == "prefix":
        return PrefixConfig(peft.num_virtual_tokens)
    return LoraConfig(
        r=peft.r,
        alpha=peft.alpha,
        target_modules=tuple(peft.target_modules),
        use_rslora=peft.use_rslora,
        rank_pattern=peft.rank_pattern,
        alpha_pattern=peft.alpha_pattern,
        layers_to_transform=peft.layers_to_transform,
        init=peft.init,
        lora_dropout=peft.lora_dropout or 0.0,
    )


@dataclass
class FinetuneJob:
    """One job in the engine that runs it: its source of work, what it has achieved, and the device
    state that the engine keeps in it. (`llm.JobHandle` is a user's handle on it, the
    scheduler's `Share` its part of the finetuning tokens, the server's `JobRow` what the database
    says of it, `JobReport` what an engine tells the server.)

    `step` counts optimizer steps whose results are known; `dispatched` those under way too.
    """

    config: FinetuneConfig
    peft: AdapterConfig
    adapter: Adapter  # the adapter it starts from
    source: DatasetSource | ReinforcementSource
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
    in_order: deque[PackedMicrobatch | Step] = field(default_factory=deque, repr=False)
    trained_ranks: Any = field(default=None, repr=False)  # `bank.trained_ranks`, on the device
    weights_version: int = 0  # steps handed over
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
        return self.source.samples if isinstance(self.source, ReinforcementSource) else []

    @property
    def sampled_tokens(self) -> int:
        """Tokens of its own answers in this run."""
        return self.sampler.tokens if self.sampler else 0

    @property
    def sampler(self) -> Sampler | None:
        """Who plays the episodes of a reinforcement job."""
        return getattr(self.source, "sampler", None)

    @property
    def name(self) -> str:
        """The job's name, also its adapter's."""
        return self.config.name

    @property
    def optimizer(self) -> str:
        """Which optimizer it has."""
        return self.config.optimizer.type

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
        """Optimizer steps in all."""
        return self.source.total_steps

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
        """Seconds to the last step at the pace so far; None before the first step."""
        done = self.step - self.resumed_from
        if not done:
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

    def thaw(self, number: int, values: list, scales: list) -> None:
        """Give its source a version of the adapter that a checkpoint kept."""
        if isinstance(self.source, ReinforcementSource) and self.source.sampler is not None:
            self.source.thaw(number, self.source.sampler.thaw(values, scales))

    def checkpoint_info(self, position: dict[str, Any]) -> dict:
        """What a checkpoint of the steps done so far keeps beside the arrays."""
        return position | {
            "tokens": self.earlier_tokens + self.tokens,
            "metrics": list(self.metrics),
            "validations": list(self.validations),
            "total_steps": self.total_steps,
            "made_with": self.made_with,
        }

    def next(self) -> PackedMicrobatch | Step | None:
        """What its source hands over next, noted in `in_order` until it is carried out."""
        while isinstance(item := self.source.next() if self.running else None, Measured):
            self.validations.append((item.step, item.metrics))
        if item is not None:
            self.in_order.append(item)
            self.weights_version += isinstance(item, Step)
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
        metrics = self.source.stepped() | measured
        wrong = [f"{name} {v}" for name, v in metrics.items() if not math.isfinite(v)]
        if wrong:
            return (
                f"job {self.name!r} stopped: {', '.join(wrong)} at step {self.step + 1} is not "
                f"finite; lower optimizer.lr ({self.config.optimizer.lr}), optimizer.clip or what "
                f"method {self.config.method.type} is set to, and resume"
            )
        del metrics["weight_norm"]
        self.step += 1
        self.tokens = tokens
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

    def finish(self, status: JobStatus, reason: str | None = None) -> None:
        """The job has ended, and what `status` promises is on disk."""
        self.close()
        self.status, self.reason = status, reason
        self.finished_at = time.monotonic()
        self.ended.set()
