"""Grouped LoRA against one product per token, and its gradients against JAX's own of one product
per adapter."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.check import widened
from kernels_pallas.grouped_lora import grouped_lora as api
from kernels_pallas.grouped_lora import job_lora, low_rank_sums
from kernels_pallas.grouped_lora.blocks import block_map
from kernels_pallas.grouped_lora.layer_case import layer as lora_layer
from kernels_pallas.grouped_lora.layer_case import make_layer
from kernels_pallas.rows import GatedRows, Recalled, Rows, as_array
from tests.kernels.paged import round_to

BACKENDS = {"xla": XLA, "pallas": Backend("pallas", interpret=True)}

# Sizes that no tile divides, and of several tiles.
TOKENS, D_IN, D_OUT, ADAPTERS, RANK = 50, 600, (530, 32, 48), 4, 16
RANKS = (16, 4, 8, 1)  # of each adapter; the rest of the stack is zeros
TOLERANCE = {np.float32: 1e-5, ml_dtypes.bfloat16: 3e-2}


@pytest.fixture(params=BACKENDS)
def grouped_lora(request):
    """An implementation, compiled once for all tests of a dtype."""
    return _compiled(request.param)


@cache
def _compiled(name: str):
    return jax.jit(partial(api, backend=BACKENDS[name]))


def problem(
    dtype, seed: int = 0, adapters: int = ADAPTERS, tokens: int = TOKENS, rank: int = RANK
) -> list:
    """x, ys, a, b, scales and adapter, the tokens in no order and some without an adapter."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    x = normal(tokens, D_IN).astype(dtype)
    ys = tuple(normal(tokens, d).astype(dtype) for d in D_OUT)
    a = tuple(normal(adapters, D_IN, rank) / D_IN**0.5 for _ in D_OUT)
    b = tuple(normal(adapters, rank, d) / rank**0.5 for d in D_OUT)
    for down, up in zip(a, b, strict=True):
        for i, own_rank in enumerate(RANKS[:adapters]):
            down[i, :, own_rank:], up[i, own_rank:] = 0, 0
    scale = np.resize(np.array([2.0, 0.5, 16.0 / 8**0.5, 32.0], np.float32), adapters)
    scales = tuple(scale + j for j in range(len(D_OUT)))
    adapter = rng.integers(-1, adapters, tokens).astype(np.int32)
    a, b = (tuple(w.astype(dtype) for w in factors) for factors in (a, b))
    return [x, ys, a, b, scales, adapter]


def token_by_token(x, ys, a, b, scales, adapter) -> list[np.ndarray]:
    """The contract, in float64."""
    sums = []
    for y, down, up, scale in zip(ys, a, b, scales, strict=True):
        rows, total, down, up = (round_to(value, value.dtype) for value in (x, y, down, up))
        total = np.array(total, np.float64)
        for t, i in enumerate(adapter):
            if i >= 0:
                total[t] += scale[i] * (rows[t] @ down[i]) @ up[i]
        sums.append(total)
    return sums


def assert_close(actual, desired, tolerance):
    actual = np.asarray(actual, np.float32)
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * np.abs(desired).max())


@pytest.mark.parametrize("adapters", (ADAPTERS, 1))
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: np.dtype(dtype).name)
def test_every_token_gets_its_own_adapter(grouped_lora, dtype, adapters):
    for seed in range(3):
        arguments = problem(dtype, seed, adapters)
        for out, expected in zip(grouped_lora(*arguments), token_by_token(*arguments), strict=True):
            assert out.dtype == dtype
            assert_close(out, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    "shape",
    ({"rank": 8}, {"rank": 40}, {"tokens": 150, "adapters": 2}, {"tokens": 3, "adapters": 70}),
    ids=("rank-below-a-tile", "rank-of-no-tile", "long-prompts", "more-adapters-than-tokens"),
)
def test_shapes(grouped_lora, shape):
    arguments = problem(np.float32, **shape)
    for out, expected in zip(grouped_lora(*arguments), token_by_token(*arguments), strict=True):
        assert_close(out, expected, TOLERANCE[np.float32])


