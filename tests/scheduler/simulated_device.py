"""A device that only keeps books, to check plans against.

It executes every plan the moment it is made, in order, as the real one would, and remembers what
each slot of each page holds: a chain over the salt and all tokens up to that position. Before a
chunk runs, all earlier positions of its sequence must still be there. Any page that was reused too
early, shared wrongly or never computed is thereby found, whatever the scheduler believes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from scheduler.coserving import Scheduler
from scheduler.request import Chunk, Microbatch, Request, Sequence, Status, StepPlan


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

    def __post_init__(self) -> None:
        self.kv: dict[tuple[int, int], object] = {}
        self.row_token: dict[int, tuple[Sequence, int]] = {}
        self.device: dict[Sequence, SequenceOnDevice] = {}
        self.pending: list[tuple[StepPlan, dict[str, int]]] = []
        self.attempt: Attempt | None = None
        self.attempts = 0

    # ---- the engine's loop ----

    def step(self) -> bool:
        """Plan one step if there is one, complete what is due; False if nothing happened."""
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
        plan, sampled = self.pending.pop(0)
        stopped = [
            chunk.sequence.request_id
            for chunk in (*plan.decode, *plan.prefill)
            if chunk.samples
            and len(chunk.sequence.output) + 1
            == self.stop_after.get(chunk.sequence.request_id, 1 << 30)
        ]
        finished = self.scheduler.complete(plan, sampled, stopped, self.now, None)
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

    def execute(self, plan: StepPlan) -> dict[str, int]:
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
        assert chunk.start + chunk.length <= len(state.tokens)
        assert chunk.samples == (chunk.start + chunk.length == len(state.tokens))
        for position in range(chunk.start):
            assert self.kv[self.slot(sequence, position)] == self.content(sequence, position)

    def write(self, chunk: Chunk) -> None:
        for position in range(chunk.start, chunk.start + chunk.length):
            slot = self.slot(chunk.sequence, position)
            self.kv[slot] = self.content(chunk.sequence, position)
        self.device[chunk.sequence].position += chunk.length

    def sample(self, chunk: Chunk) -> int:
        sequence = chunk.sequence
        tokens = self.device[sequence].tokens
        tokens.append(hash((tuple(tokens), sequence.request.cache_salt)) % 3)
        self.row_token[sequence.row] = (sequence, len(tokens))
        return tokens[-1]

    def slot(self, sequence: Sequence, position: int) -> tuple[int, int]:
        size = self.scheduler.pool.page_size
        return sequence.pages[position // size], position % size

    def content(self, sequence: Sequence, position: int) -> object:
        tokens = self.device[sequence].tokens
        return sequence.request.cache_salt, tuple(tokens[: position + 1])

    def finetune(self, plan: StepPlan) -> None:
        if plan.parked:
            self.attempt = None
        if plan.microbatch is None:
            return
        if plan.microbatch_started:
            self.attempts += 1
            self.attempt = Attempt(self.attempts)
        attempt = self.attempt
        assert attempt, "a microbatch goes on that never started"
        size = self.scheduler.pool.page_size
        slots = [
            (pages[position // size], position % size)
            for pages, length in zip(plan.microbatch_pages, plan.microbatch.lengths, strict=True)
            for position in range(length)
        ]
        for index in range(attempt.forwarded):
            assert self.kv[slots[index]] == (attempt.serial, index)
        if plan.forward:
            assert plan.forward.start == attempt.forwarded and plan.forward.length > 0
            for index in range(plan.forward.start, plan.forward.start + plan.forward.length):
                self.kv[slots[index]] = (attempt.serial, index)
            attempt.forwarded += plan.forward.length
        if plan.units:
            assert attempt.forwarded == plan.microbatch.tokens
            assert plan.units.start == attempt.units and plan.units.step == 1
            attempt.units = plan.units.stop
        assert plan.microbatch_done == (attempt.units == self.total_units(plan.microbatch))
        if plan.microbatch_done:
            self.microbatches_done.append(plan.microbatch.microbatch_id)
            self.attempt = None

    def total_units(self, microbatch: Microbatch) -> int:
        config = self.scheduler.config
        windows = -(-microbatch.tokens // config.backward_window)
        return windows + (config.num_layers * windows if microbatch.backward else 0)

    # ---- what must hold ----

    def check_plan(self, plan: StepPlan) -> None:
        config = self.scheduler.config
        assert plan.num_tokens <= plan.token_bucket <= config.max_tokens_per_step
        assert plan.token_bucket in ((0,) if not plan.num_tokens else config.token_buckets)
        assert plan.num_tokens or plan.units, "an empty plan must be None"
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
            assert chunk.length > 0 and chunk.start + chunk.length <= known
        if not all(chunk.samples for chunk in plan.prefill):
            assert plan.microbatch is None, "finetuning went before a prefill"
        if plan.microbatch is None:
            assert plan.forward is None and not plan.units and not plan.microbatch_done
        features = plan.features
        assert features.decode_tokens == len(plan.decode)
        assert features.prefill_tokens == sum(chunk.length for chunk in plan.prefill)
        assert features.finetune_tokens == (plan.forward.length if plan.forward else 0)
        assert features.loss_units + features.layer_units == len(plan.units)
        self.check_segments(plan)

    def check_segments(self, plan: StepPlan) -> None:
        if plan.forward is None or plan.microbatch is None:
            return
        start, stop = plan.forward.start, plan.forward.start + plan.forward.length
        touched, position = 0, 0
        for length in plan.microbatch.lengths:
            touched += position < stop and start < position + length
            position += length
        assert touched <= self.scheduler.config.max_finetune_segments

    def check_state(self) -> None:
        """The books of the scheduler: pages, rows and queues."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        owners: Counter[int] = Counter()
        shared: dict[int, tuple] = {}
        for sequence in scheduler._running:
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
        for sequence in scheduler._waiting:
            assert sequence.status is Status.WAITING and sequence.row is None
            assert not sequence.pages and not sequence.computed
        progress = scheduler._finetuning._progress
        if progress:
            pages = [page for pages in progress.pages for page in pages]
            assert len(set(pages)) == len(pages) and not owners.keys() & set(pages)
            owners.update(pages)
        for page in range(pool.num_pages):
            assert pool.references(page) == owners[page], f"page {page} leaked or owned twice"
        assert pool.num_free == pool.num_pages - len(owners)
        rows = [sequence.row for sequence in scheduler._running] + scheduler._rows
        assert sorted(rows) == list(range(scheduler.config.max_sequences))
        unfinished = {*scheduler._running, *scheduler._waiting}
        assert unfinished == set(scheduler._sequences.values())


def request(request_id: str, prompt: int | tuple[int, ...], max_tokens: int = 4, **fields):
    """A request; an int prompt is that many distinct tokens."""
    if isinstance(prompt, int):
        prompt = tuple(range(100, 100 + prompt))
    fields = {"arrival": 0.0, **fields}
    return Request(request_id, prompt, max_tokens, **fields)
