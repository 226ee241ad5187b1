"""A layer's passes at the shapes of real models, and the tiles to choose from."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.cases import Case, ModelShape, model_shards
from kernels_pallas.layer_passes import (
    add_norm,
    gated,
    rotate_and_write,
    rotate_back_and_clear,
    write_rows,
)
from kernels_pallas.layer_passes.pallas_triton import tuning_key
from kernels_pallas.rows import as_array

_EPS, _PAGE = 1e-5, 64


def norm(x, y, weight, backend: Backend = XLA):
    """A forward's."""
    return add_norm(x, y, weight, _EPS, backend)


def norm_backward(x, weight, gradients, backend: Backend = XLA):
    """A training step's: the norm, and the gradient of what it read."""
    readers = len(gradients) - 1
    results, pull = jax.vjp(lambda x: add_norm(x, None, weight, _EPS, backend, readers), x)
    return results, pull(gradients)


def gated_backward(gate, up, d_inner, backend: Backend = XLA):
    """A training step's: the inner activations, and the gradients of both factors."""

    def run(gate, up):
        return tuple(as_array(x) for x in gated(gate, up, backend, 2))

    inner, pull = jax.vjp(run, gate, up)
    return inner, pull((d_inner, d_inner))


def rotate_back(dq, dk, dv, cos, sin, backend: Backend = XLA):
    """A training step's, of the last slice."""
    start = jnp.int32(dk.shape[0] - dq.shape[0])
    return rotate_back_and_clear(dq, dk, dv, (cos, sin), start, backend=backend)


def write(q, k, v, cos, sin, slots, k_pages, v_pages, backend: Backend = XLA):
    """A forward's."""
    return rotate_and_write(q, k, v, (cos, sin), slots, k_pages, v_pages, backend=backend)


def keep(arrays, rows, x, mixed, lse, backend: Backend = XLA):
    """A forward's, of what the backward reads."""
    return write_rows(arrays, rows, [[x, mixed], [lse]], backend)


def _case(
    name: str, function: Any, make: Any, values: int, dtype: Any, donated: tuple[int, ...] = ()
) -> Case:
    width = jnp.dtype(dtype).itemsize
    return Case(name, function, make, 0.0, float(values * width), "bandwidth", donated)


def _normals(*shapes: tuple[int, ...], dtype: Any):
    def make(key):
        keys = jax.random.split(key, len(shapes))
        return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]

    return make


def _make_norm_backward(rows: tuple[int, int], dtype: Any):
    def make(key):
        x, weight, *gradients = _normals(rows, rows[1:], rows, rows, rows, dtype=dtype)(key)
        return x, weight, tuple(gradients)

    return make


def _make_write(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: Any):
    def make(key):
        pages = (tokens // _PAGE + 2, _PAGE, kv_heads, head_dim)
        q, k, v, k_pages, v_pages = _normals(
            (tokens, heads, head_dim),
            *[(tokens, kv_heads, head_dim)] * 2,
            pages,
            pages,
            dtype=dtype,
        )(key)
        angle = jax.random.normal(key, (tokens, 1, head_dim // 2))
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        cos, sin = jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)
        slots = (jnp.arange(tokens, dtype=jnp.int32) * 2) % (pages[0] * _PAGE + 7)
        return q, k, v, cos, sin, slots, k_pages, v_pages

    return make


def _make_keep(tokens: int, d_model: int, inner: int, heads: int, dtype: Any):
    def make(key):
        width = d_model + inner
        make_rows = _normals((tokens, d_model), (tokens, inner), (2 * tokens, width), dtype=dtype)
        x, mixed, kept = make_rows(key)
        lse = jax.random.normal(key, (tokens, heads))
        rows = (jnp.arange(tokens, dtype=jnp.int32) * 3) % (4 * tokens + 1)  # half past the end
        return [kept, jnp.zeros((2 * tokens, heads))], rows, x, mixed, lse

    return make


def _make_rotate_back(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: Any):
    def make(key):
        q, k, v, cos, sin, *_ = _make_write(tokens, heads, kv_heads, head_dim, dtype)(key)
        dk, dv = (jnp.concatenate([x, x]).astype(jnp.float32) for x in (k, v))
        return q, dk, dv, cos, sin

    return make


def _model_cases(where: str, model: ModelShape, tokens: int, dtype: Any) -> Iterator[Case]:
    rows, inner = (tokens, model.d_model), (tokens, model.d_ff)
    size, inner_size = tokens * model.d_model, tokens * model.d_ff
    yield _case(
        f"{where}/norm-{tokens}",
        norm,
        lambda key: tuple(_normals(rows, rows, rows[1:], dtype=dtype)(key)),
        4 * size,
        dtype,
    )
    yield _case(
        f"{where}/norm-{tokens}-backward",
        norm_backward,
        _make_norm_backward(rows, dtype),
        8 * size,
        dtype,
    )
    yield _case(
        f"{where}/gated-{tokens}-backward",
        gated_backward,
        lambda key: tuple(_normals(inner, inner, inner, dtype=dtype)(key)),
        8 * inner_size,
        dtype,
    )
    heads = (model.num_heads, model.num_kv_heads, model.head_dim)
    mixed = model.num_heads * model.head_dim
    yield _case(
        f"{where}/keep-{tokens}",
        keep,
        _make_keep(tokens, model.d_model, mixed, model.num_heads, dtype),
        2 * tokens * (model.d_model + mixed),
        dtype,
        donated=(0,),
    )
    yield _case(
        f"{where}/rotate-{tokens}",
        write,
        _make_write(tokens, *heads, dtype),
        2 * tokens * model.head_dim * (model.num_heads + 2 * model.num_kv_heads),
        dtype,
        donated=(6, 7),
    )
    yield _case(
        f"{where}/rotate-back-{tokens}",
        rotate_back,
        _make_rotate_back(tokens, *heads, dtype),
        2 * tokens * model.head_dim * (model.num_heads + 5 * model.num_kv_heads),
        dtype,
        donated=(1, 2),
    )


def _cases() -> Iterator[Case]:
    for model in model_shards():
        for tokens in (256, 1024):
            yield from _model_cases(model.name, model, tokens, jnp.bfloat16)
    odd = ModelShape("odd", 896, 14, 2, 80, 4864)
    yield from _model_cases("odd", odd, 333, jnp.bfloat16)
    yield from _model_cases("odd/float32", odd, 333, jnp.float32)


CASES = tuple(_cases())
DRY_RUN_CASES = tuple(_model_cases("tiny", ModelShape("tiny", 48, 4, 2, 16, 80), 20, jnp.bfloat16))


def tuning_keys(case: Case) -> tuple[str, ...]:
    """The entry of the tuning table that a case uses."""
    x, *others = jax.eval_shape(case.make, jax.random.key(0))
    kernels = {
        norm: "row",
        norm_backward: "row",
        gated_backward: "gated",
        write: "rotate",
        rotate_back: "rotate",
        keep: "write",
    }
    kernel = kernels[case.function]
    x = others[1] if kernel == "write" else x
    return (tuning_key(kernel, 0 if kernel in ("gated", "write") else x.shape[-1], x.dtype),)


def candidates(key: str) -> Iterator[dict[str, int]]:
    """Tiles worth timing for a key of the tuning table."""
    pieces = key.startswith(("gated", "write"))
    sizes = (1024, 2048, 4096, 8192) if pieces else (None,)
    for size in sizes:
        for num_warps in (1, 2, 4, 8, 16):
            own = {} if size is None else {"size": size}
            yield own | {"num_warps": num_warps, "num_stages": 1}
