"""Keys and values laid out in pages at random, as a page allocator would after a while."""

import numpy as np


def round_to(x: np.ndarray, dtype) -> np.ndarray:
    """x rounded to `dtype`, as float64 for the references to compute with."""
    return x.astype(dtype).astype(np.float64)


class PagePool:
    """Pages of keys and values, taken in a random order; what is never written is NaN."""

    def __init__(self, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype, rng):
        self.page_size = page_size
        shape = (pages, page_size, kv_heads, head_dim)
        self.k = np.full(shape, np.nan).astype(dtype)
        self.v = np.full(shape, np.nan).astype(dtype)
        self._free = list(rng.permutation(pages))

    def write(
        self, keys: np.ndarray, values: np.ndarray, shared: tuple[int, ...] = ()
    ) -> list[int]:
        """Put a sequence's keys and values [tokens, K, H] in pages, the first of which may be
        another sequence's that begins the same; returns the page table."""
        count = -(-len(keys) // self.page_size)
        table = [*shared, *(self._free.pop() for _ in range(count - len(shared)))]
        for token in range(len(shared) * self.page_size, len(keys)):
            page, offset = table[token // self.page_size], token % self.page_size
            self.k[page, offset], self.v[page, offset] = keys[token], values[token]
        return table
