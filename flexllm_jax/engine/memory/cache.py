"""KV pages and recurrent state, and how much memory arrays take and devices have."""

import math
import os
import resource
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flexllm_jax.errors import UserError
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.spec import GatedDeltaSpec, MixerSpec


class CacheError(UserError):
    """The device cannot hold what the configuration asks for; one line."""


def page_shapes(
    config: ModelConfig, dtype: jnp.dtype, num_pages: int, page_size: int, state_slots: int
) -> list[dict[str, jax.ShapeDtypeStruct]]:
    """What each layer keeps of sequences: attention's {"k", "v"} [P, B, K, H] in pages, nothing
    where it reads the keys of another layer; of a gated delta net, in slots, {"state"} [X, Hv, dk,
    dv] float32 and the last inputs of its convolution, {"conv"} [X, W - 1, C]."""

    def kept(mixer: MixerSpec) -> dict[str, jax.ShapeDtypeStruct]:
        if isinstance(mixer, GatedDeltaSpec):
            tail = (state_slots, mixer.width - 1, mixer.channels)
            return {
                "state": jax.ShapeDtypeStruct((state_slots, *mixer.state), jnp.float32),
                "conv": jax.ShapeDtypeStruct(tail, dtype),
            }
        shape = (num_pages, page_size, mixer.kv_heads, mixer.head_dim)
        names = ("k", "v") if mixer.own_keys else ()
        return dict.fromkeys(names, jax.ShapeDtypeStruct(shape, dtype))

    return [kept(layer.mixer) for layer in config.layers]


def copy_slot(states: list[dict], source: jax.Array, target: jax.Array) -> list[dict]:
    """Recurrent state [X, ...] of all layers (donated) with one slot copied to another."""

    def copy(array: jax.Array) -> jax.Array:
        own = lax.dynamic_index_in_dim(array, source, keepdims=False)
        return lax.dynamic_update_index_in_dim(array, own, target, axis=0)

    return jax.tree.map(copy, states)


def tree_bytes(tree) -> int:
    """Bytes of all arrays (or shapes) of a pytree on one device."""

    def elements(x: Any) -> int:
        return math.prod(x.sharding.shard_shape(x.shape) if x.sharding else x.shape)

    return sum(elements(x) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def device_memory(device: Any) -> int | None:
    """Bytes of memory the device may use; for a CPU, the host's physical memory. None for another
    device that does not say: the host's memory tells nothing of its own."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    statistics = device.memory_stats()
    return statistics.get("bytes_limit") if statistics else None


def peak_memory(device: Any) -> int:
    """Most bytes in use so far: of the device, or of the process when the device is a CPU."""
    statistics = device.memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
