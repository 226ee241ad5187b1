"""The engine: schedule, run, postprocess, one step after the other (FlexLLM, sections 5 and 6).

The host runs one step ahead: step k + 1 is planned and dispatched before the tokens of step k are
read, and sampled tokens go from step to step on the device. With structured outputs its forward
pass is: which tokens they allow is found out, from the tokens of step k, while that runs. The
engine is driven by one thread; `LLM` wraps it in one.
"""

import gc
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from flexllm_jax.config import Config
from flexllm_jax.engine.adapters import ServedAdapters
from flexllm_jax.engine.device import profile
from flexllm_jax.engine.device.first_runs import run_all
from flexllm_jax.engine.device.out_of_memory import OutOfMemory, is_intact, room_for
from flexllm_jax.engine.device.processes import make_runner
from flexllm_jax.engine.in_flight import (
    BucketUse,
    StepInFlight,
    StepObservation,
    read_prompt_logprobs,
    read_tokens,
    request_prompt_logprobs,
)
from flexllm_jax.engine.jobs.trainer import Trainer
from flexllm_jax.engine.memory.activations import describe_saved
from flexllm_jax.engine.plan_step import PlannedStep, StepBuilder
from flexllm_jax.engine.reinforcement.rollouts import Rollouts
from flexllm_jax.engine.reinforcement.versions import Versions
from flexllm_jax.engine.request import RequestState
from flexllm_jax.engine.sampling.constraints import Constraint, Constraints
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.engine.scheduling import make_scheduler, slo_classes
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.finetune.reinforcement.source import ReinforcementSource
from flexllm_jax.models.checkpoints.dtype import describe_dtype
from flexllm_jax.models.text.detokenizer import Detokenizer
from flexllm_jax.models.text.tokenizer import end_token_ids
from flexllm_jax.peft.directory import Published
from scheduler.request import BackwardUnits, Request

log = logging.getLogger(__name__)


