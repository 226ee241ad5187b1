"""The finetuning side of a step: a queue of microbatches, of which the head is in work.

A microbatch goes forward through its tokens in order, then backward through its units in order
(FlexLLM's token-level finetuning, section 5 of the paper). It holds KV pages for all its sequences
from its first forward to its last unit. Parking it gives them up and forgets all progress: its keys
and values are what later tokens and the backward read. Invariant: every token and unit is
dispatched exactly once, in order, counted from the last start.
"""

from __future__ import annotations

import bisect
import itertools
from collections import deque
from dataclasses import dataclass, replace

from scheduler.config import SchedulerConfig
from scheduler.latency import LatencyModel, StepFeatures
from scheduler.pages import PagePool
from scheduler.request import FinetuneForward, Microbatch


@dataclass
class Progress:
    """A microbatch in work: `forwarded` of its tokens and `units_done` of its units dispatched."""

    microbatch: Microbatch
    windows: int
    total_units: int
    pages: tuple[tuple[int, ...], ...] = ()
    forwarded: int = 0
    units_done: int = 0

    def __post_init__(self) -> None:
        self.ends = list(itertools.accumulate(self.microbatch.lengths))

    @property
    def forward_done(self) -> bool:
        """Whether all tokens are dispatched."""
        return self.forwarded == self.ends[-1]

    def next_forward(self, room: int, max_segments: int) -> int:
        """Tokens of the next forward: at most `room`, touching at most `max_segments` sequences."""
        if self.forward_done:
            return 0
        last = bisect.bisect_right(self.ends, self.forwarded) + max_segments - 1
        return min(room, self.ends[min(last, len(self.ends) - 1)] - self.forwarded)

    def attention_pairs(self, length: int) -> int:
        """Sum of query length x key length over the sequences in the next `length` tokens."""
        pairs, position, stop = 0, self.forwarded, self.forwarded + length
        segment = bisect.bisect_right(self.ends, position)
        while position < stop:
            start = self.ends[segment] - self.microbatch.lengths[segment]
            end = min(self.ends[segment], stop)
            pairs += (end - position) * (end - start)
            position, segment = end, segment + 1
        return pairs


@dataclass(frozen=True)
class FinetuneWork:
    """The finetuning part of a step plan; its fields are those of `StepPlan`."""

    microbatch: Microbatch
    pages: tuple[tuple[int, ...], ...]
    started: bool
    forward: FinetuneForward | None
    units: range
    done: bool
    features: StepFeatures


