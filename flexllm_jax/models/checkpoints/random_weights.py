"""Random parameters in place of a checkpoint's (`model.load_format: dummy`), made on the device.

For trials and benchmarks: the time of a step does not depend on what the weights are.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from flexllm_jax.models.checkpoints.hf_weights import abstract_parameters
from flexllm_jax.models.config import ModelConfig

_STD = 0.02  # transformers' initializer_range


def random_parameters(
    config: ModelConfig, dtype: DTypeLike, device: Any = None, seed: int = 0
) -> Any:
    """Parameters as transformers initializes them: normal matrices, norms of one, biases of zero.

    `device` says where they go: a jax.Device, a tree of Shardings in the layout of
    `abstract_parameters`, or None for JAX's default device.
    """
    abstract = abstract_parameters(config, dtype)
    if isinstance(device, dict):
        shardings = device
    else:
        where = SingleDeviceSharding(device or jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: where, abstract)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(abstract))))

    def make(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
        kind = "matrix" if len(leaf.shape) > 1 else path[-1].key
        return _maker(kind, leaf.shape, leaf.dtype, sharding)(next(keys))

    return jax.tree_util.tree_map_with_path(make, abstract, shardings)


@lru_cache
def _maker(
    kind: str, shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding
) -> Callable[[jax.Array], jax.Array]:
    """One program for all parameters that need the same."""
    values = {
        "matrix": lambda key: _STD * jax.random.normal(key, shape, dtype),
        "weight": lambda _: jnp.ones(shape, dtype),
        "scalar": lambda _: jnp.ones(shape, dtype),
        "sinks": lambda _: jnp.zeros(shape, dtype),
        "bias": lambda _: jnp.zeros(shape, dtype),
        "dt_bias": lambda _: jnp.ones(shape, dtype),
        "log_a": lambda key: jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0)),
    }
    return jax.jit(values[kind], out_shardings=sharding)
