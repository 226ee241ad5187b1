"""Of rows that they read where they lie kernels give what they give of the same rows as arrays."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.attention_backward import attention_backward
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.grouped_lora import job_lora
from kernels_pallas.layer_passes import add_norm, gated
from kernels_pallas.rows import Recalled, Rows, as_array, recall

BACKENDS = {"xla": XLA, "pallas": Backend("pallas", interpret=True)}
SLOTS, UNIT, LIVE, START = 40, 20, 17, 15
HEADS, HEAD_DIM, WIDTH = 4, 16, 64
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def rows():
    """Two parts of one array, of whose rows some are padding that holds NaN."""
    array = normal(SLOTS, 3 * WIDTH)
    array = array.at[:START].set(jnp.nan).at[START + LIVE :].set(jnp.nan)
    live = jnp.arange(UNIT) < LIVE
    return [Rows(array, jnp.int32(START), live, (i * WIDTH, (i + 1) * WIDTH)) for i in (0, 2)]


def normed(first, second, y, backend, added: bool):
    return add_norm(first, y if added else None, y[0], 1e-2, backend, readers=2)


def inner(first, second, y, backend):
    return gated(first, second, backend, 2)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "function", (partial(normed, added=False), partial(normed, added=True), inner)
)
def test_values_and_gradients_of_passes(rows, name, function):
    y, zeros = normal(UNIT, WIDTH), jnp.zeros((UNIT, WIDTH))

    @partial(jax.jit, static_argnums=0)
    def run(in_place: bool, *rows):
        def of(*computed):
            kept = zip(computed, rows, strict=True)
            given = (Recalled(c, r) if in_place else c for c, r in kept)
            return tuple(map(recall, function(*given, y, BACKENDS[name])))

        computed = [zeros if in_place else r.read() for r in rows]
        results, pull = jax.vjp(of, *computed)
        return results, pull(tuple(1.0 + i + y for i in range(len(results))))

    in_place, arrays = (run(given, *rows) for given in (True, False))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), in_place, arrays)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(arrays)[:-1])


@pytest.mark.parametrize("name", BACKENDS)
def test_lora_that_trains(rows, name):
    y, factors = normal(UNIT, WIDTH), ((normal(2, WIDTH, 8),), (normal(2, 8, WIDTH),))
    others = (*factors, (jnp.ones(2),), rows[0].live, jnp.int32(1))

    @partial(jax.jit, static_argnums=0)
    def run(in_place: bool, first):
        def of(computed, sums):
            x = Recalled(computed, first) if in_place else computed
            return job_lora(x, (y,), *others, sums, BACKENDS[name])

        computed = jnp.zeros((UNIT, WIDTH)) if in_place else first.read()
        results, pull = jax.vjp(of, computed, jax.tree.map(jnp.zeros_like, factors))
        return results, pull(results)

    in_place, arrays = (run(given, rows[0]) for given in (True, False))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-4), in_place, arrays)
    assert all(np.abs(x).max() > 1 for x in jax.tree.leaves(arrays))


@pytest.mark.parametrize("name", BACKENDS)
def test_attentions_output_and_denominator(rows, name):
    live = rows[0].live
    lse = Rows(normal(SLOTS, HEADS) + 3, rows[0].start, live, (0, HEADS))
    q, d_out = (normal(UNIT, HEADS, HEAD_DIM) for _ in range(2))
    k, v = (normal(3, 16, 2, HEAD_DIM) for _ in range(2))
    sequence_starts = jnp.where(live, 3, SLOTS).astype(jnp.int32)
    zeros = jnp.zeros((SLOTS, 2, HEAD_DIM))

    @partial(jax.jit, static_argnums=0)
    def run(in_place: bool, out, lse):
        if not in_place:
            out, lse = as_array(out).reshape(q.shape), as_array(lse)
        shared = jnp.stack([sequence_starts, sequence_starts])
        places = (jnp.arange(SLOTS, dtype=jnp.int32), sequence_starts, shared, jnp.int32(START))
        return attention_backward(
            q, k, v, *places, out, lse, d_out, zeros, zeros, backend=BACKENDS[name]
        )

    in_place, arrays = (run(given, rows[1], lse) for given in (True, False))
    for one, other in zip(in_place, arrays, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
        assert np.abs(other).max() > 0.1