class FinetuneQueue:
    """Microbatches in the order they were added, and the progress of the head."""

    def __init__(self, config: SchedulerConfig, pool: PagePool, latency: LatencyModel) -> None:
        self.config = config
        self.pool = pool
        self.latency = latency
        self._queue: deque[Microbatch] = deque()
        self._progress: Progress | None = None  # of the head, while it holds pages
        self._parked_before = False  # the head was parked at least once

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def pages_held(self) -> int:
        """Pages that parking would give back."""
        return sum(map(len, self._progress.pages)) if self._progress else 0

    def add(self, microbatch: Microbatch) -> None:
        """Queue a microbatch that fits the pool when it is alone; its id must be new."""
        if any(microbatch.microbatch_id == queued.microbatch_id for queued in self._queue):
            raise ValueError(
                f"microbatch {microbatch.microbatch_id} is already queued: use a new id"
            )
        self._queue.append(microbatch)

    def cancel(self, microbatch_id: int | None) -> bool:
        """Drop a microbatch (None: the head) and its pages; False if it is not queued."""
        for index, microbatch in enumerate(self._queue):
            if microbatch_id in (None, microbatch.microbatch_id):
                if index == 0:
                    self._close()
                else:
                    del self._queue[index]
                return True
        return False

    def park(self) -> None:
        """Give up the pages and the progress of the microbatch in work; it stays the head."""
        if self._progress:
            self._release()
            self._parked_before = True

    def plan(
        self, features: StepFeatures, budget_s: float, least: bool, headroom: int
    ) -> FinetuneWork | None:
        """Finetuning to add to a step of `features` within `budget_s`, or None.

        Slots the step's bucket would leave empty are always taken. `least` grants one smallest
        bucket or one unit even over budget. A microbatch starts only if `headroom` pages stay
        free. The work returned counts as dispatched.
        """
        if not self._queue:
            return None
        progress = self._progress or self._new_progress()
        start, length = progress.forwarded, 0
        if not progress.forward_done:
            length, features = self._size_forward(progress, features, budget_s, least)
        started = self._progress is None
        if started and not (length and self._start(progress, headroom)):
            return None
        progress.forwarded += length
        first = progress.units_done
        if progress.forward_done:
            units, features = self._count_units(progress, features, budget_s, least and not length)
            progress.units_done += units
        if not length and progress.units_done == first:
            return None
        work = FinetuneWork(
            microbatch=progress.microbatch,
            pages=progress.pages,
            started=started,
            forward=FinetuneForward(start, length) if length else None,
            units=range(first, progress.units_done),
            done=progress.units_done == progress.total_units,
            features=features,
        )
        if work.done:
            self._close()
        return work

    def _new_progress(self) -> Progress:
        microbatch = self._queue[0]
        windows = -(-microbatch.tokens // self.config.backward_window)
        layers = self.config.num_layers if microbatch.backward else 0
        return Progress(microbatch, windows, windows * (1 + layers))

    def _size_forward(
        self, progress: Progress, features: StepFeatures, budget_s: float, least: bool
    ) -> tuple[int, StepFeatures]:
        """The largest forward whose bucket is free anyway or whose step fits the budget."""
        buckets = self.config.token_buckets
        used = features.decode_tokens + features.prefill_tokens
        free = features.token_bucket or (buckets[0] if least else 0)
        for bucket in reversed(buckets):
            if bucket <= used:
                break
            length = progress.next_forward(bucket - used, self.config.max_finetune_segments)
            with_forward = replace(
                features,
                token_bucket=buckets[bisect.bisect_left(buckets, used + length)],
                finetune_tokens=length,
                attention_pairs=features.attention_pairs + progress.attention_pairs(length),
                adapters=True,
            )
            if with_forward.token_bucket <= free or self.latency.predict(with_forward) <= budget_s:
                return length, with_forward
        return 0, features

    def _count_units(
        self, progress: Progress, features: StepFeatures, budget_s: float, least: bool
    ) -> tuple[int, StepFeatures]:
        """As many of the next units as fit the budget; predictions grow with their number."""

        def with_units(count: int) -> StepFeatures:
            loss = max(0, min(count, progress.windows - progress.units_done))
            return replace(features, loss_units=loss, layer_units=count - loss)

        left = range(1, progress.total_units - progress.units_done + 1)
        count = bisect.bisect_right(
            left, budget_s, key=lambda count: self.latency.predict(with_units(count))
        )
        count = max(count, int(least))
        return count, with_units(count)

    def _start(self, progress: Progress, headroom: int) -> bool:
        """Allocate the head's pages if `headroom` more stay free.

        After a park, inference must moreover leave half of what the microbatch does not need:
        the same burst would otherwise park it again and again.
        """
        lengths = progress.microbatch.lengths
        needed = sum(map(self.pool.pages_for, lengths))
        if self._parked_before and headroom:
            headroom = max(headroom, (self.pool.num_pages - needed) // 2)
        if self.pool.num_free < needed + headroom:
            return False
        pages = iter(self.pool.allocate(needed) or ())
        progress.pages = tuple(
            tuple(itertools.islice(pages, self.pool.pages_for(length))) for length in lengths
        )
        self._progress = progress
        return True

    def _close(self) -> None:
        """Remove the head, done or cancelled."""
        self._release()
        self._queue.popleft()
        self._parked_before = False

    def _release(self) -> None:
        if self._progress:
            self.pool.release([page for pages in self._progress.pages for page in pages])
            self._progress = None