def test_outputs_that_are_columns_of_one_array():
    arguments = problem(np.float32)
    merged = jax.jit(partial(api, backend=BACKENDS["pallas"], merged=True))(*arguments)
    for one, other in zip(merged, _compiled("pallas")(*arguments), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_a_layer_whose_passes_add_the_sums_and_begin_the_products(dtype):
    """As one whose passes read arrays; tokens of no adapter among others, widths of no tile. In
    bfloat16 they also write the sums that are kept."""
    heads, head_dim, width, inner = (5, 3, 3), 24, 530, 333
    qkv = tuple(n * head_dim for n in heads)
    groups = {
        "qkv": (width, qkv),
        "o": (qkv[0], (width,)),
        "gate_up": (width, (inner, inner)),
        "down": (inner, (width,)),
    }
    make = partial(make_layer, groups=groups, tokens=50, adapters=3, rank=12, head_dim=head_dim)
    arguments = jax.jit(partial(make, dtype=dtype, without=True))(jax.random.key(0))
    assert (arguments[7] < 0).sum() > 9
    whole = partial(lora_layer, keep=dtype == jnp.bfloat16)
    expected = jax.jit(whole)(*widened(arguments))
    own = partial(whole, backend=BACKENDS["pallas"])
    traced = str(jax.make_jaxpr(own)(*arguments))
    assert traced.count("name=grouped_lora_shrink") == 1
    assert "grouped_lora_expand" not in traced
    for out, want in zip(jax.jit(own)(*arguments), expected, strict=True):
        assert out.dtype == dtype
        assert_close(out, np.asarray(want), 3e-6 if dtype == jnp.float32 else 3e-2)


def test_sums_are_added_once_for_whoever_reads_arrays():
    arguments = problem(np.float32)
    begin: Any = partial(low_rank_sums, backend=BACKENDS["pallas"])

    def read(count: int) -> list:
        first, *others = begin(*arguments)
        return [as_array(x) for x in (first, *others, first.reshape(-1))[:count]]

    traced = [str(jax.make_jaxpr(partial(read, count))()) for count in (1, 4)]
    alone, every = (text.count("grouped_lora_expand") for text in traced)
    assert alone == every > 0
    *sums, flat = jax.jit(partial(read, 4))()
    for out, expected in zip(sums, token_by_token(*arguments), strict=True):
        assert_close(out, expected, TOLERANCE[np.float32])
    np.testing.assert_array_equal(flat, sums[0].reshape(-1))


@pytest.mark.parametrize("adapters", (ADAPTERS, 1))
def test_a_layer_of_a_stack_is_what_it_is_alone(grouped_lora, adapters):
    """Forward and backward; a factor that all layers share has a stack of one."""
    layers = [problem(np.float32, seed, adapters) for seed in range(3)]
    x, ys, *_, adapter = layers[0]
    a, b, scales = (
        tuple(np.stack(own) for own in zip(*(layer[i] for layer in layers), strict=True))
        for i in (2, 3, 4)
    )
    b = (b[0][:1], *b[1:])

    def run(a, b, scales, layer=None):
        sums, pull = jax.vjp(
            lambda a, b: grouped_lora(x, ys, a, b, scales, adapter, layer=layer), a, b
        )
        return sums, pull(sums)

    for layer in range(3):
        own_a, own_b, own_scales = (
            tuple(w[layer if len(w) > 1 else 0] for w in own) for own in (a, b, scales)
        )
        sums, gradients = run(a, b, scales, np.int32(layer))
        alone, expected = run(own_a, own_b, own_scales)
        jax.tree.map(np.testing.assert_array_equal, sums, alone)
        for stack, want in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
            at = layer if len(stack) > 1 else 0
            assert_close(stack[at], np.asarray(want), 1e-6)
            assert not np.delete(stack, at, axis=0).any()


def test_factors_may_be_more_precise_than_the_inputs(grouped_lora):
    """As finetuning keeps them: they are rounded to the inputs' dtype first."""
    x, ys, a, b, scales, adapter = problem(ml_dtypes.bfloat16)
    precise = [[w.astype(np.float32) * (1 + 2**-12) for w in factors] for factors in (a, b)]
    outs = grouped_lora(x, ys, *precise, scales, adapter)
    for out, same in zip(outs, grouped_lora(x, ys, a, b, scales, adapter), strict=True):
        assert out.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(out, same)


def test_tokens_without_an_adapter_keep_their_values(grouped_lora):
    """To the last bit, and whatever their inputs hold."""
    x, ys, a, b, scales, adapter = problem(np.float32)
    without = adapter < 0
    x[without] = np.nan
    for out, y in zip(grouped_lora(x, ys, a, b, scales, adapter), ys, strict=True):
        np.testing.assert_array_equal(np.asarray(out)[without], y[without])
    nobody = np.full(TOKENS, -1, np.int32)
    for out, y in zip(grouped_lora(x, ys, a, b, scales, nobody), ys, strict=True):
        np.testing.assert_array_equal(out, y)


def test_an_adapter_never_changes_what_another_gives(grouped_lora):
    """Bit for bit, whatever the other adapters and the other tokens are."""
    x, ys, a, b, scales, adapter = problem(np.float32)
    own = adapter == 1
    before = grouped_lora(x, ys, a, b, scales, adapter)
    other = np.arange(ADAPTERS) != 1
    x[~own] = 1e6
    for down, up, scale in zip(a, b, scales, strict=True):
        down[other], up[other], scale[other] = down[other] * 1e4, up[other] - 7, -1
    after = grouped_lora(x, ys, a, b, scales, np.where(own, 1, adapter[::-1]).astype(np.int32))
    for was, now in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.asarray(now)[own], np.asarray(was)[own])


