"""The pool of KV pages: reference counts and the prefix cache.

A page is in exactly one of three states: referenced (by one sequence, or by several that share a
cached prefix), cached without reference (evicted, least recently released first, only when an
allocation needs it), or free. The pool never looks at the device: steps run in the order they were
planned, so a page may be given to a new owner as soon as the old one released it.

A cached page is keyed by (key of the page before it, its own tokens), the first one by the salt.
Keys are compared whole, never by hash alone, so a hit always means equal salt and equal tokens.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence

from scheduler.cache.snapshots import Snapshots


class PagePool:
    """Reference-counted pages 0..num_pages-1 of `page_size` tokens, with a prefix cache.

    `hits` and `queries` count pages: those shared by `share`, and those that could have been.
    `snapshots` of recurrent state go with the pages they belong to; None: the model has no such
    state.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        prefix_caching: bool = True,
        snapshots: Snapshots | None = None,
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages={num_pages} and page_size={page_size} must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.snapshots = snapshots
        self.hits = 0
        self.queries = 0
        self._references = [0] * num_pages
        self._free = list(reversed(range(num_pages)))
        # Least recently released first; a dict keeps insertion order and deletes in O(1).
        self._evictable: dict[int, None] = {}
        # A cached page's key holds its parent's link, not the parent's page: links are never
        # reused, so a page number that was evicted and refilled cannot be mistaken for a parent.
        self._cached: dict[tuple, int] = {}
        self._key: dict[int, tuple] = {}
        self._link: dict[int, int] = {}
        self._next_link = itertools.count()
        # With snapshots: how many cached pages follow the one of a link; none are 0.
        self._followers: Counter[Hashable] = Counter()

    @property
    def num_free(self) -> int:
        """Pages an allocation can get now, by evicting cached ones if need be."""
        return len(self._free) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Pages in the prefix cache, referenced or not."""
        return len(self._key)

    def references(self, page: int) -> int:
        """Owners of `page`."""
        return self._references[page]

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None (and nothing taken) if too few are free.

        Free pages go first; then cached ones are evicted.
        """
        if count > self.num_free:
            return None
        free, references = self._free, self._references
        if count == 1 and free:
            pages = [free.pop()]
        else:
            start = max(0, len(free) - count)
            pages = free[start:][::-1]
            del free[start:]
            pages += [self._evict() for _ in range(count - len(pages))]
        for page in pages:
            references[page] = 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference of each page; a page without references is cached or free."""
        # Last page first: eviction then takes the ends of prefixes before their beginnings.
        references = self._references
        for page in reversed(pages):
            if not references[page]:
                raise RuntimeError(f"page {page} was released more often than it was taken")
            references[page] -= 1
            if references[page]:
                continue
            if page in self._key:
                self._evictable[page] = None
            else:
                self._link.pop(page, None)
                self._free.append(page)

    @property
    def least_shared(self) -> int | None:
        """A prompt shares something if it has more tokens; None: nothing is shared."""
        if not self.prefix_caching:
            return None
        return max(self.page_size, self.snapshots.least if self.snapshots is not None else 0)

    def forget(self) -> None:
        """Cache nothing of what was published until now: it was not computed after all."""
        for page in [*self._key]:
            del self._key[page], self._link[page]
            if self.snapshots is not None:
                self.snapshots.drop(page)
        self._free += self._evictable
        self._evictable.clear()
        self._cached.clear()
        self._followers.clear()

    def find_prefix(self, tokens: Sequence[int], salt: Hashable) -> list[int]:
        """The cached pages of the longest prefix of `tokens`, without taking references.

        Whole pages only, and never all of `tokens`: at least one is left to compute, because its
        logits are wanted. O(pages found) dictionary look-ups.
        """
        pages: list[int] = []
        if not self.prefix_caching:
            return pages
        size, parent = self.page_size, (salt,)
        for start in range(0, (len(tokens) - 1) // size * size, size):
            page = self._cached.get((parent, *tokens[start : start + size]))
            if page is None:
                break
            pages.append(page)
            parent = self._link[page]
        return pages

    def parting(self, pages: Sequence[int]) -> int:
        """Tokens of the `pages` that `find_prefix` found, if others go on behind them: there they
        part. Else 0. Known with snapshots alone."""
        followed = bool(pages) and self._link[pages[-1]] in self._followers
        return len(pages) * self.page_size if followed else 0

    def num_free_beside(self, pages: Sequence[int]) -> int:
        """Pages an allocation could get after `share(pages)`."""
        return self.num_free - sum(page in self._evictable for page in pages)

    def share(self, pages: Sequence[int], queried: int) -> None:
        """Take a reference on each of `pages`, found by `find_prefix` among `queried` pages."""
        for page in pages:
            self._references[page] += 1
            self._evictable.pop(page, None)
        self.hits += len(pages)
        self.queries += queried

    def publish(
        self, tokens: Sequence[int], salt: Hashable, pages: Sequence[int], num_full: int
    ) -> None:
        """Put the first `num_full` of `pages` in the cache, holding the first of `tokens`.

        The caller holds a reference on each page, every position of these pages is computed by a
        dispatched step, and their tokens are known. Pages published by an earlier call cost
        nothing, so calling this after every token is O(1). A page whose content is already cached
        elsewhere stays private; later pages then chain to the cached one.
        """
        if not self.prefix_caching:
            return
        first = num_full
        while first and pages[first - 1] not in self._link:
            first -= 1
        parent = self._link[pages[first - 1]] if first else (salt,)
        for index in range(first, num_full):
            page = pages[index]
            start = index * self.page_size
            key = (parent, *tokens[start : start + self.page_size])
            cached = self._cached.setdefault(key, page)
            if cached == page:
                self._key[page] = key
                self._link[page] = next(self._next_link)
                if self.snapshots is not None:
                    self._followers[parent] += 1
            else:
                self._link[page] = self._link[cached]
            parent = self._link[page]

    def cached_page(
        self, tokens: Sequence[int], salt: Hashable, pages: Sequence[int], index: int
    ) -> int | None:
        """The cached page that holds what `pages[index]` holds, which was published; None if it was
        evicted."""
        if pages[index] in self._key:
            return pages[index]
        start = index * self.page_size
        parent = self._link[pages[index - 1]] if index else (salt,)
        return self._cached.get((parent, *tokens[start : start + self.page_size]))

    def _evict(self) -> int:
        page = next(iter(self._evictable))
        del self._evictable[page]
        key = self._key.pop(page)
        del self._cached[key], self._link[page]
        if self.snapshots is not None:
            self._followers[key[0]] -= 1
            if not self._followers[key[0]]:
                del self._followers[key[0]]
            self.snapshots.drop(page)
        return page
