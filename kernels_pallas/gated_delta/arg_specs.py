"""The gated delta rule at the shapes of real models, and the tiles to choose from."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases import Case
from kernels_pallas.gated_delta import delta_rule, delta_window, delta_window_backward
from kernels_pallas.gated_delta.cost import (
    Cost,
    DeltaShape,
    chunk_cost,
    decode_cost,
    window_backward_cost,
)
from kernels_pallas.gated_delta.pallas_triton import decode_key, tuning_key

UNIT_TOKENS = 256
_9B, _27B = DeltaShape("qwen3.5-9b", 16, 32), DeltaShape("qwen3.5-27b", 16, 48)
SHAPES = (_9B.shard(1), _9B.shard(4), _27B.shard(1))  # 4B and 35B-A3B are as 9B


def _rows(key, shape: DeltaShape, tokens: int, dtype: Any) -> list[jax.Array]:
    """q, k, v, log_decay and beta of so many tokens."""
    keys = jax.random.split(key, 5)
    q, k = (
        jax.random.normal(key, (tokens, shape.key_heads, shape.dk), jnp.float32) for key in keys[:2]
    )
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = jax.random.normal(keys[2], (tokens, shape.value_heads, shape.dv), dtype)
    log_decay = -0.1 * jax.random.exponential(keys[3], (tokens, shape.value_heads))
    beta = jax.random.uniform(keys[4], (tokens, shape.value_heads))
    return [(q * shape.dk**-0.5).astype(dtype), k.astype(dtype), v, log_decay, beta]


def step_case(
    name: str,
    shape: DeltaShape,
    lengths: Sequence[int],
    trained: int = 0,
    dtype: Any = jnp.bfloat16,
    target: float = 0.0,
) -> Case:
    """A step of sequences with so many rows, those of one first, of which the last `trained` train,
    one after the other in a microbatch; every other one is fresh. A few rows are padding."""
    decoding = sum(length == 1 for length in lengths)
    used, padding = sum(lengths), 0 if decoding == len(lengths) else 3
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    fresh = np.arange(len(lengths)) % 2 == 1
    in_training = sum(lengths[len(lengths) - trained :])
    count = -(-in_training // UNIT_TOKENS)
    places = np.full(used + padding, count * UNIT_TOKENS, np.int32)
    places[used - in_training : used] = np.arange(in_training)
    slots = np.random.default_rng(0).permutation(len(lengths) + 2)[: len(lengths)].astype(np.int32)

    def make(key: jax.Array) -> tuple:
        rows_key, state_key = jax.random.split(key)
        own = jnp.arange(used + padding) < used
        rows = [
            jnp.where(own.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan).astype(x.dtype)
            for x in _rows(rows_key, shape, used + padding, dtype)
        ]
        size = (shape.value_heads, shape.dk, shape.dv)
        state = jax.random.normal(state_key, (len(slots) + 2, *size), jnp.float32)
        tables = [jnp.asarray(x) for x in (starts, fresh, slots, slots)]
        counts = [jnp.int32(decoding), jnp.int32(len(lengths)), jnp.asarray(places)]
        windows = [jnp.zeros((count, *size), jnp.float32)] if trained else []
        return (*rows, state, *tables, *counts, *windows)

    def call(*arguments: jax.Array, **keywords: Any):
        windows = arguments[13] if trained else None
        out, *rest = delta_rule(*arguments[:13], windows, unit_tokens=UNIT_TOKENS, **keywords)
        return jnp.where(np.arange(used + padding)[:, None, None] < used, out, 0), *rest

    cost = decode_cost(shape, decoding)
    if decoding < len(lengths):
        cost += chunk_cost(shape, used - decoding, len(lengths) - decoding, count)
    return _case(f"{shape.name}/{name}", call, make, cost, (5, 13) if trained else (5,), target)


def window_case(
    name: str,
    shape: DeltaShape,
    tokens: int,
    backward: bool,
    firsts: Sequence[int] = (),
    dtype: Any = jnp.bfloat16,
) -> Case:
    """A window of training, in which sequences begin at `firsts`, and whose last rows are padding
    if any do."""

    def make(key: jax.Array) -> tuple:
        keys = jax.random.split(key, 4)
        token = np.arange(tokens)
        is_token = token < tokens - 2 * len(firsts)
        state, d_state = jax.random.normal(
            keys[1], (2, shape.value_heads, shape.dk, shape.dv), jnp.float32
        )
        d_out = jax.random.normal(keys[2], (tokens, shape.value_heads, shape.dv), dtype)
        rows = [
            jnp.where(is_token.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan).astype(x.dtype)
            for x in (*_rows(keys[0], shape, tokens, dtype), d_out)
        ]
        masks = jnp.asarray(np.isin(token, firsts)), jnp.asarray(is_token)
        arguments = (*rows[:5], *masks, state)
        return (*arguments, rows[5], d_state) if backward else arguments

    cost = window_backward_cost(shape, tokens) if backward else chunk_cost(shape, tokens)
    function = delta_window_backward if backward else delta_window
    return _case(f"{shape.name}/{name}", function, make, cost)


def _case(name, function, make, cost: Cost, donated=(), target: float = 0.0) -> Case:
    exact = "float32" in name
    return Case(
        name,
        function,
        make,
        flops=cost.flops,
        bytes=cost.bytes,
        bound="bandwidth" if "/decode" in name else "products",
        donated=donated,
        target=target,
        tolerance=1e-4 if exact else 2e-2,
    )


def _cases() -> Iterator[Case]:
    for shape in SHAPES:
        yield step_case("decode-64", shape, [1] * 64, target=0.75)
        yield step_case("prefill-2048", shape, [2048])
        yield step_case("mixed-64-448-512", shape, [*[1] * 64, 448, 200, 312], trained=2)
        yield window_case("window-1024", shape, 1024, False)
        yield window_case("window-1024-backward", shape, 1024, True)
    # Tiles for float32, and for a backward with such heads, spill registers: they are to be found.
    odd = DeltaShape("odd", 3, 6, 96, 80)
    yield step_case("mixed", odd, [*[1] * 5, 100, 37, 333], trained=1)
    yield window_case("window-333", odd, 333, False, (0, 70, 71, 200))


CASES = tuple(_cases())
_TINY = DeltaShape("tiny", 2, 4, 16, 32)
DRY_RUN_CASES = (window_case("window-40-backward", _TINY, 40, True, (7,)),)


def tuning_keys(case: Case) -> tuple[str, ...]:
    """The entries of the tuning table that a case uses."""
    q, _, v, *_ = jax.eval_shape(case.make, jax.random.key(0))
    key = partial(tuning_key, dk=q.shape[2], dtype=v.dtype)
    if case.bound == "bandwidth":
        return (decode_key(q.shape[2], v.shape[2]),)
    if case.function is delta_window_backward:
        return tuple(map(key, ("prepare", "walk", "reverse", "gradients")))
    return tuple(map(key, ("prepare", "walk")))


def candidates(key: str) -> Iterator[dict[str, int]]:
    """Tiles worth timing for a key of the tuning table; some do not fit every chip."""
    kernel = key.split("/")[0]
    columns = {"decode": (16, 32, 64, 128), "prepare": (0,)}.get(kernel, (16, 32, 64))
    stages = (1,) if kernel in ("decode", "prepare") else (1, 2, 3)
    for size, num_warps, num_stages in product(columns, (2, 4, 8), stages):
        own = {"columns": size} if size else {}
        yield own | {"num_warps": num_warps, "num_stages": num_stages}
