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
from dataclasses import dataclass, field
from typing import Any, TextIO

import jax
import numpy as np
from llguidance import LLMatcher

from flexllm_jax.config import Config
from flexllm_jax.engine import profile
from flexllm_jax.engine.activations import describe_saved
from flexllm_jax.engine.plan_step import PlannedStep, PromptTargets, StepBuilder
from flexllm_jax.engine.processes import make_runner
from flexllm_jax.engine.programs import FINETUNE_SEQUENCES
from flexllm_jax.engine.request import RequestState, top_logprobs
from flexllm_jax.engine.sampling_params import SamplingParams
from flexllm_jax.engine.structured_outputs import TokenMatchers, failure
from flexllm_jax.engine.trainer import Trainer
from flexllm_jax.finetune.job import FinetuneJob
from flexllm_jax.peft.adapter import Adapter
from flexllm_jax.peft.bank import AdapterRow, BankDirectory, Published, from_row, to_row
from flexllm_jax.peft.hf_peft import load_adapter
from scheduler.coserving import Scheduler, SchedulerConfig
from scheduler.latency import LatencyModel
from scheduler.plan_log import LoggedScheduler
from scheduler.policies import make_policy
from scheduler.request import BackwardUnits, Request, Slo, StepPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepObservation:
    """What a step held, and the seconds it took and was predicted to take on the device."""

    decode_tokens: int
    prefill_tokens: int
    forward_tokens: int
    backward_units: int
    preempted: int
    measured_s: float
    predicted_s: float


@dataclass
class _InFlight:
    """A dispatched step: what will have to be read, and what to do with it."""

    plan: StepPlan
    started: float
    sampled: list[RequestState]
    report: dict | None  # from the sampler
    prompt_logprobs: list[tuple[PromptTargets, dict]]
    last_unit: jax.Array | None  # ready when the step's backward units are done
    hidden: jax.Array | None
    after: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class BucketUse:
    """How often a bucket's program ran, and how many tokens were in its slots."""

    steps: int = 0
    tokens: int = 0

    def count(self, plan: StepPlan) -> None:
        """Another step."""
        self.steps += 1
        self.tokens += plan.num_tokens


