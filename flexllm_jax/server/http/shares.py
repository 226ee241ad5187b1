"""What there is a limited amount of, and who holds how much of it."""

from __future__ import annotations

import threading
from collections import Counter

from flexllm_jax.server.http.access import Client


def fair_room(free: int, held: int) -> int:
    """What one of several keys that holds `held` may take of `free`: what it has then is no more
    than what is left for others."""
    return max(0, min(free, (free - held) // 2))


class Shares:
    """`total` of something. Where there are several keys (`several`), one may hold as much as it
    leaves to the others: alone half of all, two of them a third each. A key's own limit counts
    instead where it has one. May be used from any thread."""

    def __init__(self, total: int, several: bool):
        self.total, self._several = total, several
        self._held: Counter[str | None] = Counter()
        self._lock = threading.Lock()

    def room(self, client: Client, own_limit: int | None = None) -> int:
        """How much a client may take now."""
        with self._lock:
            return self._room(client.owner, own_limit)

    def _room(self, owner: str | None, own_limit: int | None) -> int:
        free, held = self.total - self._held.total(), self._held[owner]
        if own_limit is not None:
            return max(0, min(free, own_limit - held))
        return fair_room(free, held) if self._several else max(0, free)

    def take(self, client: Client, amount: int, own_limit: int | None = None) -> bool:
        """Hold more, if there is room for it."""
        with self._lock:
            fits = amount <= self._room(client.owner, own_limit)
            if fits:
                self._held[client.owner] += amount
            return fits

    def give_back(self, client: Client, amount: int) -> None:
        """Hold less."""
        self.add(client.owner, -amount)

    def add(self, owner: str | None, amount: int) -> None:
        """What is there whether or not there is room for it; less, when negative."""
        with self._lock:
            self._held[owner] += amount
            self._held += Counter()  # forget those at 0
