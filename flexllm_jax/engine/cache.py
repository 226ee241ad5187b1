"""KV pages and the other memory of the engine: how much there is, and what takes how much.

The page pool takes what is left of the device's memory after weights, adapters and finetuning
buffers, and no more than the requests and the microbatch could ever use at once.
"""

import math
import os
import resource
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from flexllm_jax.errors import UserError
from flexllm_jax.models.config import ModelConfig


class CacheError(UserError):
    """The device cannot hold what the configuration asks for; one line."""


def page_shapes(
    config: ModelConfig, dtype: jnp.dtype, num_pages: int, page_size: int
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """Per layer {"k", "v"} [P, B, K, H]."""
    shape = (num_pages, page_size, config.num_kv_heads, config.head_dim)
    page = jax.ShapeDtypeStruct(shape, dtype)
    return [{"k": page, "v": page} for _ in range(config.num_layers)]


def tree_bytes(tree) -> int:
    """Bytes of all arrays (or shapes) of a pytree on one device."""

    def elements(x: Any) -> int:
        return math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)

    return sum(elements(x) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def device_memory(device: Any) -> int:
    """Bytes of memory the device may use; for a CPU, the host's physical memory."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: Any) -> int:
    """Most bytes in use so far: of the device, or of the process when the device is a CPU."""
    statistics = device.memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose, and the number of KV pages that they leave room for."""

    weights: int
    adapters: int
    finetuning: int
    page_bytes: int
    num_pages: int

    def describe(self) -> str:
        """One line for the start-up log."""
        parts = {
            "weights": self.weights,
            "adapters": self.adapters,
            "finetuning": self.finetuning,
            f"{self.num_pages} KV pages": self.page_bytes * self.num_pages,
        }
        return "memory: " + ", ".join(f"{k} {v / 2**20:,.1f} MiB" for k, v in parts.items())


def plan_memory(
    available: int,
    weights: int,
    adapters: int,
    finetuning: int,
    page_bytes: int,
    wanted_pages: int,
    fixed_pages: int | None,
) -> MemoryPlan:
    """Size the page pool.

    Args:
        available: bytes the engine may use.
        weights: bytes of the base model.
        adapters: bytes of the bank.
        finetuning: bytes of the finetuning buffers.
        page_bytes: bytes of one page in all layers.
        wanted_pages: pages that the largest possible load fills.
        fixed_pages: `cache.num_pages`, or None to take what fits.
    """
    left = available - weights - adapters - finetuning
    fits = max(left, 0) // page_bytes
    num_pages = min(fits, wanted_pages) if fixed_pages is None else fixed_pages
    if num_pages > fits or num_pages < 1:
        raise CacheError(
            f"cache: {num_pages or 1} KV pages of {page_bytes:,} bytes do not fit in the "
            f"{max(left, 0):,} bytes that weights, adapters and finetuning buffers leave of "
            f"{available:,}: lower cache.num_pages, finetune.max_tokens or adapters.slots, "
            f"or raise cache.memory_fraction"
        )
    return MemoryPlan(weights, adapters, finetuning, page_bytes, num_pages)
