"""The inference side of a step: the requests waiting and running, their rows and KV pages.

Decode tokens first, then prefill chunks, the most urgent request first. When pages run out, cached
prefixes go first, then finetuning's pages, then those of the least urgent request, which is
computed again later. Invariants: the chunks of a sequence cover its positions in order; the most
urgent sequence always gets what it needs, so all finish.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from dataclasses import replace
from typing import Protocol

from scheduler.cache.pages import PagePool
from scheduler.config import SchedulerConfig
from scheduler.drafts import PromptLookup
from scheduler.jobs import JobTable
from scheduler.request import Chunk, Decode, Request, Sequence, Status

# Snapshots of decoding sequences in one step: those that began together come to them together, and
# a copy takes time for something that is seldom read.
_MOST_KEPT_OF_DECODE = 8


class Room(Protocol):
    """Pages that others hold and would give up."""

    @property
    def pages_held(self) -> int:
        """How many."""
        ...

    def park(self) -> object:
        """Free some of them."""
        ...


def _priority(sequence: Sequence) -> tuple[float, int]:
    return sequence.priority


class InferenceQueue:
    """Requests by their state; `preempted` are those that lost their pages in this plan, and
    `state_copies` what it copies. `jobs` know which of their requests run, and what those were
    given."""

    def __init__(
        self, config: SchedulerConfig, pool: PagePool, others: Room, jobs: JobTable
    ) -> None:
        self.config, self.pool = config, pool
        self.sequences: dict[str, Sequence] = {}  # unfinished, by request id
        self.waiting: list[Sequence] = []  # most urgent first, like running
        self.running: list[Sequence] = []
        self.rows = list(range(config.max_sequences))  # free rows, a heap
        self.preempted: list[str] = []
        self.state_copies: list[tuple[int, int]] = []
        self.drafting: set[Sequence] = set()  # of running: those that may have drafts
        self._others, self._jobs = others, jobs
        self._reads = config.reads
        self._blocked: tuple[Sequence, int] | None = None  # not admitted with this much room
        self._arrivals = itertools.count()

    def add(self, request: Request) -> None:
        """Queue a request; its id must be new."""
        if request.request_id in self.sequences:
            raise ValueError(f"request {request.request_id!r} is already scheduled: use a new id")
        slo = request.slo or self.config.slo
        sequence = Sequence(
            request=request,
            slo=slo,
            priority=(request.arrival + slo.patience_s, next(self._arrivals)),
            tokens=list(request.prompt),
            end=len(request.prompt) + request.max_tokens - 1,
            due=request.arrival + slo.ttft_s,
            tpot_s=slo.tpot_s,
            has_adapter=request.cache_salt is not None,
            sampling=request.sampling,
            logprobs=request.logprobs,
            lookup=PromptLookup(request.drafts) if request.drafts else None,
        )
        self.sequences[request.request_id] = sequence
        bisect.insort(self.waiting, sequence, key=_priority)

    def plan_decode(self) -> Decode:
        """Dispatch a token of every sequence whose prefill is dispatched, most urgent first."""
        # The only loop of a plan over all running sequences: it is what the plan's time goes to.
        sequences: list[Sequence] = []
        positions: list[int] = []
        earliest, least_s, adapters = math.inf, math.inf, False
        sampling, logprobs = 0, False
        page_size, snapshots = self.pool.page_size, self.pool.snapshots
        for sequence in tuple(self.running):
            position = sequence.computed
            if not sequence.prefill_end <= position < sequence.end:
                continue  # in its prefill, or preempted for a more urgent one just now; or drained
            full = not position % page_size and position >= len(sequence.pages) * page_size
            if full:
                if not self._grow(sequence, sequences):
                    continue
                if (
                    snapshots is not None
                    and not position % snapshots.every
                    and len(self.state_copies) < _MOST_KEPT_OF_DECODE
                ):
                    self._save_state(sequence, passing=True)
            sequences.append(sequence)
            positions.append(position)
            sequence.computed = position + 1
            sequence.in_flight += 1
            due, tpot_s = sequence.due, sequence.tpot_s
            if due < earliest:
                earliest = due
            if tpot_s < least_s:
                least_s = tpot_s
            sequence.due = due + tpot_s
            if sequence.has_adapter:
                adapters = True
            if sequence.sampling > sampling:
                sampling = sequence.sampling
            if sequence.logprobs:
                logprobs = True
        keys = self._reads.of_decode(positions)
        return Decode(sequences, positions, keys, earliest, least_s, adapters, sampling, logprobs)

    def propose_drafts(self, decode: Decode) -> dict[Sequence, list[int]]:
        """Drafts for sequences that a step decodes and whose tokens are all known, the most urgent
        first: no more than there are rows without a request, and pages without anyone giving one
        up."""
        spare = (
            self.config.max_sequences - len(self.running) - min(len(self.waiting), len(self.rows))
        )
        drafts: dict[Sequence, list[int]] = {}
        if not self.drafting or spare < 1:
            return drafts
        page_size = self.pool.page_size
        pages = self.pool.num_free - len(self.running)
        for sequence in decode.sequences:
            lookup, at = sequence.lookup, sequence.computed
            if lookup is None or len(sequence.tokens) != at or spare < 1:
                continue
            most = min(spare, sequence.end - at, (len(sequence.pages) + pages) * page_size - at)
            if draft := lookup.next_draft(sequence.tokens, most):
                drafts[sequence] = draft
                spare -= len(draft)
                pages -= max(0, self.pool.pages_for(at + len(draft)) - len(sequence.pages))
        return drafts

    def dispatch_drafts(
        self, decode: Decode, drafts: dict[Sequence, list[int]]
    ) -> tuple[Decode, list[Chunk]]:
        """The sequences with drafts no longer as decode tokens, but as chunks."""
        chunks: list[Chunk] = []
        for sequence, draft in drafts.items():
            at = sequence.computed
            missing = self.pool.pages_for(at + len(draft)) - len(sequence.pages)
            if missing > 0:
                sequence.pages += self.pool.allocate(missing) or []
            sequence.computed, sequence.drafted = at + len(draft), len(draft)
            chunks.append(Chunk(sequence, at - 1, 1 + len(draft), True, tuple(draft)))
        left = [
            (s, p)
            for s, p in zip(decode.sequences, decode.positions, strict=True)
            if s not in drafts
        ]
        sequences, positions = [s for s, _ in left], [p for _, p in left]
        keys = sum(positions) + len(positions)
        return replace(decode, sequences=sequences, positions=positions, keys=keys), chunks

    def plan_prefill(self, room: int) -> tuple[list[Chunk], bool]:
        """Up to `room` prompt tokens, most urgent first, and whether some found no room."""
        chunks: list[Chunk] = []
        prefilling = [s for s in self.running if s.computed < s.prefill_end]
        for sequence in prefilling:
            if room:
                room -= self._append_prefill(chunks, sequence, room)
        while room and self.waiting and self.rows:
            sequence = self.waiting[0]
            # A preempted sequence is computed again from its tokens: it must know them all.
            if sequence.in_flight or not self._admit(sequence):
                break
            prefilling.append(sequence)
            room -= self._append_prefill(chunks, sequence, room)
        unfinished = len(prefilling) > sum(chunk.samples for chunk in chunks)
        # With room left, a chunk has ended for a snapshot.
        return chunks, not room and (unfinished or bool(self.waiting and self.rows))

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence and free what it holds."""
        if sequence.status is Status.RUNNING:
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish_reason = reason
        del self.sequences[sequence.request_id]

    def publish(self, sequence: Sequence) -> None:
        """Let others share the pages that are full."""
        full = min(sequence.computed, len(sequence.tokens)) // self.pool.page_size
        if full and sequence.pages and self.pool.prefix_caching:
            tokens, salt = sequence.tokens, sequence.request.cache_salt
            self.pool.publish(tokens, salt, sequence.pages, full)

    # ---- many steps at once, for the simulator ----

    def repeats(self, decode: Decode) -> int:
        """How many more steps can decode just these sequences, none of them moved; the last of the
        steps may end some.

        0 with a request that waits or is in its prefill.
        """
        sequences = decode.sequences
        if self.waiting or len(sequences) != len(self.running):
            return 0
        count = min((s.end - s.computed for s in sequences), default=1 << 30)
        if count <= 0 or any(s.status is not Status.RUNNING for s in sequences):
            return 0
        pages = len(sequences) * (1 + count // self.pool.page_size)
        return count if pages <= self.pool.num_free else 0

    def repeat(self, decode: Decode, count: int, now: float) -> list[Sequence]:
        """Decode `count` more tokens of each of these sequences, the last ones read at `now`;
        returns those that end."""
        page_size, tokens = self.pool.page_size, [0] * count
        for sequence in decode.sequences:
            sequence.computed += count
            sequence.tokens += tokens
            sequence.output += tokens
            sequence.last_token_at = now
            sequence.due += count * sequence.tpot_s
            if sequence.request.job is not None:
                self._jobs.charge(sequence.request.job, count)
            missing = -(-sequence.computed // page_size) - len(sequence.pages)
            if missing > 0:
                sequence.pages += self.pool.allocate(missing) or []
        finished = [sequence for sequence in decode.sequences if sequence.computed == sequence.end]
        for sequence in finished:
            self.finish(sequence, "length")
        return finished

    def _append_prefill(self, chunks: list[Chunk], sequence: Sequence, room: int) -> int:
        """Append the next chunk of a prefill, of at most `room` tokens; returns its length."""
        start, stops = sequence.computed, sequence.stops
        end = min(sequence.prefill_end, start + room)
        if stops and stops[0] == start:
            del stops[0]
            passing = bool(stops) and not start % self.config.snapshot_every
            self._save_state(sequence, passing)
        if stops:
            end = min(end, stops[0])
        chunks.append(Chunk(sequence, start, end - start, samples=end == sequence.prefill_end))
        return end - start

    # ---- recurrent state ----

    def _plan_states(self, sequence: Sequence, parting: int, row: int) -> None:
        """Let a sequence begin from the snapshot at the end of what it shares, and find where to
        take others."""
        snapshots, start = self.pool.snapshots, sequence.computed
        assert snapshots is not None
        if start:
            page = sequence.pages[start // self.pool.page_size - 1]
            self.state_copies.append((snapshots.read(page), row))
        sequence.stops = []
        if sequence.request.reusable:
            sequence.stops = snapshots.stops(start, parting, sequence.prefill_end)

    def _save_state(self, sequence: Sequence, passing: bool) -> None:
        """Keep the state of all that is computed of a sequence, which ends with a page."""
        pool, computed = self.pool, sequence.computed
        snapshots, row = pool.snapshots, sequence.row
        assert snapshots is not None and row is not None
        if len(sequence.tokens) < computed or not sequence.request.reusable:
            return  # a page has no key before all its tokens are known
        self.publish(sequence)
        tokens, salt = sequence.tokens, sequence.request.cache_salt
        page = pool.cached_page(tokens, salt, sequence.pages, computed // pool.page_size - 1)
        if page is not None and (slot := snapshots.save(page, passing)) is not None:
            self.state_copies.append((row, slot))

    # ---- pages and rows ----

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence a row and the pages of all its tokens, or nothing.

        A page for each running sequence stays free: admitting must not preempt right away.
        Others give their pages up when that is enough to admit.
        """
        pool, others = self.pool, self._others
        # Looking a long prompt up costs time: only once more pages are free than when it failed.
        room = pool.num_free + others.pages_held - len(self.running)
        if self._blocked and self._blocked[0] is sequence and room <= self._blocked[1]:
            return False
        shared, parting = pool.find_prefix(sequence.tokens, sequence.request.cache_salt), 0
        if pool.snapshots is not None:
            parting = pool.parting(shared)
            shared = shared[: pool.snapshots.covered(shared)]
        needed = pool.pages_for(len(sequence.tokens)) - len(shared)
        wanted = needed + len(self.running)
        if wanted > pool.num_free_beside(shared) + others.pages_held:
            self._blocked = (sequence, room)
            return False
        while wanted > pool.num_free_beside(shared):
            others.park()
        self._blocked = None
        pool.share(shared, queried=(len(sequence.tokens) - 1) // pool.page_size)
        sequence.pages = shared + (pool.allocate(needed) or [])
        sequence.computed = sequence.cached_tokens = len(shared) * pool.page_size
        sequence.prefill_end = len(sequence.tokens)
        sequence.row = heapq.heappop(self.rows)
        if pool.snapshots is not None:
            self._plan_states(sequence, parting, sequence.row)
        sequence.status = Status.RUNNING
        self._jobs.request_runs(sequence.request.job)
        if sequence.lookup is not None:
            self.drafting.add(sequence)
        self.waiting.remove(sequence)
        bisect.insort(self.running, sequence, key=_priority)
        return True

    def _grow(self, sequence: Sequence, planned: list[Sequence]) -> bool:
        """Add a page for the next token; False if the sequence itself had to be preempted.

        Without a free page others are parked, then the least urgent sequence not in this plan is
        preempted; one that only waits for its last tokens to come back goes first.
        """
        while not (page := self.pool.allocate(1)):
            if self._others.pages_held:
                self._others.park()
                continue
            taken = set(planned)
            victim = max(
                (other for other in self.running if other not in taken),
                key=lambda other: (other.computed == other.end, other.priority),
            )
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += page
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the waiting queue; the prefill to come covers the output too."""
        self._release(sequence)
        sequence.status = Status.WAITING
        sequence.computed = 0
        sequence.preemptions += 1
        bisect.insort(self.waiting, sequence, key=_priority)
        self.preempted.append(sequence.request_id)

    def _release(self, sequence: Sequence) -> None:
        """Give back row and pages; what is computed and known stays cached."""
        self.publish(sequence)
        self.pool.release(sequence.pages)
        sequence.pages = []
        if sequence.row is not None:
            heapq.heappush(self.rows, sequence.row)
        sequence.row = None
        self.running.remove(sequence)
        self.drafting.discard(sequence)
        self._jobs.request_rests(sequence.request.job)
