"""The scheduler: four verbs, `add`, `plan`, `complete`, `cancel` (FlexLLM, section 6).

Each step holds decode tokens, then prefill chunks by urgency, then finetuning in what is left of
the token bucket and of the time budget. The queues know what can be done, the policy how much of it
may be done in this step, and `choice` picks the finetuning that makes most of it. The host runs
ahead of the device: `plan(k + 1)` comes before `complete(k)`, so a plan never needs the value of a
token in flight. Plans run on the device in order; pages and rows given up in one plan may therefore
have a new owner in the same plan. `policies` has the ways to share that ours is compared with.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import replace

from scheduler.admission import check_microbatch, check_request
from scheduler.cache.pages import PagePool
from scheduler.cache.snapshots import Snapshots
from scheduler.config import SchedulerConfig
from scheduler.drafts import expected
from scheduler.finetuning import FinetuneQueue, FinetuneWork
from scheduler.inference import InferenceQueue
from scheduler.latency.model import LatencyModel, StepFeatures
from scheduler.policies import CoServing, Policy, Step
from scheduler.policies.policy import slack
from scheduler.request import Chunk, Decode, Microbatch, Request, Sequence, Status, StepPlan

__all__ = ["Scheduler", "SchedulerConfig"]

_LONGEST_REST = 256


class Scheduler:
    """Decides what each step computes. Not thread-safe: one engine loop drives it."""

    def __init__(
        self, config: SchedulerConfig, latency: LatencyModel, policy: Policy | None = None
    ) -> None:
        self.config, self._reads = config, config.reads
        self.latency = latency
        self.policy = policy or CoServing()
        self.pool = PagePool(
            config.num_pages, config.page_size, config.prefix_caching, _snapshots(config)
        )
        self.finetuning = FinetuneQueue(config, self.pool, latency, self.policy.overlap)
        self.inference = InferenceQueue(config, self.pool, self, self.finetuning.jobs)
        self._outstanding: deque[StepPlan] = deque()
        # When the device began the oldest outstanding plan, or finishes the last completed one.
        self._device_free = -math.inf
        self._steps = itertools.count()
        self._parked: list[int] = []  # not reported in a plan yet
        self._draft_rest = 0  # steps without drafts that are to come, as they would not pay
        self._last_rest = 1

    @property
    def num_waiting(self) -> int:
        """Requests without a row: not admitted yet, or preempted."""
        return len(self.inference.waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a row and pages."""
        return len(self.inference.running)

    @property
    def num_microbatches(self) -> int:
        """Microbatches queued or in work."""
        return len(self.finetuning)

    @property
    def pool_usage(self) -> float:
        """Share of the pages that are referenced; cached ones without reference do not count."""
        return 1 - self.pool.num_free / self.pool.num_pages

    def reads_first(self) -> bool:
        """Whether the outstanding plans should be completed before the next is made: a draft is in
        flight, or one could follow if the tokens were known. A call like the others: a draft that
        was promised and does not come counts as one that failed."""
        drafting, asks = self.inference.drafting, self._draft_rest == 0
        unknown = [s for s in drafting if asks and s.in_flight and not s.drafted]
        promised = [s for s in unknown if s.lookup and s.lookup.promises(s.tokens)]  # all are asked
        return bool(promised) or any(s.drafted for s in drafting)

    @property
    def has_work(self) -> bool:
        """Whether anything is unfinished. `plan` may still be None: until a plan is completed, or
        a job goes on."""
        return bool(self.inference.sequences or self.finetuning)

    def add(self, work: Request | Microbatch) -> None:
        """Queue a request or a microbatch; ValueError, saying why, if it can never run."""
        if isinstance(work, Microbatch):
            check_microbatch(work, self.config)
            self.finetuning.add(work)
        else:
            check_request(work, self.config)
            self.inference.add(work)

    def plan(self, now: float) -> StepPlan | None:
        """The next step at time `now`, or None when nothing can be done yet."""
        policy, inference, finetuning = self.policy, self.inference, self.finetuning
        parked = len(self._parked)
        step = Step(
            self.config,
            self.latency,
            now + self._pending_s(now),
            inference.running,
            inference.waiting,
            finetuning.in_work,
            queued=len(finetuning.jobs) > 0,
        )
        serves = policy.serves(step)
        if serves:
            self._plan_inference(step)
        work = None
        if finetuning and len(self._parked) == parked:
            work = finetuning.plan(step.features, policy.allowance(step), self._headroom())
        if not serves and not work:  # finetuning has no use for its turn
            self._plan_inference(step)
        if not step.serving and not work:
            return None
        plan = self._dispatch(step, work)
        policy.planned(step, plan)
        return plan

    def complete(
        self,
        plan: StepPlan,
        sampled: Mapping[str, int],
        stopped: Collection[str],
        now: float,
        measured_s: float | None = None,
        accepted: Mapping[str, list[int]] | None = None,
    ) -> list[Sequence]:
        """Take in the results of the oldest outstanding plan; returns the sequences it finished.

        To be called as soon as the tokens are read back: its units may still run, at time `now`.
        `sampled` has a token for each request of the plan that samples; `stopped` are requests
        whose token of this plan is their last. Tokens of finished or cancelled requests are
        ignored. `measured_s`, the step's seconds on the device, corrects the latency model.
        `accepted`: the tokens that come after that, of requests whose drafts are right so far.
        """
        if not self._outstanding or self._outstanding[0] is not plan:
            raise ValueError(
                f"complete: step {plan.step} is not the oldest outstanding plan; complete each"
                " plan once, in the order they were made"
            )
        self._outstanding.popleft()
        self._device_free = now + self._units_s(plan)
        if measured_s is not None:
            self.observe(plan, measured_s)
        finished, page_size = [], self.pool.page_size
        first_tokens = (chunk.sequence for chunk in plan.prefill if chunk.samples)
        for sequence in itertools.chain(plan.decode.sequences, first_tokens):
            if sequence.status is Status.FINISHED:
                continue
            request_id = sequence.request.request_id
            if request_id not in sampled:
                raise ValueError(f"complete: step {plan.step} has no token for {request_id!r}")
            known, more = len(sequence.tokens), ()
            if sequence.drafted:
                more = (accepted or {}).get(request_id, ())
                sequence.verify(len(more))
            for token in (sampled[request_id], *more):
                sequence.append(token, now)
            if sequence.request.job is not None:
                self.finetuning.jobs.charge(sequence.request.job, 1 + len(more))
            if request_id in stopped:
                self.inference.finish(sequence, "stop")
                finished.append(sequence)
            elif len(sequence.output) == sequence.request.max_tokens:
                self.inference.finish(sequence, "length")
                finished.append(sequence)
            elif (len(sequence.tokens) - 1) // page_size > (known - 1) // page_size:
                # All tokens but the last one are computed for sure, so a page was just filled.
                self.inference.publish(sequence)
        return finished

    def observe(self, plan: StepPlan, measured_s: float) -> None:
        """Learn how long a step took, for those whose units end after `complete`."""
        self.latency.observe(plan.features, measured_s)

    def cancel(self, request_id: str) -> bool:
        """Drop a request and free its pages at once; False if it is unknown or finished."""
        sequence = self.inference.sequences.get(request_id)
        if sequence is None:
            return False
        self.inference.finish(sequence, "cancelled")
        return True

    def forget_prefixes(self) -> None:
        """Share nothing of what was computed until now: the last plan could not be dispatched, and
        its pages would be taken for written."""
        self.pool.forget()

    # ---- jobs ----

    def add_job(self, job: str, weight: float = 1.0, priority: int = 0) -> None:
        """Know a job. Among those of the highest priority that have microbatches, tokens are shared
        in proportion to the weights."""
        self.finetuning.jobs.add(job, weight, priority)

    def remove_job(self, job: str) -> None:
        """Forget a job and drop its microbatches."""
        self.finetuning.remove_job(job)

    def pause_job(self, job: str) -> None:
        """Let a job wait from the next step on; its microbatches in work will start again."""
        self._parked += self.finetuning.pause_job(job)

    def resume_job(self, job: str) -> None:
        """Let a paused job go on."""
        self.finetuning.jobs.pause(job, False)

    def microbatches_of(self, job: str) -> int:
        """Microbatches of a job, queued or in work."""
        return self.finetuning.of_job(job)

    def cancel_microbatch(self, microbatch_id: int) -> bool:
        """Drop a microbatch and free its pages at once; False if unknown."""
        return self.finetuning.cancel(microbatch_id)

    @property
    def pages_held(self) -> int:
        """Pages that finetuning holds."""
        return self.finetuning.pages_held

    def park(self) -> None:
        """Take the pages of the newest microbatch in work away: inference needs them."""
        self._parked.append(self.finetuning.park())

    # ---- many steps at once, for the simulator ----

    def repeats(self, plan: StepPlan) -> int:
        """How many more steps would be just like `plan`, which is complete, if nothing came.

        The last one may end requests; 0 when the next one would end a forward or a backward.
        """
        if self._outstanding or plan.prefill or plan.parked or not plan.predicted_s:
            return 0
        count = min(self.policy.repeats(), self.inference.repeats(plan.decode))
        return min(count, self.finetuning.repeats(plan))

    def repeat(self, plan: StepPlan, count: int, now: float) -> list[Sequence]:
        """Count `count` <= `repeats(plan)` more steps like `plan` as planned and completed, the
        last one's tokens read at `now`; returns the sequences that the last one finished."""
        self.policy.repeated(count)
        self.finetuning.repeat(plan, count)
        self._device_free = now + self._units_s(plan)
        return self.inference.repeat(plan.decode, count, now)

    def repeated(self, plan: StepPlan, times: float) -> StepFeatures:
        """Features of the step that follows `plan` after `times` - 1 others like it."""
        grown = self._reads.of_decode(plan.decode.positions, 1 + times)
        return plan.features._replace(decode_kv=grown)

    # ---- parts of a plan ----

    def _plan_inference(self, step: Step) -> None:
        """Decode, then prefill as far as the policy allows."""
        step.decode = self.inference.plan_decode()
        step.features = self._features(step.decode, [])
        drafts = self._plan_drafts(step) if self.inference.drafting else []
        room = self.policy.token_limit(step) - len(step.decode) - sum(c.length for c in drafts)
        step.prefill, step.backlog = self.inference.plan_prefill(max(0, room))
        step.prefill = [*drafts, *step.prefill]
        if step.prefill:
            step.features = self._features(step.decode, step.prefill)

    def _plan_drafts(self, step: Step) -> list[Chunk]:
        """Drafts as far as they make no token late and bring more tokens a second."""
        if self._draft_rest:
            self._draft_rest -= 1
            return []
        drafts = self.inference.propose_drafts(step.decode)
        asked = bool(drafts)
        without_s, tokens = self.latency.forward_s(step.features), len(step.decode)
        slack_s, tpot_s = slack(step, (), step.decode)
        budget_s = max(slack_s, tpot_s) * self.latency.margin
        while drafts:
            chunks = [Chunk(s, s.computed - 1, 1 + len(d), True) for s, d in drafts.items()]
            rest = replace(step.decode, sequences=step.decode.sequences[len(drafts) :])
            seconds = self.latency.forward_s(self._features(rest, chunks))
            gain = sum(expected(s.lookup, len(d)) for s, d in drafts.items() if s.lookup)
            if seconds <= budget_s and (tokens + gain) * without_s > tokens * seconds:
                break
            drafts = {s: half for s, d in drafts.items() if (half := d[: len(d) // 2])}
        if not drafts:
            if asked:  # what would not pay now will not soon
                self._last_rest = self._draft_rest = min(2 * self._last_rest, _LONGEST_REST)
            return []
        self._last_rest = 1
        step.decode, chunks = self.inference.dispatch_drafts(step.decode, drafts)
        return chunks

    def _headroom(self) -> int:
        """Pages that inference would soon take back: one for each request, and the next one's."""
        waiting = self.inference.waiting
        coming = self.pool.pages_for(waiting[0].num_tokens) if waiting else 0
        return len(self.inference.running) + coming

    def _features(self, decode: Decode, prefill: list[Chunk]) -> StepFeatures:
        buckets = self.config.token_buckets
        if not prefill:
            used = len(decode)
            return StepFeatures(
                token_bucket=buckets[bisect.bisect_left(buckets, used)] if used else 0,
                decode_tokens=used,
                decode_kv=decode.keys,
                adapters=decode.adapters,
                sampling=decode.sampling,
                logprobs=decode.logprobs,
                most_rows=self.config.max_sequences,
            )
        tokens = sum(chunk.length for chunk in prefill)
        used = len(decode) + tokens
        keys = [chunk.start + chunk.length for chunk in prefill]
        sampled = [decode, *(chunk.sequence for chunk in prefill if chunk.samples)]
        return StepFeatures(
            token_bucket=buckets[bisect.bisect_left(buckets, used)] if used else 0,
            decode_tokens=len(decode),
            prefill_tokens=tokens,
            decode_kv=decode.keys,
            chunk_kv=sum(self._reads(n, c.length) for c, n in zip(prefill, keys, strict=True)),
            attention_pairs=sum(
                self._reads.pairs(c.length, n) for c, n in zip(prefill, keys, strict=True)
            ),
            adapters=decode.adapters
            or any(chunk.sequence.request.cache_salt is not None for chunk in prefill),
            sampling=max(s.sampling for s in sampled),
            logprobs=any(s.logprobs for s in sampled),
            most_rows=self.config.max_sequences,
        )

    def _dispatch(self, step: Step, work: FinetuneWork | None) -> StepPlan:
        """Make the plan, and count its prefill as computed."""
        features = work.features if work else step.features
        plan = StepPlan(
            step=next(self._steps),
            decode=step.decode,
            prefill=tuple(step.prefill),
            forward=work.forward if work else None,
            backward=work.backward if work else None,
            token_bucket=features.token_bucket,
            preempted=tuple(self.inference.preempted),
            parked=tuple(self._parked),
            features=features,
            predicted_s=self.latency.predict(features),
            state_copies=tuple(self.inference.state_copies),
        )
        self.inference.preempted.clear()
        self.inference.state_copies.clear()
        self._parked.clear()
        prompts = [chunk for chunk in step.prefill if not chunk.drafts]
        for chunk in prompts:
            chunk.sequence.dispatch_prefill(chunk.length, chunk.samples)
            self.finetuning.jobs.charge(chunk.sequence.request.job, chunk.length)
        for chunk in prompts:
            # Only now: a request of the same step must not read pages this step still writes.
            self.inference.publish(chunk.sequence)
        if not self._outstanding:
            self._device_free = step.start
        self._outstanding.append(plan)
        return plan

    def _pending_s(self, now: float) -> float:
        """Predicted seconds until the device has finished all it was given."""
        if not self._outstanding:
            return max(0.0, self._device_free - now)
        oldest_end = self._device_free + self._outstanding[0].predicted_s
        rest = itertools.islice(self._outstanding, 1, None)
        return max(0.0, oldest_end - now) + sum(plan.predicted_s for plan in rest)

    def _units_s(self, plan: StepPlan) -> float:
        """Predicted seconds of a plan's backward units, which run after its tokens are sampled."""
        return self.latency.unit_s(plan.features) if plan.token_bucket else 0.0


def _snapshots(config: SchedulerConfig) -> Snapshots | None:
    if not (config.state_snapshots and config.prefix_caching):
        return None
    first = config.max_sequences
    slots = range(first, first + config.state_snapshots)
    return Snapshots(slots, config.snapshot_every, config.page_size)
