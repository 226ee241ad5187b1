"""Runs jobs on the device as the scheduler finds time: microbatches, backward units, optimizer
steps, checkpoints.

Every method only dispatches. What must be read back (losses, norms, checkpoints) is returned as a
function that the engine calls once the step is done. Which job comes next is the scheduler's
choice: every job keeps a few microbatches queued with it.
"""

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexllm_jax.config import Config
from flexllm_jax.engine.runner import Runner
from flexllm_jax.finetune.checkpoint import JobCheckpoints
from flexllm_jax.finetune.job import FinetuneJob, JobStatus, PackedMicrobatch
from flexllm_jax.finetune.optimizer import hyperparameters
from flexllm_jax.finetune.resume import made_with, refusal
from flexllm_jax.peft.adapter import Adapter
from flexllm_jax.peft.bank import from_row, to_row
from flexllm_jax.peft.hf_peft import save_adapter
from scheduler.coserving import Scheduler
from scheduler.request import BackwardUnits, FinetuneForward, Microbatch

log = logging.getLogger(__name__)
_AGAIN_S = 2.0  # between attempts to write a result
_QUEUED = 3  # microbatches of a job with the scheduler: one backward, one forward, one to come


@dataclass(frozen=True)
class MicrobatchInWork:
    """A microbatch on the device: the first of its finetuning slots, its pages, where each token's
    key is, and its table (`finetune.buffers.MicrobatchTable`)."""

    packed: PackedMicrobatch
    first_token_slot: int
    pages: tuple[tuple[int, ...], ...]
    kv_slot: np.ndarray
    table: jax.Array


