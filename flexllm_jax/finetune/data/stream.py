"""Batches of a dataset in an order that depends on seed and epoch alone.

The order of epoch e is `numpy.random.default_rng([seed, e]).permutation`: the position
(epoch, index) is all there is to remember, so a resumed job sees exactly the batches it would have
seen. A batch never spans two epochs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flexllm_jax.finetune.data.items import Dataset, TrainingItem
from flexllm_jax.finetune.data.rows import DatasetError


class BatchStream:
    """An endless stream of batches, each one optimizer step's rows."""

    def __init__(self, dataset: Dataset, batch_tokens: int, seed: int, shuffle: bool = True):
        """`batch_tokens`: tokens of a batch at most, unless its only row has more."""
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        self._dataset, self._batch_tokens = dataset, batch_tokens
        self._seed, self._shuffle = seed, shuffle
        self._lengths = np.array([len(item) for item in dataset.items])
        self._epoch = self._index = 0
        self._order = self._order_of(0)

    @property
    def epoch(self) -> int:
        """Epochs completed; a job of n epochs is done when this is n."""
        return self._epoch

    @property
    def index(self) -> int:
        """Rows of the epoch under way that are in batches."""
        return self._index

    @property
    def batches_per_epoch(self) -> int:
        """Batches in the epoch under way; shuffling makes epochs differ a little."""
        return self._count(self._order)

    def batches_left(self, epochs: int) -> int:
        """Batches from here to the end of `epochs` epochs. DatasetError when that is passed."""
        if (self._epoch, self._index) > (epochs, 0):
            raise DatasetError(
                f"{self._dataset.path}: epochs={epochs}, but the checkpoint is in epoch "
                f"{self._epoch + 1} already; raise epochs, or start the job anew with resume: false"
            )
        if self._epoch == epochs:
            return 0
        later = (self._order_of(epoch) for epoch in range(self._epoch + 1, epochs))
        return self._count(self._order, self._index) + sum(map(self._count, later))

    def next_batch(self) -> list[TrainingItem]:
        """Rows in the epoch's order until the next would pass `batch_tokens`; at least one."""
        end = self._end(self._order, self._index)
        batch = [self._dataset.items[row] for row in self._order[self._index : end]]
        self._index = end
        if end == len(self._order):
            self._epoch, self._index = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        return batch

    def state(self) -> dict[str, int]:
        """The position, as plain numbers for a checkpoint."""
        return {
            "epoch": self._epoch,
            "index": self._index,
            "seed": self._seed,
            "fingerprint": self._dataset.fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go to a position from `state()`. DatasetError if the data is not what it was then."""
        if int(state["fingerprint"]) != self._dataset.fingerprint:
            raise DatasetError(
                f"{self._dataset.path}: its rows or the tokenizer changed since the checkpoint; "
                "restore them, or start the job anew with resume: false"
            )
        self._epoch, self._index = int(state["epoch"]), int(state["index"])
        self._seed = int(state["seed"])
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        rows = len(self._dataset)
        if not self._shuffle:
            return np.arange(rows)
        return np.random.default_rng([self._seed, epoch]).permutation(rows)

    def _end(self, order: np.ndarray, start: int) -> int:
        tokens, end = 0, start
        while end < len(order):
            tokens += int(self._lengths[order[end]])
            if tokens > self._batch_tokens and end > start:
                break
            end += 1
        return end

    def _count(self, order: np.ndarray, at: int = 0) -> int:
        """Batches from place `at` of an order to its end."""
        batches = 0
        while at < len(order):
            at, batches = self._end(order, at), batches + 1
        return batches
