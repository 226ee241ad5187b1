"""Tokens grouped in blocks of one adapter each.

Every call of a step with as many tokens and adapters makes the same map, from the same `adapter`
alone, so XLA keeps one copy per step: that of all tokens (`blocks_of_all`), as a layer's passes go
over those of no adapter too. It costs a few reductions: no sort, no scan, no loop on the
device.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int


class BlockMap(NamedTuple):
    """Blocks of tokens in the order of their adapters, those without tokens last.

    tokens: index of each row's token, ascending in an adapter; T in rows beyond its last.
    adapter: the block's adapter; A in blocks without tokens.
    place: each token's place among the B * M rows; beyond them for tokens of no adapter.
    """

    tokens: Int[Array, "B M"]
    adapter: Int[Array, " B"]
    place: Int[Array, " T"]


def block_map(adapter: Int[Array, " T"], num_adapters: int, block_rows: int) -> BlockMap:
    """The tokens of each adapter in blocks of `block_rows`; tokens of adapter -1 are in none."""
    num_tokens = adapter.shape[0]
    num_blocks = most_blocks(num_tokens, num_adapters, block_rows)
    token, row = jnp.arange(num_tokens, dtype=jnp.int32), jnp.arange(num_adapters)

    count = jnp.sum(adapter[:, None] == row, axis=0)
    blocks = (count + block_rows - 1) // block_rows
    end = jnp.sum(jnp.where(row <= row[:, None], blocks, 0), axis=1)

    # T * T comparisons fuse into one kernel of a few microseconds; a scan over T would be many.
    earlier = (adapter == adapter[:, None]) & (token < token[:, None])
    place = (end - blocks)[adapter] * block_rows + jnp.sum(earlier, axis=1)
    place = jnp.where(adapter < 0, num_blocks * block_rows + token, place)
    tokens = jnp.full(num_blocks * block_rows, num_tokens, jnp.int32)
    tokens = tokens.at[place].set(token, mode="drop", unique_indices=True)
    return BlockMap(
        tokens.reshape(num_blocks, block_rows),
        jnp.sum(end <= jnp.arange(num_blocks)[:, None], axis=1, dtype=jnp.int32),
        place,
    )


def blocks_of_all(adapter: Int[Array, " T"], num_adapters: int) -> BlockMap:
    """Blocks of every token of a step: tokens of no adapter are in blocks of adapter A, as if they
    had one more, and blocks without tokens are of A + 1."""
    rows = block_rows(adapter.shape[0], num_adapters)
    return block_map(jnp.where(adapter < 0, num_adapters, adapter), num_adapters + 1, rows)


def most_blocks(num_tokens: int, num_adapters: int, block_rows: int) -> int:
    """The most blocks that any choice of adapters can need: all but one row of each adapter's last
    block may be empty."""
    used = min(num_tokens, num_adapters)
    return (num_tokens + used * (block_rows - 1)) // block_rows


def block_rows(num_tokens: int, num_adapters: int) -> int:
    """Rows of a block: about an adapter's share of the tokens, from the 16 that a product takes to
    64. The same for every projection of a step, which so shares one map."""
    rows = 16
    while rows < 64 and 2 * rows * num_adapters <= num_tokens:
        rows *= 2
    return rows
