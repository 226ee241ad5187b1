"""The tokens that top-k, top-p and min-p leave, against sorting them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flexllm_jax.engine.sampling import cutoffs
from flexllm_jax.engine.sampling.cutoffs import kept

ROUNDING = 2e-6  # of a float32 sum of probabilities


def sorted_kept(logits, top_k, top_p, min_p):
    """The tokens left of one row, in float64."""
    ordered = np.sort(logits.astype(np.float64))[::-1]
    likely = np.exp(ordered - ordered[0])
    left = likely >= min_p
    if top_k > 0:
        left &= ordered >= ordered[min(top_k, len(ordered)) - 1]
    if top_p < 1:
        likely = np.where(left, likely, 0) / likely[left].sum()
        # Before a token, and not before one of those that are as likely, comes:
        first = np.searchsorted(-ordered, -ordered)
        before = (np.cumsum(likely) - likely)[first]
        left &= (before < top_p) | (first == 0)
    return logits >= ordered[left].min()


def as_sorted_on_the_device(logits, top_k, top_p, min_p):
    """The sampler's own code when it sorted: float32, JAX."""
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(logits.shape[1])
    likely = jax.nn.softmax(ordered, axis=-1)
    top_k = jnp.where(top_k > 0, top_k, logits.shape[1])
    left = (likely >= min_p[:, None] * likely[:, :1]) & (rank < top_k[:, None])
    likely = jax.nn.softmax(jnp.where(left, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(likely, axis=-1) - likely
    left &= (before < top_p[:, None]) | (rank == 0)
    smallest = jnp.min(jnp.where(left, ordered, jnp.inf), axis=-1, keepdims=True)
    return logits >= smallest


def logits_of(kind: str, rows: int, size: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (rows, size)).astype(np.float32)
    if kind == "ties":
        logits = np.round(logits)  # zeros of both signs, too
    if kind == "masked":
        logits[rng.random(logits.shape) < 0.9] = -np.inf
        logits[:, 3] = 0.5
    if kind == "extreme":
        logits = (logits * 10.0 ** rng.integers(-30, 7, (rows, 1))).astype(np.float32)
    if kind == "flat":
        logits[:] = -1.25
    return logits


# (top_k, top_p, min_p)
FILTERS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (50, 1.0, 0.0),
    (10**9, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.1, 0.0),
    (0, 1e-45, 0.0),
    (0, 1.0, 0.07),
    (20, 0.8, 0.0),
    (200, 0.95, 0.03),
]


@pytest.mark.parametrize("kind", ["usual", "ties", "masked", "extreme", "flat"])
@pytest.mark.parametrize("size", [300, 20_011])
def test_the_tokens_left_are_those_of_a_sort(kind, size):
    rows = 4 * len(FILTERS)
    logits = logits_of(kind, rows, size, seed=size)
    filters = [np.array(column) for column in zip(*FILTERS * 4, strict=True)]
    top_k, top_p, min_p = filters[0], *(column.astype(np.float32) for column in filters[1:])
    found = np.asarray(jax.jit(kept)(logits, top_k, top_p, min_p))
    exact = 0
    for row in range(rows):
        k, p, m = top_k[row], float(top_p[row]), float(min_p[row])
        # Both without and with the rounding of the sums that cross the limits.
        fewest = sorted_kept(logits[row], k, p if p == 1 else p - ROUNDING, m * (1 + ROUNDING))
        most = sorted_kept(logits[row], k, p if p == 1 else p + ROUNDING, m * (1 - ROUNDING))
        assert (fewest <= found[row]).all() and (found[row] <= most).all(), row
        np.testing.assert_array_equal(found[row], logits[row] >= logits[row][found[row]].min())
        exact += (fewest == most).all()
    assert exact > 0.6 * rows


def test_the_tokens_left_are_those_of_the_sort_that_was():
    rows = 4 * len(FILTERS)
    logits = logits_of("usual", rows, 1_003, seed=1)
    top_k, top_p, min_p = (np.array(column) for column in zip(*FILTERS * 4, strict=True))
    arguments = (logits, top_k, top_p.astype(np.float32), min_p.astype(np.float32))
    found, expected = jax.jit(kept)(*arguments), jax.jit(as_sorted_on_the_device)(*arguments)
    # Without a top_p its sums could reach 1 before the last tokens, and these were dropped.
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_array_equal(found[top_p < 1], expected[top_p < 1])
    assert (expected <= found).all()
    fifty = (top_k == 50) & (top_p == 1)
    np.testing.assert_array_equal(found[fifty].sum(-1), 50)


@pytest.mark.parametrize("bits", [1, 2])
def test_the_passes_of_a_cpu_and_of_a_gpu_find_the_same_value(bits):
    """Which is the k-th largest: every float32, the least and the greatest too."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, (64, 500), np.uint32).view(np.float32)
    values = np.where(np.isnan(values), np.float32(np.inf), values)
    values[0] = np.finfo(np.float32).max
    values[1] = -np.inf
    limit = rng.integers(1, 500, 64)

    def above(value):
        return jnp.sum(values > value, axis=-1)

    found = jax.jit(lambda limit: cutoffs._float_at(cutoffs._places(above, bits, limit)))(limit)
    expected = -np.sort(-values)[np.arange(64), limit - 1]
    tiny = np.abs(expected) < np.finfo(np.float32).tiny  # a CPU takes them for zeros
    np.testing.assert_array_equal(np.where(tiny, 0, found), np.where(tiny, 0, expected))


def test_what_a_row_keeps_does_not_depend_on_the_rows_beside_it():
    logits = logits_of("usual", 16, 4_000, seed=5)
    top_k, top_p, min_p = np.full(16, 40), np.full(16, 0.9, np.float32), np.zeros(16, np.float32)
    together = jax.jit(kept)(logits, top_k, top_p, min_p)
    for row in range(16):
        one = slice(row, row + 1)
        alone = jax.jit(kept)(logits[one], top_k[one], top_p[one], min_p[one])
        np.testing.assert_array_equal(together[one], alone)


def test_nothing_is_sorted():
    shapes = [jax.ShapeDtypeStruct((4, 1000), jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((4,), t) for t in (jnp.int32, jnp.float32, jnp.float32)]
    text = jax.jit(kept).lower(*shapes).as_text()
    assert "sort" not in text and "top_k" not in text
    assert "sort" in jax.jit(partial(lax.sort, dimension=-1)).lower(shapes[0]).as_text()
