"""How many keys attention reads where layers have windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class KeyReads:
    """Counts keys in the mean over layers, weighted by the bytes of their keys, so that a cost for
    each key of all layers stays what it is.

    windows: (share of the bytes, window) of the layers that have one; none elsewhere.
    """

    windows: tuple[tuple[float, int], ...] = ()

    def __call__(self, keys: float, queries: int = 1) -> float:
        """Keys that `queries` in a row read together, of which the last one has `keys`."""
        if not self.windows:
            return keys
        beyond = (share * max(0, keys - (window + queries - 1)) for share, window in self.windows)
        return keys - sum(beyond)

    def of_decode(self, positions: Sequence[int], ahead: float = 1) -> float:
        """Of single queries at so many tokens behind these positions."""
        if not self.windows:
            return sum(positions) + ahead * len(positions)
        return sum(self(position + ahead) for position in positions)

    def pairs(self, queries: int, keys: int) -> float:
        """(Query, key) pairs: of each query as many as of the last one."""
        return queries * self(keys)