class Trainer:
    """All jobs of an engine. `publish` serves a finished job's adapter."""

    def __init__(
        self,
        config: Config,
        runner: Runner,
        scheduler: Scheduler,
        publish: Callable[[FinetuneJob], object],
        release: Callable[[str], None],
    ):
        self._config, self._runner, self._scheduler = config, runner, scheduler
        self._publish, self._release = publish, release
        self.jobs: dict[str, FinetuneJob] = {}
        self._queued: dict[int, PackedMicrobatch] = {}
        self._ids = itertools.count()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.in_work: dict[int, MicrobatchInWork] = {}  # by microbatch_id
        # Called with every checkpoint's adapter, in the thread that writes them.
        self.on_checkpoint: Callable[[FinetuneJob, int, Adapter], None] | None = None
        # How long a trained job whose result cannot be written tries again before it fails.
        self.keep_trying_s = 0.0
        self._unwritten: dict[str, FinetuneJob] = {}  # those that try again

    @property
    def has_work(self) -> bool:
        """Whether some job has neither ended nor been paused."""
        return any(job.running and not job.paused for job in self.jobs.values())

    def start(self, job: FinetuneJob) -> None:
        """Put a job's adapter in its slot of the bank, from its newest checkpoint if it resumes,
        and let it run."""
        job.started_at = time.monotonic()
        before = self.jobs.get(job.name)
        if before is not None and not before.ended.is_set():
            raise ValueError(
                f"job {job.name!r} is still being written: wait for its end, or use another name"
            )
        runner = self._runner
        job.made_with = made_with(job, runner.sizes.bank)
        values, scales = to_row(job.adapter, runner.model, runner.sizes.bank, job.name)
        kept = {"master": values}
        like = kept | {"optimizer": runner.sizes.job_state["optimizer"]}
        checkpoint = None
        if job.config.resume:
            checkpoint = self._checkpoints(job).restore_latest(like, partial(refusal, job))
        if checkpoint is not None:
            job.restore(checkpoint.step, checkpoint.info)
            kept = checkpoint.arrays
        runner.write_adapter(job.bank_slot, kept["master"], scales)
        job.scales = runner.put(jax.tree.map(lambda s: s.reshape(1), scales))
        job.state = runner.new_job_state(kept)
        self.jobs[job.name] = job
        self._scheduler.add_job(job.name, job.config.weight, job.config.priority)
        if job.complete:
            self._complete(job)

    def feed(self) -> None:
        """Keep a few microbatches of every job queued with the scheduler."""
        for job in self.jobs.values():
            while job.running and self._scheduler.microbatches_of(job.name) < _QUEUED:
                packed = job.next_microbatch(self._ids)
                if packed is None:
                    break
                try:
                    self._scheduler.add(packed.as_planned())
                except ValueError as error:  # it can never run: too few pages for it, even alone
                    self._end(job, JobStatus.FAILED, f"job {job.name!r} stopped: {error}")
                else:
                    self._queued[packed.microbatch_id] = packed

    def pause(self, job: FinetuneJob) -> None:
        """Let a job wait; a microbatch of it that is under way will start again."""
        if job.running and not job.paused:
            job.paused = True
            self._scheduler.pause_job(job.name)

    def resume(self, job: FinetuneJob) -> None:
        """Let a paused job go on."""
        if job.running and job.paused:
            job.paused = False
            self._scheduler.resume_job(job.name)

    # -- dispatch ---------------------------------------------------------------------------------

    def forward(self, forward: FinetuneForward) -> MicrobatchInWork:
        """The microbatch of a forward, brought to the device if this is its first."""
        microbatch_id = forward.microbatch.microbatch_id
        self._queued[microbatch_id].job.forwarded += forward.length
        if not forward.started:
            return self.in_work[microbatch_id]
        packed, runner = self._queued[microbatch_id], self._runner
        page_size = runner.sizes.page_size
        kv_slot = np.concatenate(
            [
                np.asarray(own, np.int32)[np.arange(length) // page_size] * page_size
                + np.arange(length, dtype=np.int32) % page_size
                for own, length in zip(forward.pages, packed.lengths, strict=True)
            ]
        )
        table = np.zeros((4, runner.sizes.finetune_slots), np.int32)
        table[0], table[3] = -1, runner.sizes.finetune_slots
        own_slots = slice(forward.first_token_slot, forward.first_token_slot + len(packed.token))
        starts = forward.first_token_slot + packed.sequence_start
        table[:, own_slots] = (packed.label, packed.position, kv_slot, starts)
        on_device = runner.put(table)
        in_work = MicrobatchInWork(
            packed, forward.first_token_slot, forward.pages, kv_slot, on_device
        )
        self.in_work[microbatch_id] = in_work
        return in_work

    def backward(self, work: BackwardUnits) -> jax.Array:
        """Dispatch backward units; returns what is ready when they are.

        Units count as the scheduler does: first the loss of every slice of tokens, from the first
        to the last; then the layers from the last to the first, and in each its slices from the
        last to the first.
        """
        in_work, runner = self.in_work[work.microbatch.microbatch_id], self._runner
        unit_tokens = runner.sizes.unit_tokens
        slices = -(-len(in_work.packed.token) // unit_tokens)
        job, last_layer = in_work.packed.job, runner.model.num_layers - 1
        if not work.units.start:
            runner.begin_backward()
        for unit in work.units:
            if unit < slices:
                done = runner.loss_unit(
                    in_work.table,
                    job.state["master"],
                    job.scales,
                    in_work.first_token_slot + unit * unit_tokens,
                )
            else:
                layers, later_slices = divmod(unit - slices, slices)
                start = in_work.first_token_slot + (slices - 1 - later_slices) * unit_tokens
                done = runner.layer_unit(
                    last_layer - layers, in_work.table, job.state["master"], job.scales, start
                )
        return done

    def finish_microbatch(self, microbatch: Microbatch) -> list[Callable[[], None]]:
        """Account for a microbatch whose last unit was dispatched; step the optimizer if due."""
        packed, runner = self.in_work.pop(microbatch.microbatch_id).packed, self._runner
        self._queued.pop(packed.microbatch_id, None)
        job = packed.job
        if not job.running:
            return []
        if packed.validation:
            losses = runner.read_losses()
            jax.tree.map(lambda x: x.copy_to_host_async(), losses)
            return [lambda: self._validated(packed, losses)]
        job.state = runner.commit(job.state)
        job.tokens_pending += len(packed.token)
        job.backwarded += len(packed.token)
        if not packed.ends_batch:
            return []
        values = hyperparameters(job.config.optimizer, job.dispatched, job.total_steps)
        job.state, metrics = runner.optimizer_step(
            job.state, job.bank_slot, np.asarray(values, np.float32)
        )
        jax.tree.map(lambda x: x.copy_to_host_async(), metrics)
        job.step_dispatched(packed)
        every = self._config.finetune.checkpoint_every
        snapshot = None
        if every and job.dispatched % every == 0 and job.dispatched < job.total_steps:
            snapshot = runner.copy_state(job.state)
        tokens, data_position = job.tokens_pending, job.data_position
        return [lambda: self._stepped(job, metrics, tokens, data_position, snapshot)]

    # -- results ----------------------------------------------------------------------------------

    def _stepped(
        self,
        job: FinetuneJob,
        metrics: dict,
        tokens: int,
        data_position: dict,
        snapshot: dict | None,
    ) -> None:
        if not job.running:
            return
        wrong = job.step_done({name: float(value) for name, value in metrics.items()}, tokens)
        if wrong:
            log.error("%s", wrong)
            self._end(job, JobStatus.FAILED, wrong)
        elif snapshot is not None:
            self._write(job, job.step, snapshot, job.checkpoint_info(data_position))
        if job.running and job.complete:
            self._complete(job)

    def _validated(self, packed: PackedMicrobatch, losses: dict) -> None:
        job = packed.job
        job.validated(**jax.tree.map(float, losses), ends=packed.ends_validation)
        if job.running and job.complete:
            self._complete(job)

    def _complete(self, job: FinetuneJob) -> None:
        """All steps are done: serve the adapter, keep the state, write it in PEFT's format."""
        snapshot, info = self._runner.copy_state(job.state), job.checkpoint_info(job.data_position)
        try:
            self._publish(job)
        except ValueError as error:  # no free slot: the export is what counts
            job.messages.append(str(error))
            log.warning("%s", error)
        self._release_job(job)
        self._writer.submit(self._write_result, job, snapshot, info)

    def _write_result(
        self, job: FinetuneJob, snapshot: dict, info: dict, give_up: float | None = None
    ) -> None:
        """In the writer's thread: the last checkpoint and the adapter; then the job has ended. On a
        full disk it is tried again until `give_up`."""
        if give_up is None:
            give_up = time.monotonic() + self.keep_trying_s
        elif self._unwritten.pop(job.name, None) is not job:
            return  # it was cancelled, or all is stopped
        folder = self._config.output_dir / job.name / "adapter"
        try:
            snapshot = jax.tree.map(np.asarray, snapshot)  # while it tries, it holds no device
            self._save(job, job.step, snapshot, info)
            job.adapter_dir = self._export(job, snapshot, folder)
        except Exception as error:  # a full disk, a lost device: of many kinds
            what = f"job {job.name!r} is trained, but its adapter could not be written to {folder}"
            if time.monotonic() < give_up:
                job.note(f"{what} ({_one_line(error)}); it is tried again")
                self._unwritten[job.name] = job
                again = (self._write_result, job, snapshot, info, give_up)
                timer = threading.Timer(_AGAIN_S, self._submit, again)
                timer.daemon = True
                timer.start()
                return
            reason = f"{what} ({_one_line(error)}): free space on the disk and resume the job"
            log.error("%s", reason)
            job.finish(JobStatus.FAILED, reason)
        else:
            job.finish(JobStatus.SUCCEEDED)

    def _submit(self, *work: Any) -> None:
        """In a timer's thread: hand work to the writer, unless all has stopped meanwhile."""
        with contextlib.suppress(RuntimeError):
            self._writer.submit(*work)

    def export(self, job: FinetuneJob, out_dir: Path) -> Path:
        """Write the job's adapter as it is now; waits for the device."""
        return self._export(job, self._runner.copy_state(job.state), out_dir)

    def _export(self, job: FinetuneJob, snapshot: dict, out_dir: Path) -> Path:
        master = jax.tree.map(np.asarray, snapshot["master"])
        adapter = from_row(master, job.peft, job.shapes)
        save_adapter(adapter, self._runner.model, self._config.model.path, out_dir)
        return out_dir

    def cancel(self, job: FinetuneJob) -> None:
        """Stop a job and keep its last checkpoint; `job.ended` says when that is written."""
        if job.running:
            self._end(job, JobStatus.CANCELLED, "cancelled")
        elif self._unwritten.pop(job.name, None) is job:
            job.finish(JobStatus.CANCELLED, "cancelled")

    def _end(self, job: FinetuneJob, status: JobStatus, reason: str) -> None:
        """A job goes no further: it has ended when what is being written of it is."""
        log.info("job %s ended: %s", job.name, reason)
        self._release_job(job)
        self._writer.submit(job.finish, status, reason)

    def _release_job(self, job: FinetuneJob) -> None:
        """Take back what a job holds."""
        job.close()
        self._scheduler.remove_job(job.name)
        for microbatch_id, packed in list(self._queued.items()):
            if packed.job is job:
                self.in_work.pop(microbatch_id, None)
                del self._queued[microbatch_id]
        job.state = {}
        self._release(job.name)

    def abandon(self, reason: str) -> None:
        """The engine has failed, and with it all jobs; what is being written still is."""
        self._writer.shutdown(wait=True)
        for job in self.jobs.values():
            if not job.ended.is_set():
                job.finish(JobStatus.FAILED, reason)

    # -- checkpoints ------------------------------------------------------------------------------

    def _checkpoints(self, job: FinetuneJob) -> JobCheckpoints:
        return JobCheckpoints(self._config.output_dir / job.name / "checkpoints")

    def _write(self, job: FinetuneJob, step: int, snapshot: dict, info: dict) -> None:
        """Write a checkpoint in the background."""
        self._writer.submit(self._save, job, step, snapshot, info)

    def export_checkpoint(self, job: FinetuneJob) -> None:
        """Hand out the adapter of the checkpoint that a job has just gone on from."""
        master = self._runner.copy_state(job.state)["master"]
        self._writer.submit(self._hand_out, job, job.resumed_from, master)

    def _save(self, job: FinetuneJob, step: int, snapshot: dict, info: dict) -> None:
        """Write a checkpoint; a failure of whatever kind is told and costs this write alone."""
        try:
            arrays = jax.tree.map(np.asarray, snapshot)
            self._checkpoints(job).save(step, arrays, info)
        except Exception as error:
            job.note(_one_line(error))
        else:
            self._hand_out(job, step, arrays["master"])

    def _hand_out(self, job: FinetuneJob, step: int, master: Any) -> None:
        """Give a checkpoint's adapter to `on_checkpoint`, if anybody wants it."""
        if self.on_checkpoint is None:
            return
        try:
            arrays = jax.tree.map(np.asarray, master)
            self.on_checkpoint(job, step, from_row(arrays, job.peft, job.shapes))
        except Exception as error:  # safetensors, too, has errors of its own
            job.note(f"the adapter of step {step} could not be written: {_one_line(error)}")

    def stop(self) -> None:
        """Write a checkpoint of every running job, after those that are under way."""
        self._writer.shutdown(wait=True)
        reason = "the engine was stopped; resume goes on from here"
        for job in self.jobs.values():
            if job.running and job.step > job.resumed_from:
                info = job.checkpoint_info(job.data_position)
                self._save(job, job.step, self._runner.copy_state(job.state), info)
            if job.running or self._unwritten.pop(job.name, None) is job:
                job.finish(JobStatus.CANCELLED, reason)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