@pytest.mark.parametrize("adapters", (ADAPTERS, 1))
def test_gradients_are_those_of_one_product_per_adapter(grouped_lora, adapters):
    x, ys, a, b, scales, adapter = problem(np.float32, adapters=adapters)
    rng = np.random.default_rng(1)
    d_outs = [rng.standard_normal((TOKENS, d)).astype(np.float32) for d in D_OUT]

    def one_by_one(x, ys, a, b):
        total = sum(jnp.vdot(y, d) for y, d in zip(ys, d_outs, strict=True))
        for i in range(adapters):
            own = np.flatnonzero(adapter == i)
            for down, up, scale, d in zip(a, b, scales, d_outs, strict=True):
                total += jnp.vdot(scale[i] * (x[own] @ down[i] @ up[i]), d[own])
        return total

    def grouped(x, ys, a, b):
        outs = grouped_lora(x, ys, a, b, scales, adapter)
        return sum(jnp.vdot(out, d) for out, d in zip(outs, d_outs, strict=True))

    expected = jax.jit(jax.grad(one_by_one, argnums=(0, 1, 2, 3)))(x, ys, a, b)
    actual = jax.jit(jax.grad(grouped, argnums=(0, 1, 2, 3)))(x, ys, a, b)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(got, np.asarray(want), 1e-5)


def test_an_adapter_without_tokens_has_no_gradient(grouped_lora):
    x, ys, a, b, scales, adapter = problem(np.float32)
    adapter[adapter == 2] = -1

    def loss(a, b):
        return sum(jnp.sum(out**2) for out in grouped_lora(x, ys, a, b, scales, adapter))

    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(a, b)):
        assert not np.asarray(gradient)[2].any()
        assert np.asarray(gradient)[[0, 1, 3]].any(axis=(1, 2)).all()


@pytest.mark.parametrize("block_rows", (1, 4, 16))
def test_blocks_hold_every_token_of_an_adapter_once_and_in_order(block_rows):
    num_adapters, num_tokens = 5, 37
    rng = np.random.default_rng(0)
    most_blocks = np.minimum(np.arange(num_tokens), num_adapters - 1)
    for adapter in (
        *(rng.integers(-1, num_adapters, num_tokens) for _ in range(5)),
        np.where(rng.random(num_tokens) < 0.5, 3, -1),
        np.zeros(num_tokens),
        np.full(num_tokens, -1),
        most_blocks,
    ):
        adapter = adapter.astype(np.int32)
        blocks = jax.jit(block_map, static_argnums=(1, 2))(adapter, num_adapters, block_rows)
        rows, places = np.asarray(blocks.tokens), np.asarray(blocks.place)
        expected = []
        for i in range(num_adapters):
            own = np.flatnonzero(adapter == i)
            expected += [(i, list(own[k : k + block_rows])) for k in range(0, len(own), block_rows)]
        empty = len(rows) - len(expected)
        expected += [(num_adapters, [])] * empty
        actual = [
            (i, [t for t in block if t < num_tokens])
            for i, block in zip(np.asarray(blocks.adapter), rows, strict=True)
        ]
        assert actual == expected
        taken = adapter >= 0
        np.testing.assert_array_equal(rows.reshape(-1)[places[taken]], np.flatnonzero(taken))
        assert (places[~taken] >= rows.size).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: np.dtype(dtype).name)
