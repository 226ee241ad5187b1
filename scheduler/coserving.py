"""The co-serving scheduler: four verbs, `add`, `plan`, `complete`, `cancel` (FlexLLM, section 6).

Each step holds decode tokens, then prefill chunks by arrival, then finetuning in what is left of
the token bucket and of the time budget. The host runs ahead of the device: `plan(k + 1)` comes
before `complete(k)`, so a plan never needs the value of a token in flight. Plans run on the device
in order; pages and rows given up in one plan may therefore have a new owner in the same plan.

Invariants: a page has one owner, or several that share a cached prefix; the chunks of a sequence
cover its positions in order; the oldest sequence always gets what it needs, so all finish.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import replace

from scheduler.admission import check_microbatch, check_request
from scheduler.config import SchedulerConfig
from scheduler.finetuning import FinetuneQueue, FinetuneWork
from scheduler.latency import LatencyModel, StepFeatures
from scheduler.pages import PagePool
from scheduler.request import Chunk, Microbatch, Request, Sequence, Status, StepPlan
from scheduler.slo import slack, step_budget

__all__ = ["Scheduler", "SchedulerConfig"]


def _priority(sequence: Sequence) -> tuple[float, int]:
    return sequence.priority


class Scheduler:
    """Decides what each step computes. Not thread-safe: one engine loop drives it."""

    def __init__(self, config: SchedulerConfig, latency: LatencyModel) -> None:
        self.config = config
        self.latency = latency
        self.pool = PagePool(config.num_pages, config.page_size, config.prefix_caching)
        self._finetuning = FinetuneQueue(config, self.pool, latency)
        self._sequences: dict[str, Sequence] = {}  # unfinished, by request id
        self._waiting: list[Sequence] = []  # oldest first, like _running
        self._running: list[Sequence] = []
        self._rows = list(range(config.max_sequences))  # free rows, a heap
        self._outstanding: deque[StepPlan] = deque()
        # When the device began the oldest outstanding plan, or finishes the last completed one.
        self._device_free = -math.inf
        self._blocked: tuple[Sequence, int] | None = None  # not admitted with this much room
        self._steps = itertools.count()
        self._arrivals = itertools.count()
        self._preempted: list[str] = []  # not reported in a plan yet
        self._parked = False  # in the plan being made

    @property
    def num_waiting(self) -> int:
        """Requests without a row: not admitted yet, or preempted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold a row and pages."""
        return len(self._running)

    @property
    def num_microbatches(self) -> int:
        """Microbatches queued or in work."""
        return len(self._finetuning)

    @property
    def pool_usage(self) -> float:
        """Share of the pages that are referenced; cached ones without reference do not count."""
        return 1 - self.pool.num_free / self.pool.num_pages

    @property
    def has_work(self) -> bool:
        """Whether anything is unfinished. `plan` may still be None until a plan is completed."""
        return bool(self._sequences or self._finetuning)

    def add(self, work: Request | Microbatch) -> None:
        """Queue a request or a microbatch; ValueError, saying why, if it can never run."""
        if isinstance(work, Microbatch):
            check_microbatch(work, self.config)
            self._finetuning.add(work)
            return
        check_request(work, self.config)
        if work.request_id in self._sequences:
            raise ValueError(f"request {work.request_id!r} is already scheduled: use a new id")
        sequence = Sequence(
            request=work,
            slo=work.slo or self.config.slo,
            priority=(work.arrival, next(self._arrivals)),
            tokens=list(work.prompt),
            to_sample=work.max_tokens,
        )
        self._sequences[work.request_id] = sequence
        bisect.insort(self._waiting, sequence, key=_priority)

    def plan(self, now: float) -> StepPlan | None:
        """The next step at time `now`, or None when nothing can be done yet."""
        self._parked = False
        start = now + self._pending_s(now)
        decode = self._plan_decode()
        prefill, backlog = self._plan_prefill(self._prefill_limit(decode, start) - len(decode))
        features = self._features(decode, prefill)
        # A prefill that found no room in this step goes before finetuning in the next one.
        work = None
        if self._finetuning and not backlog and not self._parked:
            work = self._plan_finetuning(decode + prefill, features, start)
        if not decode and not prefill and not work:
            return None
        return self._dispatch(decode, prefill, work, work.features if work else features, now)

    def complete(
        self,
        plan: StepPlan,
        sampled: Mapping[str, int],
        stopped: Collection[str],
        now: float,
        measured_s: float | None = None,
    ) -> list[Sequence]:
        """Take in the results of the oldest outstanding plan; returns the sequences it finished.

        To be called as soon as the tokens are read back: its units may still run, at time `now`.
        `sampled` has a token for each request of the plan that samples; `stopped` are requests
        whose token of this plan is their last. Tokens of finished or cancelled requests are
        ignored. `measured_s`, the step's seconds on the device, corrects the latency model.
        """
        if not self._outstanding or self._outstanding[0] is not plan:
            raise ValueError(
                f"complete: step {plan.step} is not the oldest outstanding plan; complete each"
                " plan once, in the order they were made"
            )
        self._outstanding.popleft()
        self._device_free = now + self._units_s(plan)
        if measured_s is not None:
            self.latency.observe(plan.features, measured_s)
        finished = []
        for chunk in itertools.chain(plan.decode, plan.prefill):
            sequence = chunk.sequence
            if not chunk.samples or sequence.status is Status.FINISHED:
                continue
            request_id = sequence.request.request_id
            if request_id not in sampled:
                raise ValueError(f"complete: step {plan.step} has no token for {request_id!r}")
            sequence.append(sampled[request_id], now)
            if request_id in stopped:
                self._finish(sequence, "stop")
                finished.append(sequence)
            elif len(sequence.output) == sequence.request.max_tokens:
                self._finish(sequence, "length")
                finished.append(sequence)
            elif (len(sequence.tokens) - 1) % self.pool.page_size == 0:
                # All tokens but the last one are computed for sure, so a page was just filled.
                self._publish(sequence)
        return finished

    def cancel(self, request_id: str) -> bool:
        """Drop a request and free its pages at once; False if it is unknown or finished."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._finish(sequence, "cancelled")
        return True

    def cancel_microbatch(self, microbatch_id: int | None = None) -> bool:
        """Drop a microbatch (None: the head) and free its pages at once; False if unknown."""
        return self._finetuning.cancel(microbatch_id)

    # ---- the three parts of a plan ----

    def _plan_decode(self) -> list[Chunk]:
        """One token for every sequence whose prefill is dispatched, oldest first."""
        chunks: list[Chunk] = []
        page_size = self.pool.page_size
        for sequence in tuple(self._running):
            position = sequence.computed
            if position < sequence.prefill_end or not sequence.to_sample or sequence.row is None:
                continue  # in its prefill; or drained; or preempted by an older one just now
            if position < len(sequence.pages) * page_size or self._grow(sequence, chunks):
                chunks.append(Chunk(sequence, position, 1, True))
        return chunks

    def _plan_prefill(self, room: int) -> tuple[list[Chunk], bool]:
        """Up to `room` prompt tokens, oldest first, and whether some found no room."""
        chunks: list[Chunk] = []
        prefilling = [s for s in self._running if s.computed < s.prefill_end]
        for sequence in prefilling:
            if room:
                room -= self._append_prefill(chunks, sequence, room)
        while room and self._waiting and self._rows:
            sequence = self._waiting[0]
            # A preempted sequence is computed again from its tokens: it must know them all.
            if sequence.in_flight or not self._admit(sequence):
                break
            prefilling.append(sequence)
            room -= self._append_prefill(chunks, sequence, room)
        unfinished = len(prefilling) > sum(chunk.samples for chunk in chunks)
        return chunks, unfinished or bool(not room and self._waiting and self._rows)

    def _append_prefill(self, chunks: list[Chunk], sequence: Sequence, room: int) -> int:
        left = sequence.prefill_end - sequence.computed
        length = min(left, room)
        chunks.append(Chunk(sequence, sequence.computed, length, samples=length == left))
        return length

    def _plan_finetuning(
        self, chunks: list[Chunk], features: StepFeatures, start: float
    ) -> FinetuneWork | None:
        """Finetuning within the slack of the requests, or within `idle_step_s` without any."""
        idle = not chunks and not self._waiting
        if idle:
            budget_s = self.config.idle_step_s
        else:
            concerned = [chunk.sequence for chunk in chunks] + self._waiting[:1]
            budget_s = step_budget(concerned, start, self.latency.margin)
        # What would soon take the pages back: a page for each sequence, and the next request.
        headroom = len(self._running)
        if self._waiting:
            headroom += self.pool.pages_for(self._waiting[0].num_tokens)
        return self._finetuning.plan(features, budget_s, idle, headroom)

    def _prefill_limit(self, decode: list[Chunk], start: float) -> int:
        """Token slots that decode and prefill may fill together.

        The largest bucket that makes no decoding sequence late. A step of one TPOT keeps pace, so
        it is allowed also when a sequence is late already; and prefill never gets less than a
        smallest bucket.
        """
        buckets = self.config.token_buckets
        if not decode or not (self._waiting or len(decode) < len(self._running)):
            return buckets[-1]
        sequences = [chunk.sequence for chunk in decode]
        tpot_s = min(sequence.slo.tpot_s for sequence in sequences)
        budget_s = max(slack(sequences, start), tpot_s) * self.latency.margin
        features = self._features(decode, [])
        limit = bisect.bisect_right(
            buckets,
            budget_s,
            key=lambda bucket: self.latency.predict(replace(features, token_bucket=bucket)),
        )
        least = bisect.bisect_left(buckets, len(decode) + buckets[0])
        return buckets[min(max(limit - 1, least), len(buckets) - 1)]

    def _features(self, decode: list[Chunk], prefill: list[Chunk]) -> StepFeatures:
        buckets = self.config.token_buckets
        prefill_tokens = sum(chunk.length for chunk in prefill)
        used = len(decode) + prefill_tokens
        return StepFeatures(
            token_bucket=buckets[bisect.bisect_left(buckets, used)] if used else 0,
            decode_tokens=len(decode),
            prefill_tokens=prefill_tokens,
            kv_tokens=sum(chunk.start for chunk in decode) + len(decode),
            attention_pairs=sum(c.length * (c.start + c.length) for c in prefill),
            adapters=any(
                chunk.sequence.request.cache_salt is not None
                for chunk in itertools.chain(decode, prefill)
            ),
        )

    def _dispatch(
        self,
        decode: list[Chunk],
        prefill: list[Chunk],
        work: FinetuneWork | None,
        features: StepFeatures,
        now: float,
    ) -> StepPlan:
        """Make the plan, and count its chunks as computed."""
        plan = StepPlan(
            step=next(self._steps),
            decode=tuple(decode),
            prefill=tuple(prefill),
            microbatch=work.microbatch if work else None,
            microbatch_pages=work.pages if work else (),
            microbatch_started=work.started if work else False,
            forward=work.forward if work else None,
            units=work.units if work else range(0),
            microbatch_done=work.done if work else False,
            token_bucket=features.token_bucket,
            preempted=tuple(self._preempted),
            parked=self._parked,
            features=features,
            predicted_s=self.latency.predict(features),
        )
        self._preempted.clear()
        for sequence, _, length, samples in itertools.chain(decode, prefill):
            sequence.computed += length
            if samples:
                sequence.in_flight += 1
                sequence.to_sample -= 1
        for chunk in prefill:
            # Only now: a request of the same step must not read pages this step still writes.
            self._publish(chunk.sequence)
        if not self._outstanding:
            self._device_free = max(now, self._device_free)
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
        if not plan.units or not plan.token_bucket:
            return 0.0
        forward = replace(plan.features, layer_units=0, loss_units=0)
        return max(0.0, plan.predicted_s - self.latency.predict(forward))

    # ---- pages and rows ----

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a row and the pages of all its tokens, or nothing.

        A page for each running sequence stays free: admitting must not preempt right away.
        Finetuning gives its pages up when that is enough to admit.
        """
        pool, salt = self.pool, sequence.request.cache_salt
        # Looking a long prompt up costs time: only once more pages are free than when it failed.
        room = pool.num_free + self._finetuning.pages_held - len(self._running)
        if self._blocked and self._blocked[0] is sequence and room <= self._blocked[1]:
            return False
        shared = pool.find_prefix(sequence.tokens, salt)
        needed = pool.pages_for(len(sequence.tokens)) - len(shared)
        missing = needed + len(self._running) - pool.num_free_beside(shared)
        if missing > self._finetuning.pages_held:
            self._blocked = (sequence, room)
            return False
        if missing > 0:
            self._park()
        self._blocked = None
        pool.share(shared, queried=(len(sequence.tokens) - 1) // pool.page_size)
        sequence.pages = shared + (pool.allocate(needed) or [])
        sequence.computed = sequence.cached_tokens = len(shared) * pool.page_size
        sequence.prefill_end = len(sequence.tokens)
        sequence.row = heapq.heappop(self._rows)
        sequence.status = Status.RUNNING
        self._waiting.remove(sequence)
        bisect.insort(self._running, sequence, key=_priority)
        return True

    def _grow(self, sequence: Sequence, planned: list[Chunk]) -> bool:
        """Add a page for the next token; False if the sequence itself had to be preempted.

        Without a free page finetuning is parked, then the newest sequence not in this plan is
        preempted; one that only waits for its last tokens to come back goes first.
        """
        while not (page := self.pool.allocate(1)):
            if self._finetuning.pages_held:
                self._park()
                continue
            taken = {chunk.sequence for chunk in planned}
            victim = max(
                (other for other in self._running if other not in taken),
                key=lambda other: (not other.to_sample, other.priority),
            )
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += page
        return True

    def _park(self) -> None:
        self._finetuning.park()
        self._parked = True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the waiting queue; the prefill to come covers the output too."""
        self._release(sequence)
        sequence.status = Status.WAITING
        sequence.computed = 0
        sequence.preemptions += 1
        bisect.insort(self._waiting, sequence, key=_priority)
        self._preempted.append(sequence.request_id)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.status is Status.RUNNING:
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        del self._sequences[sequence.request_id]

    def _release(self, sequence: Sequence) -> None:
        """Give back row and pages; what is computed and known stays cached."""
        self._publish(sequence)
        self.pool.release(sequence.pages)
        sequence.pages = []
        if sequence.row is not None:
            heapq.heappush(self._rows, sequence.row)
        sequence.row = None
        self._running.remove(sequence)

    def _publish(self, sequence: Sequence) -> None:
        full = min(sequence.computed, len(sequence.tokens)) // self.pool.page_size
        if full and sequence.pages:
            tokens, salt = sequence.tokens, sequence.request.cache_salt
            self.pool.publish(tokens, salt, sequence.pages, full)
