"""What goes through the model together: sequences of one job, packed, and what their loss takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flexllm_jax.finetune.buffers import MicrobatchTable
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

    pairs: for each datum the number of the other of its pair; its own number if it has none.
    first_position: of every sequence (behind the tokens of a prefix). backward: False to score
    alone. names: for each datum, numbers from 0 that no other of the job has, however it is packed:
    what masks of dropout are drawn from; only jobs with dropout need them.
    """

    data: tuple[Datum, ...]
    loss: Loss
    pairs: tuple[int, ...] = ()
    first_position: int = 0
    backward: bool = True
    names: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(map(len, self.data))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    @cached_property
    def token(self) -> np.ndarray:
        """int32 [tokens]."""
        return self._joined("token")

    @cached_property
    def label(self) -> np.ndarray:
        """int32 [tokens]."""
        return self._joined("label")

    @property
    def reference(self) -> np.ndarray:
        """float32 [tokens]."""
        return self._joined("reference")

    @property
    def advantage(self) -> np.ndarray:
        """float32 [tokens]."""
        return self._joined("advantage")

    @cached_property
    def position(self) -> np.ndarray:
        """int32 [tokens]."""
        own = [np.arange(n, dtype=np.int32) for n in self.lengths]
        return np.concatenate(own) + np.int32(self.first_position)

    @cached_property
    def sequence_start(self) -> np.ndarray:
        """int32 [tokens]: where each token's sequence begins."""
        return np.repeat(self._starts, self.lengths)

    @property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *self.lengths[:-1]], dtype=np.int32)

    @property
    def _pair_start(self) -> np.ndarray:
        pairs = self.pairs or tuple(range(len(self.data)))
        return np.repeat(self._starts[list(pairs)], self.lengths)

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([getattr(datum, name) for datum in self.data])

    def table(self, slots: int, first_token_slot: int, kv_slot: np.ndarray) -> np.ndarray:
        """Its `MicrobatchTable`, packed, in the finetuning slots from `first_token_slot` on.
        kv_slot: int32 [tokens]."""
        table, packed = MicrobatchTable.empty(slots)
        own = slice(first_token_slot, first_token_slot + self.tokens)
        values = MicrobatchTable(
            self.label,
            self.position,
            kv_slot,
            first_token_slot + self.sequence_start,
            first_token_slot + self._pair_start,
            self._joined("weight"),
            self._joined("reference"),
            self._joined("advantage"),
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

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """Values [tokens] by sequence."""
        return np.split(values, self._starts[1:])

    def evaluate(self, logprob: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Loss and coefficient of every token from its log-probability [tokens], on the host."""
        logprob = np.asarray(logprob)
        weight, reference = self._joined("weight"), self._joined("reference")
        gap = np.where(weight == 0, 0, weight * (logprob - reference))
        own, pair = self.sequence_start, self._pair_start
        gaps, lengths = (np.bincount(own, v, minlength=self.tokens) for v in (gap, weight))
        first = np.arange(self.tokens) == own
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
        """Where each token's key lies in the pages of its sequence: page * page_size + offset."""
        return np.concatenate(
            [
                np.asarray(own, np.int32)[np.arange(length) // page_size] * page_size
                + np.arange(length, dtype=np.int32) % page_size
                for own, length in zip(pages, self.lengths, strict=True)
            ]
        )

    def as_planned(
        self, microbatch_id: int, job: str, weights_version: int, *, dropout: bool = False
    ) -> Microbatch:
        """What the scheduler needs to know of it; `dropout`: whether its job trains with it."""
        return Microbatch(
            microbatch_id,
            self.lengths,
            self.backward,
            job,
            weights_version,
            self.loss.of_sequences and self.backward,
            dropout and self.backward,
        )
