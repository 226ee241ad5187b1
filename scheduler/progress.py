"""How far a microbatch in work is, and what its next tokens and units cost.

Forward tokens go in order; then units, each of one slice of `unit_tokens` tokens: the scores and
the loss of every slice (head units, which are priced alike), then the layers from the last to the
first, and in each its slices from the last to the first (FlexLLM's token-level finetuning, section
5 of the paper). A unit of a late slice costs more than
one of an early slice: its queries see more keys. Invariant: every token and unit is dispatched
exactly once, in order.
"""

from __future__ import annotations

import bisect
import itertools

from scheduler.config import SchedulerConfig
from scheduler.latency.model import LatencyModel, StepFeatures
from scheduler.request import Microbatch


class Progress:
    """A microbatch in work, or about to be: `forwarded` of its tokens and `units_done` of its units
    are dispatched. `pages` are those of each packed sequence; `first_token_slot` is the
    first of the finetuning slots it holds.

    The cost of units is in seconds before `LatencyModel.unit_correction`.
    """

    def __init__(
        self, microbatch: Microbatch, config: SchedulerConfig, latency: LatencyModel
    ) -> None:
        self.microbatch = microbatch
        self.pages: tuple[tuple[int, ...], ...] = ()
        self.first_token_slot = 0
        self.forwarded = 0
        self.units_done = 0
        self.tokens = microbatch.tokens
        self.unit_tokens = config.unit_tokens
        self.slices = -(-self.tokens // self.unit_tokens)
        layers = config.num_layers if microbatch.backward else 0
        self.head_units = self.slices * (microbatch.scored + microbatch.backward)
        self.total_units = self.head_units + self.slices * layers
        self._segments, self._reads = config.max_finetune_segments, config.reads
        self._ends = list(itertools.accumulate(microbatch.lengths))
        # Where each sequence would begin if the tokens before it lay there, too.
        self._begins = [end - keys for end, keys in zip(self._ends, microbatch.keys, strict=True)]
        # (query, key) pairs of the first i units of a layer: slices come from the last one on.
        starts = range((self.slices - 1) * self.unit_tokens, -1, -self.unit_tokens)
        pairs = [self._extent(s, min(s + self.unit_tokens, self.tokens))[0] for s in starts]
        self._sweep_pairs = [0, *itertools.accumulate(pairs)]
        by = latency.coefficients
        unit_s = by["layer_units"] + by["dropout_units"] * microbatch.dropout
        self._loss_s = by["loss_units"]
        self._sweep_s = [
            i * unit_s + n * by["backward_pairs"] for i, n in enumerate(self._sweep_pairs)
        ]

        self._total_s = self.cost(self.total_units)

    @property
    def slots_held(self) -> int:
        """Finetuning slots it holds: whole slices."""
        return self.slices * self.unit_tokens

    @property
    def forward_done(self) -> bool:
        """Whether all tokens are dispatched."""
        return self.forwarded == self.tokens

    @property
    def done(self) -> bool:
        """Whether all units are dispatched."""
        return self.units_done == self.total_units

    def left_after(self, tokens: int) -> int:
        """Tokens left when `tokens` more are dispatched."""
        return self.tokens - self.forwarded - tokens

    def next_forward(self, room: int) -> int:
        """Tokens of the next forward: at most `room`, touching at most so many sequences as a step
        may."""
        if self.forward_done or room <= 0:
            return 0
        last = bisect.bisect_right(self._ends, self.forwarded) + self._segments - 1
        return min(room, self._ends[min(last, len(self._ends) - 1)] - self.forwarded)

    def with_forward(self, features: StepFeatures, length: int, bucket: int) -> StepFeatures:
        """The features of a step that also holds the next `length` tokens."""
        pairs, keys = self._extent(self.forwarded, self.forwarded + length)
        decode, prefill, _, decode_kv, chunk_kv, other_pairs = features[1:7]
        # Most of a plan's features are made here: `_replace` would take three times as long.
        return StepFeatures(
            *(bucket, decode, prefill, length, decode_kv, chunk_kv + keys, other_pairs + pairs),
            *features[7:10],
            True,  # adapters
            *features[11:14],
            self.microbatch.dropout,
            features.dropout_units,
        )

    def with_units(self, features: StepFeatures, count: int) -> StepFeatures:
        """The features of a step that also holds the next `count` units."""
        first, last = self.units_done, self.units_done + count
        loss = max(0, min(last, self.head_units) - first)
        return features._replace(
            loss_units=loss,
            layer_units=count - loss,
            dropout_units=(count - loss) * self.microbatch.dropout,
            backward_pairs=self._pairs(last) - self._pairs(first),
        )

    def affordable(self, seconds: float) -> int:
        """How many of the next units cost no more than `seconds` together."""
        first, last, slices = self.units_done, self.total_units, self.slices
        head = self.head_units
        target = self.cost(first) + seconds * (1 + 1e-12)
        if seconds <= 0:
            return 0
        if target >= self._total_s:
            return last - first
        target -= head * self._loss_s
        if target < 0:
            return int(target / self._loss_s + head) - first
        sweeps, rest = divmod(target, self._sweep_s[-1])
        within = bisect.bisect_right(self._sweep_s, rest) - 1
        return max(0, head + slices * int(sweeps) + within - first)

    def cost(self, unit: int) -> float:
        """Seconds of the first `unit` units."""
        if unit <= self.head_units:
            return unit * self._loss_s
        sweeps, rest = divmod(unit - self.head_units, self.slices)
        return self.head_units * self._loss_s + sweeps * self._sweep_s[-1] + self._sweep_s[rest]

    def _pairs(self, unit: int) -> float:
        """(Query, key) pairs of the first `unit` units."""
        if unit <= self.head_units:
            return 0
        sweeps, rest = divmod(unit - self.head_units, self.slices)
        return sweeps * self._sweep_pairs[-1] + self._sweep_pairs[rest]

    def _extent(self, start: int, stop: int) -> tuple[float, float]:
        """Sum of query length x key length, and of key lengths, over the sequences in tokens
        [start, stop)."""
        pairs = keys = 0.0
        segment = bisect.bisect_right(self._ends, start)
        if stop <= self._ends[segment]:  # within one sequence
            last = stop - self._begins[segment]
            return self._reads.pairs(stop - start, last), self._reads(last, stop - start)
        while start < stop:
            begin, end = self._begins[segment], min(self._ends[segment], stop)
            pairs += self._reads.pairs(end - start, end - begin)
            keys += self._reads(end - begin, end - start)
            start, segment = end, segment + 1
        return pairs, keys