class Engine:
    """Serves requests and trains adapters with one model on one device.

    Args:
        config: the whole configuration.
        tokenizer: a Hugging Face tokenizer: its end tokens, and texts for stop strings.
        progress: show progress bars while starting.

    `step` does one step and returns the requests that finished; everything else queues work.
    """

    def __init__(self, config: Config, tokenizer: Any, *, progress: bool = True):
        self.config, self.detokenizer = config, Detokenizer(tokenizer)
        started = time.monotonic()
        gc.collect()  # an engine that was stopped lets go of what it had on the device
        self.runner = runner = make_runner(config, progress=progress)
        dtype = describe_dtype(config.model.dtype, config.model.path, runner.sizes.dtype)
        log.info("%s in %s", runner.memory.describe(), dtype)
        if config.finetune.jobs or config.finetune.saved != "attention":
            log.info("%s", "\n".join(describe_saved(runner.sizes)))
        self.slos = slo_classes(config)
        began = time.monotonic()
        run_all(runner)
        profiling = time.monotonic()
        latency = profile.latency_model(runner, config, progress=progress)
        self.start_seconds = runner.start_seconds | {
            "first runs": profiling - began,
            "profile": time.monotonic() - profiling,
        }
        self.scheduler, self._plan_log = make_scheduler(
            config, runner.sizes, runner.num_pages, self.slos["standard"], latency
        )
        self.adapters = ServedAdapters(runner, config.adapters.slots, config.model.path)
        self.versions = Versions(runner, self.adapters.directory)
        self.trainer = Trainer(
            config,
            runner,
            self.scheduler,
            self.adapters.publish_job,
            self.adapters.directory.stop_training,
        )
        self._builder = StepBuilder(runner)
        model = runner.model
        ends = end_token_ids(tokenizer, model.eos_token_ids)
        self.end_token_ids = tuple(token for token in ends if token < model.vocab_size)
        self.constraints = Constraints(tokenizer, model.vocab_size, self.end_token_ids)
        self._requests: dict[str, RequestState] = {}
        self._reading = 0  # those of them whose next tokens depend on those before
        self._in_flight: deque[StepInFlight] = deque()
        self._unsettled: StepInFlight | None = None  # its tokens are read, its units maybe running
        self._device_free_at = 0.0
        self._ids = itertools.count()
        self._seeds = np.random.default_rng(config.workload.seed if config.workload else 0)
        self.steps = 0
        self.wake: Callable[[], None] = lambda: None  # who drives it, from any thread
        self.buckets: dict[int, BucketUse] = {}
        self.host_seconds: deque[float] = deque(maxlen=100_000)
        # Whose tokens the last `step` read, and how many.
        self.progressed: list[tuple[RequestState, int]] = []
        self.observations: deque[StepObservation] = deque(maxlen=1000)  # newest last
        for adapter in config.adapters.preload:
            self.adapters.load(adapter.name, adapter.path)
        self.startup_s = time.monotonic() - started
        gc.collect()
        gc.freeze()  # what lives now lives on: later collections need not walk it between steps
        runner.compilations.count = 0

    # -- requests ---------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        adapter: str | Published | None = None,
        *,
        arrival: float | None = None,
        seed_offset: int = 0,
        slo_class: str = "standard",
        constraint: Constraint | None = None,
        on_finish: Callable[[RequestState], None] | None = None,
        job: str | None = None,
    ) -> RequestState:
        """Queue one output sequence for a prompt of token ids. `adapter`: by name its newest
        version, or a version that is held. `constraint`: of its output, if another thread has made
        it beforehand. `on_finish` is called when it has ended, however it did. `job`: in whose
        share its tokens count.

        Raises ValueError, saying why, for what can never be served: an empty prompt, token ids
        outside the vocabulary, a prompt and max_tokens beyond the context, an adapter that is not
        loaded, an unknown class of service, a structured output that cannot be kept to.
        """
        params.check_banned(self.end_token_ids)
        vocab_size = self.runner.model.vocab_size
        params.check_tokens(vocab_size)
        outside = [t for t in prompt if not 0 <= t < vocab_size]
        if outside:
            raise ValueError(
                f"prompt has token id {outside[0]}, the vocabulary has ids 0 to {vocab_size - 1}: "
                f"use this model's tokenizer"
            )
        if slo_class not in self.slos:
            raise ValueError(f"slo_class={slo_class!r} must be one of {', '.join(self.slos)}")
        published = adapter or None
        if isinstance(published, str):
            published = self.adapters.directory.lookup(published)
        if not constraint:
            (constraint,) = self.constraints.make(params, 1)
        seed = params.seed
        seed = int(self._seeds.integers(2**31)) if seed is None else seed + seed_offset
        state = RequestState(
            request_id=str(next(self._ids)),
            prompt=tuple(prompt),
            params=params,
            seed=seed % 2**64,
            arrival=time.monotonic() if arrival is None else arrival,
            stop_ids=params.stop_ids(self.end_token_ids),
            adapter=published,
            slo=self.slos[slo_class],
            constraint=constraint,
            on_finish=on_finish,
        )
        salt = (published.name, published.version) if published else None
        if params.prompt_logprobs is not None:
            state.prompt_logprobs = [None] * len(state.prompt)  # the first stays: nothing precedes
            salt = (salt, state.request_id)  # the whole prompt must be computed: share nothing
        drafts = params.drafts(self.config.scheduler.num_speculative_tokens)
        if constraint or self.runner.sizes.recurrent:
            drafts = 0  # what is allowed follows from each token; and no state can be taken back
        self.scheduler.add(
            Request(
                state.request_id,
                state.prompt,
                params.max_tokens,
                state.arrival,
                salt,
                state.slo,
                state.sampling(0),
                params.logprobs is not None,
                job,
                reusable=params.prompt_logprobs is None,
                drafts=drafts,
            )
        )
        if published:
            published.users += 1
        self._requests[state.request_id] = state
        self._reading += constraint is not None and constraint.reads_tokens
        return state

    def cancel(self, state: RequestState, error: str | None = None) -> None:
        """Drop a request; its pages are free at once."""
        if self.scheduler.cancel(state.request_id):
            state.error = error
            self._finish(state, "cancelled")

    def _finish(self, state: RequestState, reason: str) -> None:
        state.finish_reason = reason
        self._requests.pop(state.request_id, None)
        self._reading -= state.constraint is not None and state.constraint.reads_tokens
        if state.adapter:
            self.adapters.directory.release(state.adapter)
        if state.on_finish:
            state.on_finish(state)

    # -- jobs -------------------------------------------------------------------------------------

    def add_job(self, job: FinetuneJob) -> None:
        """Start a finetuning job beside whatever runs."""
        answers, directory = job.reinforcement is not None, self.adapters.directory
        job.bank_slot = directory.start_training(job.name, answers)
        try:
            with room_for(f"job {job.name!r}"):
                if isinstance(job.source, ReinforcementSource):
                    job.source.sampler = rollouts = Rollouts(self, job, job.source)
                    rollouts.begin()
                self.trainer.start(job)
        except Exception:
            if job.sampler is not None:
                job.sampler.close()
            directory.stop_training(job.name)
            raise

    # -- the loop ---------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, a job running, or a step in flight."""
        trainer = self.trainer.has_work or self.trainer.results_due
        return bool(self._requests or trainer or self._in_flight or self._unsettled)

    def step(self) -> list[RequestState]:
        """Plan and dispatch a step, then read the one before; returns requests that finished."""
        self.progressed, finished = [], []
        if self._in_flight and self.scheduler.reads_first():
            finished = self._postprocess(self._in_flight.popleft())
        started = time.perf_counter()
        if self._reading:  # tokens will be read amid a step: what else changes jobs comes before
            self._settle()
        self.trainer.feed()
        plan = self.scheduler.plan(time.monotonic())
        if plan is not None:
            step = StepInFlight(plan, time.monotonic(), [], None, [], None, None)
            try:
                with room_for(f"step {plan.step}"):
                    if plan.token_bucket:
                        planned, hidden_rows = self._forward(step)
                        if planned.awaits_tokens and self._in_flight:
                            waiting = time.perf_counter()
                            finished = self._postprocess(self._in_flight.popleft())
                            started += time.perf_counter() - waiting
                        self._sample(step, planned, hidden_rows)
                    if plan.backward:
                        self._backward(step, plan.backward)
            except OutOfMemory as error:
                finished += self._give_up(step, str(error))
            step.after = self.trainer.take_results()
            self._in_flight.append(step)
            self.steps += 1
        self.host_seconds.append(time.perf_counter() - started)
        if self._in_flight and (plan is None or len(self._in_flight) > 1):
            return self._postprocess(self._in_flight.popleft())
        if plan is None:
            self._settle()
            for read in self.trainer.take_results():
                read()
        return finished

    def _give_up(self, step: StepInFlight, reason: str) -> list[RequestState]:
        """End the requests and the jobs that a step could not be dispatched for."""
        if not is_intact(self.runner):
            raise RuntimeError(reason)
        log.error("%s", reason)
        plan, ended = step.plan, []
        sequences = (*plan.decode.sequences, *(chunk.sequence for chunk in plan.prefill))
        if step.report is None:  # else its tokens come, and only units are missing
            step.sampled = []
            for sequence in sequences:
                if state := self._requests.get(sequence.request_id):
                    self.cancel(state, reason)
                    ended.append(state)
        self.scheduler.forget_prefixes()
        for work in (plan.forward, plan.backward):
            if work:
                self.trainer.fail(work.microbatch.job, reason)
        return ended

    def _forward(self, step: StepInFlight) -> tuple[PlannedStep, jax.Array]:
        """Send a step's forward program to the device; the planned step, and the outputs to sample
        from [R, D]."""
        plan = step.plan
        self.buckets.setdefault(plan.token_bucket, BucketUse()).count(plan)
        microbatch = self.trainer.forward(plan.forward) if plan.forward else None
        planned = self._builder.build(plan, self._requests, microbatch)
        for copy in plan.state_copies:
            self.runner.copy_slot(*map(self.runner.sizes.planned_slot, copy))
        step.hidden, hidden_rows = self.runner.forward(
            planned.variant, plan.token_bucket, planned.vector, planned.dropout
        )
        return planned, hidden_rows

    def _sample(self, step: StepInFlight, planned: PlannedStep, hidden_rows: jax.Array) -> None:
        if planned.sampled:
            allowed = None
            if planned.constraints:
                allowed = self.constraints.allowed(planned.constraints, len(planned.rows.row))
            step.sampled, step.drafts = planned.sampled, planned.drafts
            step.report = self.runner.sample(
                hidden_rows,
                planned.rows,
                kind=planned.sampling,
                logprobs=planned.logprobs,
                allowed=allowed,
                wanted=planned.wanted,
            )
            jax.tree.map(lambda x: x.copy_to_host_async(), step.report)
        request_prompt_logprobs(self.runner, step, planned)

    def _backward(self, step: StepInFlight, units: BackwardUnits) -> None:
        step.last_unit = self.trainer.backward(units)
        if units.done:
            self.trainer.finish_microbatch(units.microbatch)

    def _postprocess(self, step: StepInFlight) -> list[RequestState]:
        """Read a step's tokens, find out who is done, and let the scheduler know."""
        self._settle()
        plan = step.plan
        if step.report is None and step.last_unit is None:
            jax.block_until_ready(step.hidden)  # nothing to read: still, stay one step ahead only
        read = read_tokens(step, self.detokenizer)
        self.progressed += read.progressed
        for state, reason in read.failed:
            self.cancel(state, reason)
        finished = [state for state, _ in read.failed]
        read_prompt_logprobs(step)
        now = time.monotonic()
        measured = (
            None if step.last_unit is not None else now - max(step.started, self._device_free_at)
        )
        if measured is not None:
            self._device_free_at = now
            self.observations.append(StepObservation.of(step, measured))
        self._unsettled = step
        ends = self.scheduler.complete(
            plan, read.sampled, read.stopped, now, measured, read.accepted
        )
        for sequence in ends:
            state = self._requests[sequence.request_id]
            self._finish(state, sequence.finish_reason or "stop")
            finished.append(state)
        if not step.sampled:
            self._settle()
        return finished

    def _settle(self) -> None:
        """Wait for the backward units of the step whose tokens were read last."""
        step, self._unsettled = self._unsettled, None
        if step is None:
            return
        if step.last_unit is not None:
            jax.block_until_ready(step.last_unit)
            now = time.monotonic()
            measured = now - max(step.started, self._device_free_at)
            self.scheduler.observe(step.plan, measured)
            self._device_free_at = now
            self.observations.append(StepObservation.of(step, measured))
        for read in step.after:
            read()

    def stop(self) -> None:
        """End cleanly: unfinished requests get an error, running jobs write a checkpoint."""
        for state in list(self._requests.values()):
            self.cancel(state, "the engine was stopped")
        while self._in_flight:
            self._postprocess(self._in_flight.popleft())
        self._settle()
        self.trainer.stop()
        self.runner.close()
        if self._plan_log:
            self._plan_log.close()
