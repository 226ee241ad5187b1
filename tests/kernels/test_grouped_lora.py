"""Grouped LoRA against one product per token, and its gradients against one product per adapter."""

from functools import cache

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.grouped_lora import base
from tests.kernels.paged import round_to

# Every implementation of the contract.
IMPLEMENTATIONS = {"xla": base.grouped_lora}

TOKENS, D_IN, D_OUT, ADAPTERS, RANK = 50, 48, 80, 4, 16
RANKS = (16, 4, 8, 1)  # of each adapter; the rest of the stack is zeros
TOLERANCE = {np.float32: 1e-5, ml_dtypes.bfloat16: 3e-2}


@pytest.fixture(params=IMPLEMENTATIONS)
def grouped_lora(request):
    """An implementation, compiled once for all tests of a dtype."""
    return _compiled(request.param)


@cache
def _compiled(name: str):
    return jax.jit(IMPLEMENTATIONS[name])


def problem(dtype, seed: int = 0) -> list[np.ndarray]:
    """x, a, b, scale and adapter, the tokens in no order and some without an adapter."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((TOKENS, D_IN)).astype(dtype)
    a = (rng.standard_normal((ADAPTERS, D_IN, RANK)) / np.sqrt(D_IN)).astype(dtype)
    b = (rng.standard_normal((ADAPTERS, RANK, D_OUT)) / np.sqrt(RANK)).astype(dtype)
    for i, rank in enumerate(RANKS):
        a[i, :, rank:], b[i, rank:] = 0, 0
    scale = np.array([2.0, 0.5, 16.0 / 8**0.5, 32.0], np.float32)
    adapter = rng.integers(-1, ADAPTERS, TOKENS).astype(np.int32)
    return [x, a, b, scale, adapter]


def token_by_token(x, a, b, scale, adapter) -> np.ndarray:
    """The contract, in float64."""
    x, a, b = (round_to(value, value.dtype) for value in (x, a, b))
    out = np.zeros((len(x), b.shape[2]))
    for t, i in enumerate(adapter):
        if i >= 0:
            out[t] = scale[i] * (x[t] @ a[i, :, : RANKS[i]]) @ b[i, : RANKS[i]]
    return out


def assert_close(actual, desired, tolerance):
    actual = np.asarray(actual, np.float32)
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * np.abs(desired).max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: np.dtype(dtype).name)
def test_every_token_gets_its_own_adapter(grouped_lora, dtype):
    for seed in range(3):
        arguments = problem(dtype, seed)
        out = grouped_lora(*arguments)
        assert out.dtype == dtype
        assert_close(out, token_by_token(*arguments), TOLERANCE[dtype])
        assert not np.asarray(out, np.float32)[arguments[4] < 0].any()


def test_tokens_without_an_adapter_get_exactly_nothing(grouped_lora):
    x, a, b, scale, _ = problem(np.float32)
    x[3] = np.nan
    out = grouped_lora(x, a, b, scale, np.full(TOKENS, -1, np.int32))
    assert not np.asarray(out).any()


def test_an_adapter_never_changes_what_another_gives(grouped_lora):
    """Bit for bit, whatever the other adapters and the other tokens are."""
    x, a, b, scale, adapter = problem(np.float32)
    own = adapter == 1
    before = np.asarray(grouped_lora(x, a, b, scale, adapter))
    other = np.arange(ADAPTERS) != 1
    a[other], b[other], scale[other], x[~own] = a[other] * 1e4, b[other] - 7, -1, 1e6
    after = np.asarray(grouped_lora(x, a, b, scale, np.where(own, 1, adapter[::-1])))
    np.testing.assert_array_equal(after[own], before[own])


def test_gradients_are_those_of_one_product_per_adapter(grouped_lora):
    x, a, b, scale, adapter = problem(np.float32)
    d_out = np.random.default_rng(1).standard_normal((TOKENS, D_OUT)).astype(np.float32)

    def one_by_one(x, a, b):
        total = 0.0
        for i in range(ADAPTERS):
            own = np.flatnonzero(adapter == i)
            out = scale[i] * (x[own] @ a[i] @ b[i])
            total += jnp.vdot(out, d_out[own])
        return total

    def grouped(x, a, b):
        return jnp.vdot(grouped_lora(x, a, b, scale, adapter), d_out)

    expected = jax.jit(jax.grad(one_by_one, argnums=(0, 1, 2)))(x, a, b)
    actual = jax.jit(jax.grad(grouped, argnums=(0, 1, 2)))(x, a, b)
    for got, want in zip(actual, expected, strict=True):
        assert_close(got, np.asarray(want), 1e-5)


def test_an_adapter_without_tokens_has_no_gradient(grouped_lora):
    x, a, b, scale, adapter = problem(np.float32)
    adapter[adapter == 2] = -1

    def loss(a, b):
        return jnp.sum(grouped_lora(x, a, b, scale, adapter) ** 2)

    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1)))(a, b):
        assert not np.asarray(gradient)[2].any()
        assert np.asarray(gradient)[[0, 1, 3]].any(axis=(1, 2)).all()
