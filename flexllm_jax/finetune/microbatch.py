"""What goes through the model together: sequences of one job, packed, and what their loss takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flexllm_jax.finetune.buffers import MicrobatchTable
from flexllm_jax.finetune.layout import Head, Part, head_of, lay_out
from flexllm_jax.finetune.losses import Loss, LossTokens
from flexllm_jax.peft.dropout import token_keys
from scheduler.request import Microbatch


@dataclass(frozen=True, eq=False)
class Datum:
    """A sequence and what its loss takes; all arrays [n].

    token: int32. label: int32, the token to be said after each, which need not be the next one of
    `token`; -1: none, and then there is no log-probability. weight, reference, advantage: float32
    (`losses.LossTokens`); of a sequence with a pair, the advantage is the same at all tokens.
    """

    token: np.ndarray
    label: np.ndarray
    weight: np.ndarray
    reference: np.ndarray
    advantage: np.ndarray

    def __len__(self) -> int:
        return len(self.token)

    def head(self, loss: Loss, page: int) -> Head | None:
        """What it may share with others of its microbatch (`layout.head_of`)."""
        return head_of(self.token, self.label, loss.silent(self), page)

    @classmethod
    def following(
        cls, token: np.ndarray, weight: np.ndarray, advantage: float = 0.0, reference: float = 0.0
    ) -> "Datum":
        """A sequence whose labels are its own next tokens where `weight` (of predicting each token
        from those before it) is not 0. `reference`: of all of it together."""
        label = np.full(len(token), -1, np.int32)
        own = np.zeros(len(token), np.float32)
        own[:-1] = weight[1:]
        label[:-1] = np.where(own[:-1] != 0, token[1:], -1)
        first = np.zeros(len(token), np.float32)
        if counted := np.flatnonzero(own).tolist():
            first[counted[0]] = reference / own[counted[0]]
        return cls(
            token.astype(np.int32), label, own, first, np.full(len(token), advantage, np.float32)
        )

    @classmethod
    def of_targets(cls, token: np.ndarray, target: np.ndarray, weight: np.ndarray) -> list["Datum"]:
        """Cross-entropy of several weighted targets after each token, [n, K] both: K sequences of
        one target each, as a loss is a sum over tokens and so over these. Their log-probabilities,
        side by side, are those of the targets.

        It takes K forwards and backwards. A loss unit for all K would read its table K times wide
        in every job, or be K programs.
        """
        nothing = np.zeros(len(token), np.float32)
        return [
            cls(
                token.astype(np.int32), own.astype(np.int32), w.astype(np.float32), nothing, nothing
            )
            for own, w in zip(target.T, weight.T, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class PackedMicrobatch:
    """Data of one job that go through the model together, each of a pair with the other.

    On the host, arrays of its tokens are those of its data, one after the other; on the device they
    are in rows, of which sequences that begin alike share some (`layout`).

    pairs: for each datum the number of the other of its pair; its own number if it has none.
    first_position: of every sequence (behind the tokens of a prefix). backward: False to score
    alone. names: for each datum, numbers from 0 that no other of the job has, however it is packed:
    what masks of dropout are drawn from; only jobs with dropout need them, and they share nothing.
    page: tokens of a page, which sequences that begin alike share; 0: they do not.
    """

    data: tuple[Datum, ...]
    loss: Loss
    pairs: tuple[int, ...] = ()
    first_position: int = 0
    backward: bool = True
    names: tuple[tuple[int, ...], ...] = ()
    page: int = 0

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each datum."""
        return tuple(map(len, self.data))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What its rows are."""
        return lay_out(self.lengths, [datum.head(self.loss, self.page) for datum in self.data])

    @property
    def tokens(self) -> int:
        """Rows: tokens that go through the model."""
        return sum(map(len, self.parts))

    @property
    def label(self) -> np.ndarray:
        """int32, of the data."""
        return self._joined("label")

    @property
    def reference(self) -> np.ndarray:
        """float32, of the data."""
        return self._joined("reference")

    @property
    def advantage(self) -> np.ndarray:
        """float32, of the data."""
        return self._joined("advantage")

    @cached_property
    def token(self) -> np.ndarray:
        """int32, of the rows."""
        return self._joined("token")[self._of_rows]

    @cached_property
    def position(self) -> np.ndarray:
        """int32, of the rows."""
        own = [np.arange(part.start, part.stop, dtype=np.int32) for part in self.parts]
        return np.concatenate(own) + np.int32(self.first_position)

    @cached_property
    def _of_rows(self) -> np.ndarray:
        """Of each row, its place in the arrays of the data."""
        starts = self._starts
        return np.concatenate(
            [starts[part.sequence] + np.arange(part.start, part.stop) for part in self.parts]
        )

    @cached_property
    def _own_parts(self) -> list[Part]:
        """Of each datum the part with its last tokens, which holds all that the loss takes."""
        last = {part.sequence: part for part in self.parts}
        return [last[number] for number in range(len(self.data))]

    @property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *self.lengths[:-1]], dtype=np.int32)

    @property
    def _pairs(self) -> list[int]:
        return list(self.pairs or range(len(self.data)))

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(datum, name) for datum in self.data])

    def table(self, slots: int, first_token_slot: int, kv_slot: np.ndarray) -> np.ndarray:
        """Its `MicrobatchTable`, packed, in the finetuning slots from `first_token_slot` on.
        kv_slot: int32 [rows]."""
        table, packed = MicrobatchTable.empty(slots)
        own = slice(first_token_slot, first_token_slot + self.tokens)
        rows, own_parts, pairs = self._of_rows, self._own_parts, self._pairs
        # Of each part: where it starts, its pair, and where what it shares starts and ends.
        of_parts = np.array(
            [
                (p.row, own_parts[pairs[p.sequence]].row, p.shared_row, p.shared_row + p.start)
                for p in self.parts
            ],
            np.int32,
        )
        of_rows = np.repeat(of_parts + first_token_slot, [len(p) for p in self.parts], axis=0)
        sequence_start, pair_start, shared_start, shared_end = of_rows.T
        values = MicrobatchTable(
            self.label[rows],
            self.position,
            kv_slot,
            sequence_start,
            pair_start,
            shared_start,
            shared_end,
            self._joined("weight")[rows],
            self._joined("reference")[rows],
            self._joined("advantage")[rows],
        )
        for row, value in zip(table, values, strict=True):
            row[own] = value
        return packed

    def dropout_keys(self, seed: int, slots: int, first_token_slot: int) -> np.ndarray:
        """`dropout.token_keys` in the finetuning slots, for a job of that seed; uint32 [slots]."""
        keys = np.zeros(slots, np.uint32)
        own = [
            token_keys((seed, *name), length)
            for name, length in zip(self.names, self.lengths, strict=True)
        ]
        keys[first_token_slot : first_token_slot + self.tokens] = np.concatenate(own)
        return keys

    def of_data(self, values: np.ndarray) -> np.ndarray:
        """Values of the rows as those of the data: each has what it shares."""
        rows = [
            np.arange(first, first + count)
            for p in self._own_parts
            for first, count in ((p.shared_row, p.start), (p.row, len(p)))
        ]
        return values[np.concatenate(rows)]

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """Values of the data by datum."""
        return np.split(values, self._starts[1:])

    def evaluate(self, logprob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss and coefficient of every token of the data from its log-probability, on the host."""
        logprob = np.asarray(logprob)
        weight, reference = self._joined("weight"), self._joined("reference")
        gap = np.where(weight == 0, 0, weight * (logprob - reference))
        own, pair = (np.repeat(self._starts[i], self.lengths) for i in (slice(None), self._pairs))
        gaps, lengths = (np.bincount(own, v, minlength=len(own)) for v in (gap, weight))
        first = np.arange(len(own)) == own
        return self.loss.evaluate(
            LossTokens(
                logprob,
                reference,
                self._joined("advantage"),
                weight,
                *(gaps[own], lengths[own], gaps[pair], lengths[pair]),
                first,
            )
        )

    def kv_slots(self, pages: Sequence[Sequence[int]], page_size: int) -> np.ndarray:
        """Where each row's key lies in the pages of its part: page * page_size + offset."""
        return np.concatenate(
            [
                np.asarray(own, np.int32)[np.arange(len(part)) // page_size] * page_size
                + np.arange(len(part), dtype=np.int32) % page_size
                for own, part in zip(pages, self.parts, strict=True)
            ]
        )

    def as_planned(
        self, microbatch_id: int, job: str, weights_version: int, *, dropout: bool = False
    ) -> Microbatch:
        """What the scheduler needs to know of it; `dropout`: whether its job trains with it."""
        return Microbatch(
            microbatch_id,
            tuple(map(len, self.parts)),
            self.backward,
            job,
            weights_version,
            self.loss.of_sequences and self.backward,
            dropout and self.backward,
            tuple(part.start for part in self.parts),
        )
