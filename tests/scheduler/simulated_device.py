"""A device that only keeps books, to check plans against.

It executes every plan the moment it is made, in order, as the real one would, and remembers what
each slot of each page holds: a chain over the salt and all tokens up to that position. Before a
chunk runs, all earlier positions of its sequence must still be there. Any page that was reused too
early, shared wrongly or never computed is thereby found, whatever the scheduler believes. With
snapshots of recurrent state, each row's state is such a chain too, which a chunk must go on from.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field

from scheduler.coserving import Scheduler
from scheduler.policies import CoServing
from scheduler.request import (
    Chunk,
    FinetuneForward,
    Microbatch,
    Request,
    Sequence,
    Status,
    StepPlan,
)


@dataclass
class SequenceOnDevice:
    """What the device did for a sequence: all tokens sampled, and the next position expected."""

    tokens: list[int]
    position: int = 0
    preemptions: int = 0


@dataclass
class Attempt:
    """Progress of a microbatch since it was last started."""

    serial: int
    forward: FinetuneForward  # its first
    forwarded: int = 0
    units: int = 0


@dataclass
class SimulatedEngine:
    """Drives a scheduler with `ahead` plans made before the oldest is completed."""

    scheduler: Scheduler
    ahead: int = 1
    now: float = 0.0
    step_s: float = 0.01
    stop_after: dict[str, int] = field(default_factory=dict)
    finished: dict[str, Sequence] = field(default_factory=dict)
    microbatches_done: list[int] = field(default_factory=list)
    plans: list[StepPlan] = field(default_factory=list)
    keep_plans: bool = False
    accepted: int = 0  # tokens of drafts
    early: int = 0  # plans completed before the next is made
    memory: int = 0  # tokens before a token that it depends on; 0: all

    def __post_init__(self) -> None:
        self.kv: dict[tuple[int, int], object] = {}
        self.row_token: dict[int, tuple[Sequence, int]] = {}
        self.state: dict[int, object] = {}  # by slot
        self.device: dict[Sequence, SequenceOnDevice] = {}
        self.pending: list[tuple[StepPlan, dict[str, list[int]]]] = []
        self.attempts: dict[int, Attempt] = {}
        self.serial = 0

    # ---- the engine's loop ----

    def step(self) -> bool:
        """Plan one step if there is one, complete what is due; False if nothing happened."""
        while self.pending and self.scheduler.reads_first():
            self.complete()
            self.early += 1
        plan = self.scheduler.plan(self.now)
        self.check_state()
        if plan is not None:
            self.check_plan(plan)
            if self.keep_plans:
                self.plans.append(plan)
            self.pending.append((plan, self.execute(plan)))
        self.now += self.step_s
        if self.pending and (plan is None or len(self.pending) > self.ahead):
            self.complete()
            return True
        return plan is not None

    def complete(self) -> None:
        plan, results = self.pending.pop(0)
        sampled, accepted, stopped = {}, {}, []
        for chunk in (*plan.decode, *plan.prefill):
            request_id = chunk.sequence.request_id
            if chunk.samples:
                end = self.stop_after.get(request_id) or 1 << 30
                left = end - len(chunk.sequence.output)
                tokens = results[request_id][: max(1, left)]
                sampled[request_id], *accepted[request_id] = tokens
                self.accepted += len(tokens) - 1
                stopped += [request_id] * (len(tokens) == left)
        finished = self.scheduler.complete(plan, sampled, stopped, self.now, None, accepted)
        self.check_state()
        for sequence in finished:
            assert sequence.request_id not in self.finished
            self.finished[sequence.request_id] = sequence

    def drain(self, limit: int) -> None:
        """Step until nothing is left; fails if that takes more than `limit` steps."""
        for _ in range(limit):
            if not self.scheduler.has_work and not self.pending:
                return
            assert self.step() or not self.scheduler.has_work, "deadlock: nothing can be done"
        raise AssertionError(f"still working after {limit} steps")

    # ---- what the device does ----

    def execute(self, plan: StepPlan) -> dict[str, list[int]]:
        for source, target in plan.state_copies:
            self.state[target] = self.state[source]
        chunks = (*plan.decode, *plan.prefill)
        for chunk in chunks:
            self.read(chunk)
        for chunk in chunks:
            self.write(chunk)
        self.finetune(plan)
        return {chunk.sequence.request_id: self.sample(chunk) for chunk in chunks if chunk.samples}

    def read(self, chunk: Chunk) -> None:
        sequence = chunk.sequence
        state = self.device.setdefault(sequence, SequenceOnDevice(list(sequence.request.prompt)))
        if sequence.preemptions != state.preemptions or not state.position:
            state.preemptions = sequence.preemptions
            state.position = sequence.cached_tokens
        assert chunk.start == state.position, "chunks must cover the positions in order"
        end = chunk.start + chunk.length - len(chunk.drafts)
        assert end <= len(state.tokens) and chunk.samples == (end == len(state.tokens))
        for position in range(chunk.start):
            assert self.kv[self.slot(sequence, position)] == self.content(sequence, position)
        if chunk.start and self.scheduler.pool.snapshots is not None:
            assert self.state[sequence.row] == self.content(sequence, chunk.start - 1)

    def write(self, chunk: Chunk) -> None:
        for position in range(chunk.start, chunk.start + chunk.length):
            slot = self.slot(chunk.sequence, position)
            self.kv[slot] = self.content(chunk.sequence, position, chunk.drafts)
        self.state[chunk.sequence.row] = self.content(chunk.sequence, position, chunk.drafts)
        self.device[chunk.sequence].position += chunk.length - len(chunk.drafts)

    def sample(self, chunk: Chunk) -> list[int]:
        """The next token, and more as long as drafts are right."""
        sequence, state = chunk.sequence, self.device[chunk.sequence]
        known = len(state.tokens)
        for draft in (*chunk.drafts, None):
            salted = (tuple(state.tokens[-self.memory :]), sequence.request.cache_salt)
            state.tokens.append(zlib.crc32(repr(salted).encode()) % 3)
            if state.tokens[-1] != draft:
                break
            state.position += 1
        self.row_token[sequence.row] = (sequence, len(state.tokens))
        return state.tokens[known:]

    def slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        size = self.scheduler.pool.page_size
        return sequence.pages[position // size], position % size

    def content(self, sequence: Sequence, position: int, drafts: tuple[int, ...] = ()) -> object:
        tokens = [*self.device[sequence].tokens, *drafts]
        return sequence.request.cache_salt, tuple(tokens[: position + 1])

    def finetune(self, plan: StepPlan) -> None:
        for microbatch_id in plan.parked:
            self.attempts.pop(microbatch_id, None)
        if forward := plan.forward:
            self.finetune_forward(forward)
        if backward := plan.backward:
            attempt = self.attempts[backward.microbatch.microbatch_id]
            self.check_finetune_kv(attempt)
            assert attempt.forwarded == backward.microbatch.tokens
            assert backward.units.start == attempt.units and backward.units.step == 1
            others = [a for a in self.attempts.values() if a is not attempt and a.units]
            assert not others, "two microbatches go backward"
            attempt.units = backward.units.stop
            assert backward.done == (attempt.units == self.total_units(backward.microbatch))
            if backward.done:
                self.microbatches_done.append(backward.microbatch.microbatch_id)
                del self.attempts[backward.microbatch.microbatch_id]

    def finetune_forward(self, forward: FinetuneForward) -> None:
        microbatch = forward.microbatch
        if forward.started:
            self.serial += 1
            self.attempts[microbatch.microbatch_id] = Attempt(self.serial, forward)
        attempt = self.attempts.get(microbatch.microbatch_id)
        assert attempt, "a microbatch goes on that never started"
        for other in self.attempts.values():
            theirs = other.forward.microbatch
            if theirs is not microbatch:
                assert (
                    theirs.job != microbatch.job
                    or theirs.weights_version == microbatch.weights_version
                )
                a, b = self.slots_held(other.forward), self.slots_held(forward)
                assert a.stop <= b.start or b.stop <= a.start, "finetuning slots are shared"
        assert self.slots_held(forward).stop <= self.scheduler.config.finetune_slots
        self.check_finetune_kv(attempt)
        assert forward.start == attempt.forwarded and forward.length > 0
        for slot in self.kv_slots(forward)[forward.start : forward.start + forward.length]:
            self.kv[slot] = (attempt.serial, slot)
        attempt.forwarded += forward.length

    def check_finetune_kv(self, attempt: Attempt) -> None:
        for slot in self.kv_slots(attempt.forward)[: attempt.forwarded]:
            assert self.kv[slot] == (attempt.serial, slot)

    def kv_slots(self, forward: FinetuneForward) -> list[tuple[int, int]]:
        size = self.scheduler.pool.page_size
        return [
            (pages[position // size], position % size)
            for pages, length in zip(forward.pages, forward.microbatch.lengths, strict=True)
            for position in range(length)
        ]

    def slots_held(self, forward: FinetuneForward) -> range:
        unit_tokens = self.scheduler.config.unit_tokens
        assert forward.first_token_slot % unit_tokens == 0
        slices = -(-forward.microbatch.tokens // unit_tokens)
        return range(forward.first_token_slot, forward.first_token_slot + slices * unit_tokens)

    def total_units(self, microbatch: Microbatch) -> int:
        config = self.scheduler.config
        slices = -(-microbatch.tokens // config.unit_tokens)
        return slices + (config.num_layers * slices if microbatch.backward else 0)

    # ---- what must hold ----

    def check_plan(self, plan: StepPlan) -> None:
        config = self.scheduler.config
        assert plan.num_tokens <= plan.token_bucket <= config.max_tokens_per_step
        assert plan.token_bucket in ((0,) if not plan.num_tokens else config.token_buckets)
        assert plan.num_tokens or plan.backward, "an empty plan must be None"
        chunks = (*plan.decode, *plan.prefill)
        owners = [chunk.sequence for chunk in chunks]
        assert len(set(owners)) == len(owners) <= config.max_sequences
        assert len({sequence.row for sequence in owners}) == len(owners)
        for chunk in plan.decode:
            row_token = self.row_token[chunk.sequence.row]
            assert row_token == (chunk.sequence, chunk.start + 1), "not the row's last token"
            assert chunk.length == 1 and chunk.samples
        for chunk in plan.prefill:
            known = len(chunk.sequence.tokens)
            assert chunk.length > 0 and chunk.start + chunk.length - len(chunk.drafts) <= known
        samples = sum(1 + len(c.drafts) for c in chunks if c.samples)
        assert samples <= config.max_sequences, "there are not as many rows to sample"
        ours = isinstance(self.scheduler.policy, CoServing) and not config.finetune_floor
        if ours and any(self.has_no_room(chunk) for chunk in plan.prefill):
            assert not plan.forward and not plan.backward, "finetuning went before a prefill"
        features = plan.features
        assert features.decode_tokens == len(plan.decode)
        assert features.prefill_tokens == sum(chunk.length for chunk in plan.prefill)
        assert features.finetune_tokens == (plan.forward.length if plan.forward else 0)
        units = plan.backward.units if plan.backward else ()
        assert features.loss_units + features.layer_units == len(units)
        self.check_segments(plan)

    def has_no_room(self, chunk: Chunk) -> bool:
        """Whether it ends before the prefill does, and not for a snapshot."""
        return not chunk.samples and chunk.start + chunk.length not in chunk.sequence.stops

    def check_segments(self, plan: StepPlan) -> None:
        if plan.forward is None:
            return
        start, stop = plan.forward.start, plan.forward.start + plan.forward.length
        touched, position = 0, 0
        for length in plan.forward.microbatch.lengths:
            touched += position < stop and start < position + length
            position += length
        assert touched <= self.scheduler.config.max_finetune_segments

    def check_state(self) -> None:
        """The books of the scheduler: pages, rows and queues."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        owners: Counter[int] = Counter()
        shared: dict[int, tuple] = {}
        for sequence in scheduler.inference.running:
            assert sequence.status is Status.RUNNING
            assert len(set(sequence.pages)) == len(sequence.pages)
            assert len(sequence.pages) * pool.page_size >= sequence.computed
            owners.update(sequence.pages)
            for index, page in enumerate(sequence.pages):
                end = (index + 1) * pool.page_size
                content = (index, sequence.request.cache_salt, tuple(sequence.tokens[:end]))
                if shared.setdefault(page, content) != content:
                    raise AssertionError(f"page {page} is shared by different prefixes")
                if owners[page] > 1:
                    assert end <= len(sequence.tokens), "a partial page is shared"
        for sequence in scheduler.inference.waiting:
            assert sequence.status is Status.WAITING and sequence.row is None
            assert not sequence.pages and not sequence.computed
        for progress in scheduler.finetuning.in_work:
            pages = [page for pages in progress.pages for page in pages]
            assert len(set(pages)) == len(pages) and not owners.keys() & set(pages)
            owners.update(pages)
        for page in range(pool.num_pages):
            assert pool.references(page) == owners[page], f"page {page} leaked or owned twice"
        assert pool.num_free == pool.num_pages - len(owners)
        inference = scheduler.inference
        rows = [sequence.row for sequence in inference.running] + inference.rows
        assert sorted(rows) == list(range(scheduler.config.max_sequences))
        running = Counter(sequence.request.job for sequence in inference.running)
        assert +scheduler.finetuning.jobs.requests == running
        unfinished = {*inference.running, *inference.waiting}
        assert unfinished == set(inference.sequences.values())


def request(request_id: str, prompt: int | tuple[int, ...], max_tokens: int = 4, **fields):
    """A request; an int prompt is that many distinct tokens."""
    if isinstance(prompt, int):
        prompt = tuple(range(100, 100 + prompt))
    fields = {"arrival": 0.0, **fields}
    return Request(request_id, prompt, max_tokens, **fields)
