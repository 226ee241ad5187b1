"""Snapshots of recurrent state: where a cached prefix can be gone on from.

Layers with a recurrence keep no keys but one state a sequence, which every token overwrites. So a
prefix can be shared only up to a position whose state was copied to a slot of its own before the
next token came. Such a snapshot belongs to the cached page that ends there, found by the same key,
and goes when that page goes.

Slots are few: a snapshot is as large as the keys of a thousand tokens or more. They are taken at
multiples of `every`, at the end of prompts, and where a prompt parts from others. Those at
multiples are made on the way, and until one is read it makes room first, and takes no other's: a
long prompt cannot drive out the ends of all others. Among the rest the least recently used goes.
The device copies in the order of the plans, so a slot may be given away as soon as a copy from it
is planned.
"""

from __future__ import annotations

from collections.abc import Sequence


class Snapshots:
    """Which of the device's state `slots` holds the state at the end of which cached page.

    `hits`, `saved` and `evicted` count snapshots: sequences that began from one, those made, and
    those that went, with their pages or because their slots were needed.
    """

    def __init__(self, slots: range, every: int, page_size: int) -> None:
        self.slots, self.every = slots, every
        self.least = every // 16  # tokens from one to the next: fewer are soon computed again
        self.hits = self.saved = self.evicted = 0
        self._page_size = page_size
        self._free = list(reversed(slots))
        # Slots by page, least recently used first: those to be given away first, and the others.
        self._passing: dict[int, int] = {}
        self._kept: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Slots in use."""
        return len(self._passing) + len(self._kept)

    def covered(self, pages: Sequence[int]) -> int:
        """How many of a prefix's cached pages can be used: up to the last one with a snapshot."""
        count = len(pages)
        while count and not self._has(pages[count - 1]):
            count -= 1
        return count

    def _has(self, page: int) -> bool:
        return page in self._kept or page in self._passing

    def read(self, page: int) -> int:
        """The slot of a page's snapshot, which is to be copied from."""
        slot = self._passing.pop(page, None)
        if slot is None:
            slot = self._kept.pop(page)
        self._kept[page] = slot
        self.hits += 1
        return slot

    def save(self, page: int, passing: bool) -> int | None:
        """A slot to copy the state at the end of a cached page to; None if it has one, or there is
        none for it. passing: made on the way."""
        if self._has(page):
            return None
        if not self._free:
            if passing and not self._passing:
                return None
            self.drop(next(iter(self._passing or self._kept)))
        slot = self._free.pop()
        (self._passing if passing else self._kept)[page] = slot
        self.saved += 1
        return slot

    def drop(self, page: int) -> None:
        """Free the slot of a page that is no longer cached, if it has one."""
        slot = self._passing.pop(page, None)
        if slot is None:
            slot = self._kept.pop(page, None)
        if slot is not None:
            self._free.append(slot)
            self.evicted += 1

    def stops(self, start: int, parting: int, end: int) -> list[int]:
        """Where a prefill of positions [start, end) ends chunks to take snapshots, ascending.

        parting: where it parts from others that have computed the same up to there, or 0. The last
        one is the last end of a page that the same prompt can begin from, as one token must be left
        to compute.

            every = 1024, pages of 16:  stops(0, 688, 2500)  ->  [688, 1024, 2048, 2496]
        """
        every, size = self.every, self._page_size
        wanted, stops, before = {parting, (end - 1) // size * size}, [], start
        if self._free or self._passing:
            wanted.update(range(start // every * every + every, end, every))
        for stop in sorted(wanted):
            if before + self.least <= stop and before < stop:
                stops.append(stop)
                before = stop
        return stops
