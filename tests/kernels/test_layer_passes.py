"""A layer's passes against their formulas in float64, and their gradients against JAX's own of the
formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.layer_passes import (
    add_norm,
    gated,
    rotate_and_write,
    rotate_back_and_clear,
    write_rows,
)
from kernels_pallas.rows import as_array
from tests.kernels.paged import round_to

BACKENDS = {"xla": XLA, "pallas": Backend("pallas", interpret=True)}
TOLERANCE = {np.float32: 2e-6, ml_dtypes.bfloat16: 2e-2}
EPS = 1e-2


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


@pytest.fixture(params=TOLERANCE, ids=lambda dtype: np.dtype(dtype).name)
def dtype(request):
    return request.param


def normals(dtype, *shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32).astype(dtype) for shape in shapes]


def exact(*arrays):
    return [round_to(array, array.dtype).astype(np.float64) for array in arrays]


def assert_close(actual, desired, dtype):
    tolerance = TOLERANCE[dtype] * max(1.0, np.abs(desired).max())
    np.testing.assert_allclose(np.asarray(actual, np.float64), desired, rtol=0, atol=tolerance)


def norm_of(total, weight):
    return total / np.sqrt((total**2).mean(-1, keepdims=True) + EPS) * weight


@pytest.mark.parametrize("size", (64, 100))
def test_a_sum_and_its_norm(backend, dtype, size):
    x, y, weight = normals(dtype, (5, size), (5, size), (size,))
    total, normed = jax.jit(partial(add_norm, eps=EPS, backend=backend))(x, y, weight)
    want = sum(exact(x, y))
    assert_close(total, want, dtype)
    assert_close(normed, norm_of(want, *exact(weight)), dtype)
    same, alone = jax.jit(partial(add_norm, y=None, eps=EPS, backend=backend))(x, weight=weight)
    np.testing.assert_array_equal(same, x)
    assert_close(alone, norm_of(*exact(x, weight)), dtype)


@pytest.mark.parametrize("added", (True, False))
def test_gradients_of_a_norm_and_of_what_it_reads(backend, dtype, added):
    x, y, weight, d_total, *d_normed = normals(
        dtype, (5, 100), (5, 100), (100,), (5, 100), (5, 100), (5, 100)
    )

    def run(x, y):
        return add_norm(x, y, weight, EPS, backend, readers=2)

    arguments = (x, y) if added else (x, None)
    gradients = jax.jit(lambda *a: jax.vjp(run, *a)[1]((d_total, *d_normed)))(*arguments)
    added_up = x.astype(np.float32) + added * y.astype(np.float32)
    total, w, d_sum, *d_out = exact(added_up, weight, d_total, *d_normed)
    root = 1 / np.sqrt((total**2).mean(-1, keepdims=True) + EPS)
    g = w * sum(d_out)
    want = d_sum + root * (g - total * root**2 * (g * total).mean(-1, keepdims=True))
    assert_close(gradients[0], want, dtype)
    if added:
        np.testing.assert_array_equal(gradients[0], gradients[1])


@pytest.mark.parametrize("shape", ((4, 512), (7, 333)))
def test_gated_activations_and_both_gradients(backend, dtype, shape):
    gate, up, d_inner = normals(dtype, shape, shape, shape)

    @jax.jit
    def run(gate, up):
        inner, pull = jax.vjp(
            lambda gate, up: tuple(map(as_array, gated(gate, up, backend, 2))), gate, up
        )
        return inner, pull((d_inner, 2 * d_inner))

    (inner, same), (d_gate, d_up) = run(gate, up)
    np.testing.assert_array_equal(inner, same)
    g, u, d = exact(gate, up, d_inner)
    d *= 3
    sigmoid = 1 / (1 + np.exp(-g))
    assert_close(inner, g * sigmoid * u, dtype)
    assert_close(d_gate, d * u * (sigmoid + g * sigmoid * (1 - sigmoid)), dtype)
    assert_close(d_up, d * g * sigmoid, dtype)


@pytest.mark.parametrize("merged", (False, True))
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), ((4, 2, 16), (7, 1, 80)))
def test_queries_rotated_and_keys_and_values_in_their_pages(
    backend, dtype, heads, kv_heads, head_dim, merged
):
    tokens, pages, page = 6, 3, 4
    q, k, v, k_pages, v_pages = normals(
        dtype,
        (tokens, heads, head_dim),
        *[(tokens, kv_heads, head_dim)] * 2,
        *[(pages, page, kv_heads, head_dim)] * 2,
    )
    angle = np.random.default_rng(1).standard_normal((tokens, 1, head_dim // 2)).astype(np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    angles = np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
    slots = np.array([5, 0, 12, 11, 13, 3], np.int32)  # the third and the fifth have no page
    # Pages are of a stored dtype; here the kernels' own.
    out, *written = jax.jit(partial(rotate_and_write, backend=backend, merged=merged))(
        q, k, v, angles, slots, jnp.asarray(k_pages), jnp.asarray(v_pages)
    )

    def rotated(x):
        first, second = np.split(exact(x)[0], 2, axis=-1)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    assert_close(out, rotated(q), dtype)
    for actual, before, values in zip(
        written, (k_pages, v_pages), (rotated(k), *exact(v)), strict=True
    ):
        (want,) = exact(before)
        flat = want.reshape(-1, kv_heads, head_dim)
        for token, slot in enumerate(slots):
            if slot < len(flat):
                flat[slot] = values[token]
        assert_close(actual, want, dtype)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), ((4, 2, 16), (7, 1, 80)))
def test_gradients_rotated_back_and_accumulators_cleared(backend, dtype, heads, kv_heads, head_dim):
    tokens, slots, start = 5, 12, 6
    (dq,) = normals(dtype, (tokens, heads, head_dim))
    dk, dv = normals(np.float32, *[(slots, kv_heads, head_dim)] * 2)
    angle = np.random.default_rng(1).standard_normal((tokens, 1, head_dim // 2)).astype(np.float32)
    cos, sin = np.cos(angle), np.sin(angle)
    angles = np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)
    run = jax.jit(partial(rotate_back_and_clear, backend=backend))
    *projected, new_dk, new_dv = run(dq, jnp.asarray(dk), jnp.asarray(dv), angles, np.int32(start))
    own = slice(start, start + tokens)

    def back(x):
        first, second = np.split(np.asarray(x, np.float64), 2, axis=-1)
        return np.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)

    for actual, want in zip(projected, (back(*exact(dq)), back(dk[own]), dv[own]), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, want, dtype)
    for actual, before in ((new_dk, dk), (new_dv, dv)):
        before[own] = 0
        np.testing.assert_array_equal(actual, before)


def test_rows_of_several_arrays_are_written_side_by_side(backend, dtype):
    """Whole rows; those of other tokens stay, and the third and the fifth go nowhere."""
    one, two, kept = normals(dtype, (5, 4097), (5, 3), (7, 4100))
    three, more = normals(np.float32, (5, 6), (7, 6))
    rows = np.array([4, 0, 7, 6, 9], np.int32)
    run = jax.jit(partial(write_rows, backend=backend))
    written = run([jnp.asarray(kept), jnp.asarray(more)], rows, [[one, two], [three]])
    inside = rows < 7
    kept[rows[inside]] = np.concatenate([one, two], axis=1)[inside]
    more[rows[inside]] = three[inside]
    for actual, want in zip(written, (kept, more), strict=True):
        np.testing.assert_array_equal(actual, want)