def test_a_job_adds_its_gradients_to_sums(name, dtype):
    """In one layer of several; what is summed already, and other layers, stay."""
    layers, layer = 3, np.int32(1)
    x, ys, a, b, scales, adapter = problem(dtype, adapters=layers)
    a, b = (tuple(w.astype(np.float32) for w in factors) for factors in (a, b))
    present = adapter >= 0
    rng = np.random.default_rng(1)
    d_ys = tuple(rng.standard_normal(y.shape).astype(np.float32).astype(dtype) for y in ys)
    sums = jax.tree.map(lambda w: rng.standard_normal(w.shape).astype(np.float32), (a, b))

    @jax.jit
    def run(x, ys, a, b, scales, layer, sums):
        add = partial(job_lora, backend=BACKENDS[name])
        out, pull = jax.vjp(
            lambda x, ys, sums: add(x, ys, a, b, scales, present, layer, sums), x, ys, sums
        )
        return out, pull(d_ys)

    out, (dx, d_y, added) = run(x, ys, a, b, scales, layer, sums)
    wide = [round_to(v, v.dtype) for v in (x, *ys, *d_ys)]
    x, ys, d_ys = wide[0], wide[1 : 1 + len(ys)], wide[1 + len(ys) :]
    want_dx = np.zeros(x.shape)
    for j, (y, d) in enumerate(zip(ys, d_ys, strict=True)):
        down, up, scale = (np.asarray(w[j][layer], np.float64) for w in (a, b, scales))
        s = present[:, None] * scale * (x @ down)
        d_s = present[:, None] * scale * (d @ up.T)
        want_dx += d_s @ down.T
        assert_close(out[j], y + s @ up, TOLERANCE[dtype])
        np.testing.assert_array_equal(np.asarray(d_y[j], np.float32), d)
        for total, before, own in (
            (added[0][j], sums[0][j], x.T @ d_s),
            (added[1][j], sums[1][j], s.T @ d),
        ):
            want = np.array(before, np.float64)
            want[layer] += own
            assert_close(total, want, TOLERANCE[dtype])
            np.testing.assert_array_equal(np.delete(total, layer, 0), np.delete(before, layer, 0))
    assert_close(dx, want_dx, TOLERANCE[dtype])


def test_a_job_reads_gated_activations_that_nobody_has_written():
    """As it reads their array, whose gradient is the same; one factor lies in a large array."""
    _, ys, a, b, scales, adapter = problem(np.float32)
    rng = np.random.default_rng(1)
    kept, up = (
        jnp.asarray(rng.standard_normal(shape), np.float32)
        for shape in ((TOKENS + 9, D_IN + 7), (TOKENS, D_IN))
    )
    present = adapter >= 0
    gate = Rows(kept, jnp.int32(4), jnp.asarray(present), (7, D_IN + 7))

    @partial(jax.jit, static_argnums=0)
    def run(read: bool):
        inner = jax.nn.silu(gate.read()) * up

        def add(inner, sums):
            x: Any = Recalled(inner, GatedRows(gate, up)) if read else inner
            return job_lora(x, ys, a, b, scales, present, 1, sums, BACKENDS["pallas"])

        out, pull = jax.vjp(add, jnp.nan * inner if read else inner, (a, b))
        return out, pull(ys)

    for one, other in zip(*(jax.tree.leaves(run(read)) for read in (True, False)), strict=True):
        assert_close(one, np.asarray(other), 1e-6)
