"""Runs jobs on the device as the scheduler finds time: microbatches, backward units, optimizer
steps, checkpoints.

Every method only dispatches. What must be read back (log-probabilities, norms, checkpoints) is
left as functions that the engine takes and calls once the step is done. Which job comes next is
the scheduler's choice: every job keeps a few microbatches queued with it.
"""

import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from flexllm_jax.config import Config, FinetuneConfig
from flexllm_jax.engine.calls.turns import NoTurns, Turns
from flexllm_jax.engine.device.out_of_memory import copy_if_room
from flexllm_jax.engine.device.runner import Runner
from flexllm_jax.engine.jobs.microbatch_work import MicrobatchInWork, dispatch_units
from flexllm_jax.engine.jobs.needs import check_job
from flexllm_jax.engine.jobs.writer import JobWriter
from flexllm_jax.finetune.job import FinetuneJob, JobStatus
from flexllm_jax.finetune.microbatch import PackedMicrobatch
from flexllm_jax.finetune.optimizer import checkpointed, without_gradient
from flexllm_jax.finetune.resume import made_with
from flexllm_jax.finetune.source import CannotGoOn, Step
from flexllm_jax.models.checkpoints.hf_tensors import fingerprint
from flexllm_jax.peft.bank import to_row, trained_ranks
from flexllm_jax.peft.dropout import JobDropout
from scheduler.coserving import Scheduler
from scheduler.request import BackwardUnits, FinetuneForward, Microbatch

