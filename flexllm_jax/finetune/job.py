"""A finetuning job on the host: its data, its place in it, and what it has achieved.

The job hands out microbatches; the engine runs them whenever the scheduler finds time and tells the
job when an optimizer step is dispatched and, a step later, what it measured. A microbatch belongs
to one job alone, so a job that diverges can never touch another's gradients.
"""

import enum
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flexllm_jax.config import FinetuneConfig, FinetuneSection, PeftConfig
from flexllm_jax.finetune.data import BatchStream, Dataset, TrainingSequence, load_dataset, pack
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import (
    Adapter,
    AdapterConfig,
    LoraConfig,
    Site,
    init_adapter,
)
from flexllm_jax.peft.bottleneck import BottleneckConfig
from flexllm_jax.peft.hf_peft import load_adapter
from flexllm_jax.peft.ia3 import Ia3Config
from flexllm_jax.peft.prefix import PrefixConfig
from scheduler.request import Microbatch

log = logging.getLogger(__name__)


class JobStatus(enum.Enum):
    """Where a job is."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class PackedMicrobatch:
    """Sequences of one job that go through the model together.

    token, label, position and sequence_start are int32 [n], n the tokens of all sequences (see
    `finetune.buffers.MicrobatchTable`). `weights_version` differs between microbatches with an
    optimizer step in between. `ends_batch`: an optimizer step follows. `validation`: only its loss
    is wanted; `ends_validation`: it is the last of its pass.
    """

    microbatch_id: int
    job: "FinetuneJob"
    lengths: tuple[int, ...]
    token: np.ndarray
    label: np.ndarray
    position: np.ndarray
    sequence_start: np.ndarray
    weights_version: int
    ends_batch: bool = False
    validation: bool = False
    ends_validation: bool = False
    stream_state: dict | None = None  # of the data after this batch

    def as_planned(self) -> Microbatch:
        """What the scheduler needs to know of it."""
        return Microbatch(
            self.microbatch_id,
            self.lengths,
            not self.validation,
            self.job.name,
            self.weights_version,
        )


def create_job(
    config: FinetuneConfig,
    model: ModelConfig,
    model_path: Path,
    tokenizer: Any,
    section: FinetuneSection,
    max_model_len: int,
) -> "FinetuneJob":
    """Load a job's data and its first adapter. `section`: the engine's part of the configuration.

    Rows that cannot be used are skipped and counted in the job's messages. Raises DatasetError or
    AdapterError, in one line, when nothing can be done with the data or the adapter.
    """
    max_tokens = section.max_tokens
    longest = min(config.max_seq_len or max_tokens, max_tokens, max_model_len)
    load = partial(
        load_dataset,
        tokenizer=tokenizer,
        format=config.format,
        max_seq_len=longest,
        train_on=config.train_on,
        vocab_size=model.vocab_size,
        eos_token_ids=model.eos_token_ids,
    )
    dataset = load(config.dataset)
    validation = load(config.validation) if config.validation else None
    if config.init_adapter:
        adapter = load_adapter(config.init_adapter, model, model_path)
    else:
        adapter = init_adapter(_adapter_config(config.peft), model, config.seed)
    unit = section.unit_tokens
    # Two microbatches shall fit at once, and a unit costs the same however full its slice is.
    half = max(unit, max_tokens // 2 // unit * unit)
    job = FinetuneJob(config, adapter.config, adapter, dataset, validation, max_tokens, half)
    told = [data for data in (dataset, validation) if data and (data.skipped or data.unread)]
    job.messages += [data.summary() for data in told]
    return job


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
    )


def _pack_arrays(sequences: list[TrainingSequence], first_position: int) -> dict:
    labels = []
    for s in sequences:
        label = np.full(len(s), -1, np.int32)
        label[:-1] = np.where(s.loss_mask[1:], s.tokens[1:], -1)
        labels.append(label)
    lengths = tuple(len(s) for s in sequences)
    starts = np.cumsum([0, *lengths[:-1]])
    return {
        "lengths": lengths,
        "token": np.concatenate([s.tokens for s in sequences]).astype(np.int32),
        "label": np.concatenate(labels),
        "position": first_position
        + np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "sequence_start": np.repeat(starts, lengths).astype(np.int32),
    }


@dataclass
class FinetuneJob:
    """One job in the engine that runs it: its data, what it has handed out and achieved, and the
    device state that the engine keeps in it. (`llm.JobHandle` is a user's handle on it, the
    scheduler's `Share` its part of the finetuning tokens, the server's `JobRow` what the database
    says of it, `JobReport` what an engine tells the server.)

    `step` counts optimizer steps whose results are known; `dispatched` those under way too.
    """

    config: FinetuneConfig
    peft: AdapterConfig
    adapter: Adapter  # the adapter it starts from
    dataset: Dataset
    validation: Dataset | None
    max_tokens: int  # of a microbatch
    pack_tokens: int  # of a microbatch of several sequences
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
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)  # of this run's steps, time.monotonic
    validation_losses: list[tuple[int, float]] = field(default_factory=list)
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
        c = self.config
        self.stream = BatchStream(self.dataset, c.batch_tokens, c.seed)
        self.total_steps = c.steps or self.stream.batches_left(c.epochs or 1)
        self._ready: deque[PackedMicrobatch] = deque()
        self._data_position: dict = self.stream.state()
        self._batches_out = 0
        self._validation_sum = self._validation_labels = 0.0  # of the pass under way
        self._validations_left = 0  # microbatches prepared and not measured

    @property
    def name(self) -> str:
        """The job's name, also its adapter's."""
        return self.config.name

    @property
    def shapes(self) -> dict[Site, dict[str, tuple[int, ...]]]:
        """Shapes of the adapter's weights."""
        return self.adapter.shapes

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
    def data_position(self) -> dict:
        """Where in its data the job is after `dispatched` optimizer steps."""
        return self._data_position

    def restore(self, step: int, info: dict) -> None:
        """Go on from a checkpoint taken after optimizer step `step`, with what is left of the data.

        Raises ValueError, naming the field, when it is of other data, or past the job's end.
        """
        self.stream.restore(info["stream"])
        c = self.config
        self.total_steps = c.steps or step + self.stream.batches_left(c.epochs or 1)
        if step > self.total_steps:
            raise ValueError(
                f"steps={c.steps}: the checkpoint that job {self.name!r} would go on from has done "
                f"{step} steps; raise steps, or start anew with resume: false"
            )
        self._data_position = self.stream.state()
        self.step = self.dispatched = self._batches_out = self.resumed_from = step
        self.earlier_tokens = int(info.get("tokens", 0))  # older checkpoints do not say
        self.losses = list(info["losses"])
        self.gradient_norms = list(info["gradient_norms"])
        self.validation_losses = [(int(s), float(v)) for s, v in info["validation_losses"]]

    def checkpoint_info(self, data_position: dict) -> dict:
        """What a checkpoint of the steps done so far keeps beside the arrays."""
        return {
            "stream": data_position,
            "tokens": self.earlier_tokens + self.tokens,
            "losses": list(self.losses),
            "gradient_norms": list(self.gradient_norms),
            "validation_losses": list(self.validation_losses),
            "total_steps": self.total_steps,
            "made_with": self.made_with,
        }

    # -- microbatches -----------------------------------------------------------------------------

    def next_microbatch(self, ids: Iterator[int]) -> PackedMicrobatch | None:
        """The next microbatch in order, or None when all have been handed out."""
        if not self._ready and self._batches_out < self.total_steps:
            self._prepare(ids)
        if not self._ready or not self.running:
            return None
        return self._ready.popleft()

    def _prepare(self, ids: Iterator[int]) -> None:
        """Pack the next batch, and the validation set if it is due after it."""
        packed = pack(self.stream.next_batch(), self.max_tokens, self.pack_tokens)
        self._batches_out += 1
        state = self.stream.state()
        for i, sequences in enumerate(packed):
            last = i == len(packed) - 1
            self._ready.append(
                PackedMicrobatch(
                    next(ids),
                    self,
                    **_pack_arrays(sequences, self.peft.prefix_tokens),
                    weights_version=2 * self._batches_out,
                    ends_batch=last,
                    stream_state=state if last else None,
                )
            )
        if self.validation is None:
            return
        every = self.config.validation_every
        if self._batches_out == self.total_steps or (every and self._batches_out % every == 0):
            packed = pack(self.validation.sequences, self.max_tokens, self.pack_tokens)
            self._validations_left += len(packed)
            for i, sequences in enumerate(packed):
                self._ready.append(
                    PackedMicrobatch(
                        next(ids),
                        self,
                        **_pack_arrays(sequences, self.peft.prefix_tokens),
                        weights_version=2 * self._batches_out + 1,
                        validation=True,
                        ends_validation=i == len(packed) - 1,
                    )
                )

    # -- progress ---------------------------------------------------------------------------------

    def step_dispatched(self, microbatch: PackedMicrobatch) -> None:
        """The optimizer step that `microbatch` ends is on its way."""
        self.dispatched += 1
        self._data_position = microbatch.stream_state or self._data_position

    def step_done(self, metrics: dict[str, float], tokens: int) -> str | None:
        """An optimizer step's results (see `optimizer_step`), and the run's tokens up to it.

        Returns why the job cannot go on when a result is not finite.
        """
        wrong = [f"{name} {v}" for name, v in metrics.items() if not math.isfinite(v)]
        if wrong:
            return (
                f"job {self.name!r} stopped: {', '.join(wrong)} at step {self.step + 1} is not "
                f"finite; lower optimizer.lr ({self.config.optimizer.lr}) or optimizer.clip and "
                f"resume"
            )
        self.step += 1
        self.tokens = tokens
        self.losses.append(metrics["loss"])
        self.step_times.append(time.monotonic())
        self.gradient_norms.append(metrics["gradient_norm"])
        return None

    def validated(self, *, loss_sum: float, labels: float, ends: bool) -> None:
        """Add a validation microbatch's sum of losses and number of labels."""
        self._validation_sum += loss_sum
        self._validation_labels += labels
        self._validations_left -= 1
        if ends:
            mean = self._validation_sum / max(self._validation_labels, 1)
            self.validation_losses.append((self.step, mean))
            self._validation_sum = self._validation_labels = 0.0

    @property
    def complete(self) -> bool:
        """Whether all steps are done and the validation after them too."""
        return self.step >= self.total_steps and not self._validations_left

    def note(self, text: str) -> None:
        """Keep a warning, and log it; once, however often it is given."""
        if text not in self.messages:
            self.messages.append(text)
            log.warning("job %s: %s", self.name, text)

    def close(self) -> None:
        """Hand out nothing more; `finish` follows once all that it leaves behind is written."""
        self.closed = True
        self._ready.clear()

    def finish(self, status: JobStatus, reason: str | None = None) -> None:
        """The job has ended, and what `status` promises is on disk."""
        self.close()
        self.status, self.reason = status, reason
        self.finished_at = time.monotonic()
        self.ended.set()
