"""What jobs leave on disk: checkpoints, and their adapters in PEFT's format.

All is written in one thread in the order it is asked for, so a job has ended when what is being
written of it is. A failure of whatever kind is told and costs that write alone.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexllm_jax.config import Config
from flexllm_jax.finetune.checkpoint import Checkpoint, JobCheckpoints
from flexllm_jax.finetune.job import FinetuneJob, JobStatus
from flexllm_jax.finetune.optimizer import job_state_shapes
from flexllm_jax.finetune.resume import kept_arrays, refusal
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import Adapter
from flexllm_jax.peft.bank import from_row
from flexllm_jax.peft.hf.peft import save_adapter
from flexllm_jax.peft.stacks import LayerStacks

log = logging.getLogger(__name__)
_SAMPLES = 64  # of a batch, in its file
_AGAIN_S = 2.0  # between attempts to write a result


class JobWriter:
    """Writes for all jobs of an engine. A `snapshot` is a copy of a job's state on the device.

    on_checkpoint: called with every checkpoint's adapter, in the thread that writes.
    keep_trying_s: how long a trained job whose result cannot be written tries again before it
    fails.
    """

    def __init__(self, config: Config, model: ModelConfig, stacks: LayerStacks):
        self._config, self._model, self._stacks = config, model, stacks
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.on_checkpoint: Callable[[FinetuneJob, int, Adapter], None] | None = None
        self.keep_trying_s = 0.0
        self._unwritten: dict[str, FinetuneJob] = {}  # those that try again

    def restore_latest(self, job: FinetuneJob, master: list) -> Checkpoint | None:
        """The newest checkpoint that can be read, if there is one; `master`: the job's first
        weights. CheckpointError when the job cannot go on from it."""
        first = self._stacks.by_layer(master)
        shapes = job_state_shapes(first, job.optimizer)
        state = {"master": first, "optimizer": shapes["optimizer"]}
        like = partial(kept_arrays, state)
        checkpoint = self._checkpoints(job).restore_latest(like, partial(refusal, job))
        if checkpoint is None:
            return None
        return replace(checkpoint, arrays=self._stacks.stacked(checkpoint.arrays))

    def _checkpoints(self, job: FinetuneJob) -> JobCheckpoints:
        return JobCheckpoints(self._config.output_dir / job.name / "checkpoints")

    def save(self, job: FinetuneJob, snapshot: dict, info: dict) -> None:
        """Write a checkpoint of the steps done so far in the background."""
        self._thread.submit(self._save, job, job.step, snapshot, info)

    def save_samples(self, job: FinetuneJob) -> None:
        """Write what a job was trained on last, if that were answers of its own."""
        if samples := job.samples:
            self._thread.submit(self._save_samples, job, list(samples[:_SAMPLES]))

    def hand_out(self, job: FinetuneJob, snapshot: dict) -> None:
        """Give the adapter of the checkpoint that a job has just gone on from to
        `on_checkpoint`."""
        self._thread.submit(self._hand_out, job, job.resumed_from, snapshot["master"])

    def write_result(self, job: FinetuneJob, snapshot: dict, info: dict) -> None:
        """Write a trained job's last checkpoint and its adapter; then it has ended. On a full disk
        it is tried again."""
        self._thread.submit(self._write_result, job, snapshot, info)

    def end(self, job: FinetuneJob, status: JobStatus, reason: str) -> None:
        """A job goes no further: it has ended when what is being written of it is."""
        self._thread.submit(job.finish, status, reason)

    def give_up(self, job: FinetuneJob) -> bool:
        """Try no more to write a job's result; returns whether it was being tried."""
        return self._unwritten.pop(job.name, None) is job

    def export(self, job: FinetuneJob, snapshot: dict, out_dir: Path) -> Path:
        """Write a job's adapter in PEFT's format; waits for the device."""
        adapter = self._adapter(job, snapshot["master"])
        save_adapter(adapter, self._model, self._config.model.path, out_dir)
        return out_dir

    def submit(self, write: Callable[[], None]) -> None:
        """Write something else in its turn."""
        self._thread.submit(write)

    def close(self) -> None:
        """Write what is under way, and nothing after it but what `save_last` is given."""
        self._thread.shutdown(wait=True)

    def save_last(self, job: FinetuneJob, snapshot: dict, info: dict) -> None:
        """After `close`: write a checkpoint of the steps done so far."""
        self._save(job, job.step, snapshot, info)

    # -- in the thread ----------------------------------------------------------------------------

    def _write_result(
        self, job: FinetuneJob, snapshot: dict, info: dict, give_up_at: float | None = None
    ) -> None:
        again = give_up_at is not None
        if give_up_at is None:
            give_up_at = time.monotonic() + self.keep_trying_s
        elif job.name not in self._unwritten:
            return  # it was cancelled, or all is stopped
        folder = self._config.output_dir / job.name / "adapter"
        try:
            snapshot = jax.tree.map(np.asarray, snapshot)  # while it tries, it holds no device
            self._save(job, job.step, snapshot, info)
            job.adapter_dir = self.export(job, snapshot, folder)
        except Exception as error:  # a full disk, a lost device: of many kinds
            if again and not self.give_up(job):
                return  # it was cancelled meanwhile
            what = f"job {job.name!r} is trained, but its adapter could not be written to {folder}"
            if time.monotonic() < give_up_at:
                self._unwritten[job.name] = job  # before it is told: who reads that may cancel it
                job.note(f"{what} ({_one_line(error)}); it is tried again")
                later = (self._write_result, job, snapshot, info, give_up_at)
                timer = threading.Timer(_AGAIN_S, self._submit, later)
                timer.daemon = True
                timer.start()
                return
            reason = f"{what} ({_one_line(error)}): free space on the disk and resume the job"
            log.error("%s", reason)
            job.finish(JobStatus.FAILED, reason)
        else:
            if not again or self.give_up(job):
                job.finish(JobStatus.SUCCEEDED)

    def _submit(self, *work: Any) -> None:
        """In a timer's thread: hand work to the writer, unless all has stopped meanwhile."""
        with contextlib.suppress(RuntimeError):
            self._thread.submit(*work)

    def _save_samples(self, job: FinetuneJob, samples: list) -> None:
        path = self._config.output_dir / job.name / "samples.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(json.dumps(samples), encoding="utf-8")
            path.with_suffix(".tmp").replace(path)
        except (OSError, ValueError) as error:
            job.note(f"the samples could not be written: {_one_line(error)}")

    def _save(self, job: FinetuneJob, step: int, snapshot: dict, info: dict) -> None:
        try:
            arrays = jax.tree.map(np.asarray, snapshot)
            # On disk by layer, as ever.
            self._checkpoints(job).save(step, self._stacks.by_layer(arrays), info)
        except Exception as error:
            job.note(_one_line(error))
        else:
            self._hand_out(job, step, arrays["master"])

    def _hand_out(self, job: FinetuneJob, step: int, master: Any) -> None:
        if self.on_checkpoint is None:
            return
        try:
            self.on_checkpoint(job, step, self._adapter(job, master))
        except Exception as error:  # safetensors, too, has errors of its own
            job.note(f"the adapter of step {step} could not be written: {_one_line(error)}")

    def _adapter(self, job: FinetuneJob, master: Any) -> Adapter:
        arrays = jax.tree.map(np.asarray, master)
        return from_row(arrays, job.peft, job.shapes, self._stacks)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