log = logging.getLogger(__name__)
_QUEUED = 3  # microbatches of a job with the scheduler: one backward, one forward, one to come


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
        random = config.model.load_format == "dummy"
        self._weights = "random" if random else fingerprint(config.model.path, runner.model)
        self._publish, self._release = publish, release
        self.jobs: dict[str, FinetuneJob] = {}
        self._queued: dict[int, tuple[FinetuneJob, PackedMicrobatch]] = {}
        self._ids = itertools.count()
        self.writer = JobWriter(config, runner.model, runner.sizes.stacks)
        self.in_work: dict[int, MicrobatchInWork] = {}  # by microbatch_id
        # Reads of results, in the order of what they are results of; for the engine to call.
        self._results: list[Callable[[], None]] = []
        self.turns: Turns = NoTurns()

    @property
    def has_work(self) -> bool:
        """Whether something can be done for some job that has neither ended nor been paused."""
        return self.turns.due or any(
            job.running and not job.paused and (job.in_order or not job.source.waiting)
            for job in self.jobs.values()
        )

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
        check_job(job, runner.sizes)
        if isinstance(job.config, FinetuneConfig):
            job.made_with = made_with(job, job.config, runner.sizes.bank, self._weights)
        values, scales = to_row(job.adapter, runner.model, runner.sizes.bank, job.name)
        kept = {"master": values}
        versions = {}
        if job.config.resume and (checkpoint := self.writer.restore_latest(job, values)):
            job.restore(checkpoint.step, checkpoint.info)
            kept = dict(checkpoint.arrays)
            versions, answers = kept.pop("versions", {}), kept.pop("answers", None)
            if job.reinforcement and answers is not None:
                job.reinforcement.remember(checkpoint.info["answers"], answers)
        for number, own in versions.items():
            if job.reinforcement and job.sampler:
                job.reinforcement.thaw(int(number), job.sampler.thaw(own, scales))
        self.place(job, kept, scales)
        self.enter(job)
        if job.complete:
            self._complete(job)

    def enter(self, job: FinetuneJob) -> None:
        """Let a job have its turns."""
        # What is shared has one mask of dropout, and would need the recurrent state behind it.
        if not (job.lora_dropout or self._runner.sizes.recurrent):
            job.source.page = self._runner.sizes.page_size
        self.jobs[job.name] = job
        self._scheduler.add_job(job.name, job.config.weight, job.config.priority)

    def place(self, job: FinetuneJob, kept: dict, scales: list) -> None:
        """Bring a job's state to the device: what is `kept` on the host, and zeros for the rest."""
        runner = self._runner
        job.state = runner.new_job_state(kept, job.optimizer)
        job.trained_ranks = runner.put(trained_ranks(job.peft, runner.model, runner.sizes.bank))
        job.scales = runner.put(scales)
        runner.write_adapter(job.bank_slot, kept["master"], scales)

    def feed(self) -> None:
        """Keep a few microbatches of every job queued with the scheduler."""
        self.turns.take()
        for job in list(self.jobs.values()):
            if job.sampler is not None:
                job.sampler.poll()
            try:
                self._feed(job)
            except CannotGoOn as error:
                reason = f"job {job.name!r} stopped: {error}"
                log.error("%s", reason)
                self._end(job, JobStatus.FAILED, reason)

    def _feed(self, job: FinetuneJob) -> None:
        while job.running and self._scheduler.microbatches_of(job.name) < _QUEUED:
            item = job.next()
            if item is None:
                break
            if isinstance(item, PackedMicrobatch):
                self._queue(job, item)
            else:
                self._carry_out(job)
        if job.running and job.complete:  # a validation that took no microbatch was the last
            self._complete(job)

    def _queue(self, job: FinetuneJob, packed: PackedMicrobatch) -> None:
        microbatch_id = next(self._ids)
        try:
            self._scheduler.add(
                packed.as_planned(
                    *(microbatch_id, job.name, job.weights_version), dropout=job.lora_dropout > 0
                )
            )
        except ValueError as error:  # it can never run: too few pages for it, even alone
            self._end(job, JobStatus.FAILED, f"job {job.name!r} stopped: {error}")
        else:
            self._queued[microbatch_id] = job, packed

    def pause(self, job: FinetuneJob) -> None:
        """Let a job wait; a microbatch of it that is under way will start again."""
        if job.running and not job.paused:
            job.paused = True
            if job.sampler is not None:
                job.sampler.pause()
            self._scheduler.pause_job(job.name)

    def resume(self, job: FinetuneJob) -> None:
        """Let a paused job go on."""
        if job.running and job.paused:
            job.paused = False
            if job.sampler is not None:
                job.sampler.resume()
            self._scheduler.resume_job(job.name)

    # -- dispatch ---------------------------------------------------------------------------------

    def forward(self, forward: FinetuneForward) -> MicrobatchInWork:
        """The microbatch of a forward, brought to the device if this is its first."""
        microbatch_id = forward.microbatch.microbatch_id
        (job, packed), runner = self._queued[microbatch_id], self._runner
        job.forwarded += forward.length
        if not forward.started:
            return self.in_work[microbatch_id]
        kv_slot = packed.kv_slots(forward.pages, runner.sizes.page_size)
        slots, first = runner.sizes.finetune_slots, forward.first_token_slot
        dropout = None
        if packed.backward and job.lora_dropout:
            keys = packed.dropout_keys(job.config.seed, slots, first)
            dropout = JobDropout(keys, np.float32(job.lora_dropout))
        on_device = runner.put((packed.table(slots, first, kv_slot), packed.loss.packed(), dropout))
        in_work = MicrobatchInWork(job, packed, first, forward.pages, kv_slot, *on_device)
        self.in_work[microbatch_id] = in_work
        return in_work

    def backward(self, work: BackwardUnits) -> jax.Array:
        """Dispatch backward units; returns what is ready when they are."""
        return dispatch_units(self._runner, self.in_work[work.microbatch.microbatch_id], work)

    def finish_microbatch(self, microbatch: Microbatch) -> None:
        """Account for a microbatch whose last unit was dispatched, and carry out what follows."""
        in_work, runner = self.in_work.pop(microbatch.microbatch_id), self._runner
        self._queued.pop(microbatch.microbatch_id, None)
        job, packed = in_work.job, in_work.packed
        if not job.running:
            return
        if job.in_order.popleft() is not packed:
            raise RuntimeError(f"a microbatch of job {job.name!r} ended out of turn")
        logprobs = runner.read_logprobs()
        logprobs.copy_to_host_async()
        own = slice(in_work.first_token_slot, in_work.first_token_slot + packed.tokens)
        self._results.append(lambda: self._scored(job, packed, np.asarray(logprobs)[own]))
        if packed.backward:
            job.state = runner.commit(job.state, np.bool_(not job.has_gradient), job.trained_ranks)
            job.has_gradient = True
            job.tokens_pending += packed.tokens
            job.backwarded += packed.tokens
        self._carry_out(job)

    def _carry_out(self, job: FinetuneJob) -> None:
        """Dispatch the steps, and what else is to be done, that no microbatch of the job is
        before."""
        while job.in_order and not isinstance(item := job.in_order[0], PackedMicrobatch):
            job.in_order.popleft()
            if isinstance(item, Step):
                self._step(job, item)
            else:
                self._results.append(item.do(job))

    def _step(self, job: FinetuneJob, step: Step) -> None:
        values = step.values if job.has_gradient else without_gradient(step.values)
        job.state, metrics = self._runner.optimizer_step(
            job.state, job.bank_slot, job.trained_ranks, values, job.optimizer
        )
        jax.tree.map(lambda x: x.copy_to_host_async(), metrics)
        job.step_dispatched(step)
        every = job.writes_checkpoints and self._config.finetune.checkpoint_every
        snapshot = None
        if every and job.dispatched % every == 0 and job.dispatched != job.total_steps:
            snapshot = copy_if_room(job, self._snapshot)
        tokens = job.tokens_pending
        self._results.append(lambda: self._stepped(job, metrics, tokens, step.position, snapshot))

    def _snapshot(self, job: FinetuneJob) -> dict:
        """A copy of what a checkpoint keeps of a job after the last step dispatched."""
        snapshot = self._runner.copy_state(job.state, job.optimizer)
        if job.versions and job.sampler:
            read = job.sampler.read  # one after the other: room for one is planned
            snapshot["versions"] = {str(n): read(version) for n, version in job.versions.items()}
        return snapshot

    # -- results ----------------------------------------------------------------------------------

    @property
    def results_due(self) -> bool:
        """Whether something was dispatched whose results nobody is to read yet."""
        return bool(self._results)

    def take_results(self) -> list[Callable[[], None]]:
        """Reads of the results of what was dispatched since the last call, in order; each waits for
        the device."""
        taken, self._results = self._results, []
        return taken

    def _stepped(
        self,
        job: FinetuneJob,
        metrics: dict,
        tokens: int,
        position: dict,
        snapshot: dict | None,
    ) -> None:
        if not job.running:
            return
        wrong = job.step_done({name: float(value) for name, value in metrics.items()}, tokens)
        if wrong:
            log.error("%s", wrong)
            self._end(job, JobStatus.FAILED, wrong)
        else:
            self.writer.save_samples(job)
            if snapshot is not None:
                self.writer.save(job, *_kept(job, position, snapshot))
        if job.running and job.complete:
            self._complete(job)

    def _scored(self, job: FinetuneJob, packed: PackedMicrobatch, logprob: np.ndarray) -> None:
        if not job.running:
            return
        job.scored(packed, packed.of_data(logprob))
        if job.complete:
            self._complete(job)

    def _complete(self, job: FinetuneJob) -> None:
        """All steps are done: serve the adapter, keep the state, write it in PEFT's format."""
        # Without memory for a copy the state itself does: nothing updates it any more.
        snapshot = copy_if_room(job, self._snapshot) or checkpointed(job.state)
        snapshot, info = _kept(job, job.position, snapshot)
        if job.sampler is not None:
            job.sampler.close()
        try:
            self._publish(job)
        except ValueError as error:  # no free slot: the export is what counts
            job.messages.append(str(error))
            log.warning("%s", error)
        self._release_job(job)
        self.writer.write_result(job, snapshot, info)

    def export(self, job: FinetuneJob, out_dir: Path) -> Path:
        """Write the job's adapter as it is now; waits for the device."""
        return self.writer.export(job, self._runner.copy_state(job.state, job.optimizer), out_dir)

    def export_checkpoint(self, job: FinetuneJob) -> None:
        """Hand out the adapter of the checkpoint that a job has just gone on from."""
        self.writer.hand_out(job, self._runner.copy_state(job.state, job.optimizer))

    def cancel(self, job: FinetuneJob) -> None:
        """Stop a job and keep its last checkpoint; `job.ended` says when that is written."""
        if job.running:
            self._end(job, JobStatus.CANCELLED, "cancelled")
        elif self.writer.give_up(job):
            job.finish(JobStatus.CANCELLED, "cancelled")

    def fail(self, name: str, reason: str) -> None:
        """End a job, if it is running, that the device cannot go on with."""
        job = self.jobs.get(name)
        if job and job.running:
            self._end(job, JobStatus.FAILED, reason)

    def _end(self, job: FinetuneJob, status: JobStatus, reason: str) -> None:
        """A job goes no further: it has ended when what is being written of it is."""
        log.info("job %s ended: %s", job.name, reason)
        job.reason = reason
        self._release_job(job)
        self.writer.end(job, status, reason)

    def _release_job(self, job: FinetuneJob) -> None:
        """Take back what a job holds."""
        job.close()
        if job.sampler is not None:
            job.sampler.close()
        self._scheduler.remove_job(job.name)
        for microbatch_id, (owner, _) in list(self._queued.items()):
            if owner is job:
                self.in_work.pop(microbatch_id, None)
                del self._queued[microbatch_id]
        job.state = {}
        self._release(job.name)

    def abandon(self, reason: str) -> None:
        """The engine has failed, and with it all jobs; what is being written still is."""
        self.writer.close()
        for job in self.jobs.values():
            if not job.ended.is_set():
                job.finish(JobStatus.FAILED, reason)

    def stop(self) -> None:
        """Write a checkpoint of every running job, after those that are under way."""
        self.writer.close()
        reason = "the engine was stopped; resume goes on from here"
        for job in self.jobs.values():
            if job.running and job.step > job.resumed_from and job.writes_checkpoints:
                snapshot = self._snapshot(job)
                self.writer.save_last(job, *_kept(job, job.position, snapshot))
            if job.sampler is not None:
                job.sampler.close()
            if job.running or self.writer.give_up(job):
                job.finish(JobStatus.CANCELLED, reason)


def _kept(job: FinetuneJob, position: dict, snapshot: dict) -> tuple[dict, dict]:
    """A checkpoint's arrays, and what goes beside them."""
    position = position | {"versions": list(snapshot.get("versions", ()))}
    if job.reinforcement:
        told, answers = job.reinforcement.answers(position)
        if told:
            snapshot, position = snapshot | {"answers": answers}, position | {"answers": told}
    return snapshot, job.checkpoint_info(position)