class Engine:
    """Serves requests and trains adapters with one model on one device.

    Args:
        config: the whole configuration.
        tokenizer: a Hugging Face tokenizer, for stop strings.
        progress: show progress bars while starting.

    `step` does one step and returns the requests that finished; everything else queues work.
    """

    def __init__(self, config: Config, tokenizer: Any, *, progress: bool = True):
        self.config, self.tokenizer = config, tokenizer
        started = time.monotonic()
        self.runner = runner = make_runner(config, progress=progress)
        log.info("%s", runner.memory.describe())
        if config.finetune.jobs or config.finetune.saved != "attention":
            log.info("%s", "\n".join(describe_saved(runner.sizes)))
        slos = {"standard": config.scheduler.slo, **config.scheduler.slo_classes}
        self.slos = {
            name: Slo(slo.tpot_ms / 1e3, slo.ttft_ms / 1e3, slo.weight, name)
            for name, slo in slos.items()
        }
        self._plan_log: TextIO | None = None
        latency = profile.latency_model(runner, config, progress=progress)
        self.scheduler = self._make_scheduler(latency)
        self.directory = BankDirectory(config.adapters.slots)
        self.trainer = Trainer(
            config, runner, self.scheduler, self.publish_job, self.directory.stop_training
        )
        self._builder = StepBuilder(runner)
        model = runner.model
        self.matchers = TokenMatchers(tokenizer, model.vocab_size, model.eos_token_ids)
        self._requests: dict[str, RequestState] = {}
        self._matching = 0  # those of them with structured outputs
        self._in_flight: deque[_InFlight] = deque()
        self._unsettled: _InFlight | None = None  # its tokens are read, its units maybe running
        self._device_free_at = 0.0
        self._ids = itertools.count()
        self._seeds = np.random.default_rng(config.workload.seed if config.workload else 0)
        self.steps = 0
        self.buckets: dict[int, BucketUse] = {}
        self.host_seconds: deque[float] = deque(maxlen=100_000)
        self.progressed: list[RequestState] = []  # whose tokens the last `step` read
        self.observations: deque[StepObservation] = deque(maxlen=1000)  # newest last
        for adapter in config.adapters.preload:
            self.load_adapter(adapter.name, adapter.path)
        self.startup_s = time.monotonic() - started
        gc.collect()
        gc.freeze()  # what lives now lives on: later collections need not walk it between steps
        runner.compilations.count = 0

    def _make_scheduler(self, latency: LatencyModel) -> Scheduler:
        config, sizes = self.config, self.runner.sizes
        limits = SchedulerConfig(
            max_sequences=sizes.rows,
            max_tokens_per_step=sizes.buckets[-1],
            max_model_len=sizes.max_model_len,
            token_buckets=sizes.buckets,
            num_pages=self.runner.num_pages,
            page_size=sizes.page_size,
            prefix_caching=config.cache.prefix_caching,
            num_layers=sizes.model.num_layers,
            unit_tokens=sizes.unit_tokens,
            finetune_slots=sizes.finetune_slots,
            max_finetune_segments=FINETUNE_SEQUENCES,
            slo=self.slos["standard"],
            idle_step_s=config.finetune.idle_step_ms / 1e3,
            finetune_floor=config.finetune.floor,
        )
        policy = config.scheduler.policy
        if not config.log.plans:
            return Scheduler(limits, latency, make_policy(policy))
        config.output_dir.mkdir(parents=True, exist_ok=True)
        self._plan_log = (config.output_dir / "plans.jsonl").open("w", encoding="utf-8")
        return LoggedScheduler(limits, latency, policy, self._plan_log)

    # -- requests ---------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        adapter: str | None = None,
        *,
        arrival: float | None = None,
        seed_offset: int = 0,
        slo_class: str = "standard",
        matcher: LLMatcher | None = None,
    ) -> RequestState:
        """Queue one output sequence for a prompt of token ids. `matcher`: of its structured output,
        if another thread has made it beforehand.

        Raises ValueError, saying why, for what can never be served: an empty prompt, token ids
        outside the vocabulary, a prompt and max_tokens beyond the context, an adapter that is not
        loaded, an unknown class of service, a structured output that cannot be kept to.
        """
        eos = self.runner.model.eos_token_ids
        params.check_banned(eos)
        vocab_size = self.runner.model.vocab_size
        outside = [t for t in prompt if not 0 <= t < vocab_size]
        if outside:
            raise ValueError(
                f"prompt has token id {outside[0]}, the vocabulary has ids 0 to {vocab_size - 1}: "
                f"use this model's tokenizer"
            )
        if slo_class not in self.slos:
            raise ValueError(f"slo_class={slo_class!r} must be one of {', '.join(self.slos)}")
        published = self.directory.lookup(adapter) if adapter else None
        if params.structured_outputs and not matcher:
            matcher = self.matchers.match(params.structured_outputs)
        seed = params.seed
        seed = int(self._seeds.integers(2**31)) if seed is None else seed + seed_offset
        state = RequestState(
            request_id=str(next(self._ids)),
            prompt=tuple(prompt),
            params=params,
            seed=seed & 0x7FFFFFFF,
            arrival=time.monotonic() if arrival is None else arrival,
            stop_ids=params.stop_ids(eos),
            adapter=published,
            slo=self.slos[slo_class],
            matcher=matcher,
        )
        salt = (published.name, published.version) if published else None
        if params.prompt_logprobs is not None:
            state.prompt_logprobs = [None] * len(state.prompt)  # the first stays: nothing precedes
            salt = (salt, state.request_id)  # the whole prompt must be computed: share nothing
        self.scheduler.add(
            Request(
                state.request_id, state.prompt, params.max_tokens, state.arrival, salt, state.slo
            )
        )
        if published:
            published.users += 1
        self._requests[state.request_id] = state
        self._matching += matcher is not None
        return state

    def cancel(self, state: RequestState, error: str | None = None) -> None:
        """Drop a request; its pages are free at once."""
        if self.scheduler.cancel(state.request_id):
            state.error = error
            self._finish(state, "cancelled")

    def _finish(self, state: RequestState, reason: str) -> None:
        state.finish_reason = reason
        self._requests.pop(state.request_id, None)
        self._matching -= state.matcher is not None
        if state.adapter:
            self.directory.release(state.adapter)

    # -- adapters ---------------------------------------------------------------------------------

    def load_adapter(self, name: str, path) -> Published:
        """Load a PEFT folder as a new version of `name`."""
        adapter = load_adapter(path, self.runner.model, self.config.model.path)
        return self.publish(name, adapter)

    def to_row(self, name: str, adapter: Adapter) -> AdapterRow:
        """What `publish` writes to the bank: may be made in another thread beforehand."""
        return to_row(adapter, self.runner.model, self.runner.sizes.bank, name)

    def publish(self, name: str, adapter: Adapter, row: AdapterRow | None = None) -> Published:
        """Serve an adapter as a new version of `name`; requests to the old one finish on it."""
        weights, scales = row or self.to_row(name, adapter)
        published = self.directory.publish(name, adapter.config, adapter.shapes)
        self.runner.write_adapter(published.bank_slot, weights, scales)
        return published

    def publish_job(self, job: FinetuneJob) -> Published:
        """Serve what a job has learnt so far under its name: a copy of its slot on the device.
        ValueError when it has ended: its slot may be another's."""
        if not job.running:
            raise ValueError(f"job {job.name!r} has ended: load its adapter from its folder")
        published = self.directory.publish(job.name, job.peft, job.shapes)
        self.runner.copy_adapter(job.bank_slot, published.bank_slot)
        return published

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that use it finish."""
        self.directory.unload(name)

    def read_adapter(self, name: str) -> Adapter:
        """A served adapter's weights on the host; waits for the device."""
        published = self.directory.lookup(name)
        values = self.runner.read_adapter(published.bank_slot)
        return from_row(values, published.config, published.shapes)

    # -- jobs -------------------------------------------------------------------------------------

    def add_job(self, job: FinetuneJob) -> None:
        """Start a finetuning job beside whatever runs."""
        job.bank_slot = self.directory.start_training(job.name)
        try:
            self.trainer.start(job)
        except Exception:
            self.directory.stop_training(job.name)
            raise

    # -- the loop ---------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a request is unfinished, a job running, or a step in flight."""
        return bool(self._requests or self.trainer.has_work or self._in_flight or self._unsettled)

    def step(self) -> list[RequestState]:
        """Plan and dispatch a step, then read the one before; returns requests that finished."""
        started = time.perf_counter()
        self.progressed = []
        if self._matching:  # tokens will be read amid a step: what else changes jobs comes before
            self._settle()
        self.trainer.feed()
        plan, finished = self.scheduler.plan(time.monotonic()), []
        if plan is not None:
            step = _InFlight(plan, time.monotonic(), [], None, [], None, None)
            if plan.token_bucket:
                planned, hidden_rows = self._forward(step)
                if planned.awaits_tokens and self._in_flight:
                    waiting = time.perf_counter()
                    finished = self._postprocess(self._in_flight.popleft())
                    started += time.perf_counter() - waiting
                self._sample(step, planned, hidden_rows)
            if plan.backward:
                self._backward(step, plan.backward)
            self._in_flight.append(step)
            self.steps += 1
        self.host_seconds.append(time.perf_counter() - started)
        if self._in_flight and (plan is None or len(self._in_flight) > 1):
            return self._postprocess(self._in_flight.popleft())
        if plan is None:
            self._settle()
        return finished

    def _forward(self, step: _InFlight) -> tuple[PlannedStep, jax.Array]:
        """Send a step's forward program to the device; the planned step, and the outputs to sample
        from [R, D]."""
        plan = step.plan
        self.buckets.setdefault(plan.token_bucket, BucketUse()).count(plan)
        microbatch = self.trainer.forward(plan.forward) if plan.forward else None
        planned = self._builder.build(plan, self._requests, microbatch)
        step.hidden, hidden_rows = self.runner.forward(
            planned.variant, plan.token_bucket, planned.vector
        )
        return planned, hidden_rows

    def _sample(self, step: _InFlight, planned: PlannedStep, hidden_rows: jax.Array) -> None:
        if planned.sampled:
            allowed = None
            if planned.matchers:
                allowed = self.matchers.allowed(planned.matchers, len(planned.rows.row))
            step.sampled = planned.sampled
            step.report = self.runner.sample(
                hidden_rows, planned.rows, full=planned.full, allowed=allowed
            )
            jax.tree.map(lambda x: x.copy_to_host_async(), step.report)
        self._request_prompt_logprobs(step, planned)

    def _backward(self, step: _InFlight, units: BackwardUnits) -> None:
        step.last_unit = self.trainer.backward(units)
        if units.done:
            step.after = self.trainer.finish_microbatch(units.microbatch)

    def _request_prompt_logprobs(self, step: _InFlight, planned: PlannedStep) -> None:
        if step.hidden is None or not planned.prompt_targets:
            return
        targets = np.zeros((2, step.plan.token_bucket), np.int32)
        targets[1] = -1
        for target in planned.prompt_targets:
            where = slice(target.first_output, target.first_output + len(target.tokens))
            targets[0, where], targets[1, where] = target.tokens, target.state.bank_row
        report = self.runner.prompt_logprobs(step.hidden, targets)
        step.prompt_logprobs = [(target, report) for target in planned.prompt_targets]

    def _postprocess(self, step: _InFlight) -> list[RequestState]:
        """Read a step's tokens, find out who is done, and let the scheduler know."""
        self._settle()
        plan = step.plan
        if step.report is None and step.last_unit is None:
            jax.block_until_ready(step.hidden)  # nothing to read: still, stay one step ahead only
        sampled, stopped, finished = self._read_tokens(step)
        self._read_prompt_logprobs(step)
        now = time.monotonic()
        measured = (
            None if step.last_unit is not None else now - max(step.started, self._device_free_at)
        )
        if measured is not None:
            self._device_free_at = now
            self._note(plan, measured)
        self._unsettled = step
        for sequence in self.scheduler.complete(plan, sampled, stopped, now, measured):
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
            self._note(step.plan, measured)
        for read in step.after:
            read()

    def _note(self, plan: StepPlan, measured_s: float) -> None:
        """Keep what was observed of a step, for who watches the engine."""
        self.observations.append(
            StepObservation(
                len(plan.decode),
                sum(chunk.length for chunk in plan.prefill),
                plan.forward.length if plan.forward else 0,
                len(plan.backward.units) if plan.backward else 0,
                len(plan.preempted),
                measured_s,
                plan.predicted_s,
            )
        )

    def _read_tokens(self, step: _InFlight) -> tuple[dict[str, int], set[str], list[RequestState]]:
        """The tokens by request, the requests they end, and those that cannot go on."""
        if step.report is None:
            return {}, set(), []
        self.progressed = step.sampled
        report = jax.tree.map(np.asarray, step.report)
        sampled, stopped, failed = {}, set(), []
        for i, state in enumerate(step.sampled):
            token = int(report["tokens"][i])
            sampled[state.request_id] = token
            if state.finished:
                continue
            if state.params.logprobs is not None:
                state.logprobs.append(
                    top_logprobs(
                        token,
                        report["logprobs"][i],
                        report["top_tokens"][i],
                        report["top_logprobs"][i],
                        state.params.logprobs,
                    )
                )
            if state.append(token, self.tokenizer):
                stopped.add(state.request_id)
            elif state.matcher and (reason := failure(state.matcher)):
                self.cancel(state, reason)
                failed.append(state)
        return sampled, stopped, failed

    def _read_prompt_logprobs(self, step: _InFlight) -> None:
        step.prompt_logprobs = [(t, jax.tree.map(np.asarray, r)) for t, r in step.prompt_logprobs]
        for target, report in step.prompt_logprobs:
            state = target.state
            for i, token in enumerate(target.tokens):
                at = target.first_output + i
                state.prompt_logprobs[target.position + i] = top_logprobs(
                    token,
                    float(report["logprobs"][at]),
                    report["top_tokens"][at],
                    report["top_logprobs"][at],
                    state.params.prompt_logprobs or 0,
                )

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
