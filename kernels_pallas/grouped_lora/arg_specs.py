"""Grouped LoRA at the shapes of real models, and the tiles to choose from."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.cases import Case, ModelShape, model_shards
from kernels_pallas.grouped_lora import grouped_lora, job_lora, one_adapter
from kernels_pallas.grouped_lora.blocks import block_rows, blocks_of_all
from kernels_pallas.grouped_lora.layer_case import Projections, layer, make_layer
from kernels_pallas.grouped_lora.pallas_triton import padded_rank, tuning_key
from kernels_pallas.grouped_lora.passes import norm_key, pass_key


def groups(model: ModelShape) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Projections that read the same input: name -> (D, each E)."""
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "qkv": (model.d_model, (q, kv, kv)),
        "o": (q, (model.d_model,)),
        "gate_up": (model.d_model, (model.d_ff, model.d_ff)),
        "down": (model.d_ff, (model.d_model,)),
    }


def forward_and_backward(x, ys, a, b, scales, adapter, d_ys, totals, backend: Backend = XLA):
    """What a training step computes: the sums, the gradient of x, and those of a and b added to
    what there is."""

    def add(x, totals):
        return job_lora(x, ys, a, b, scales, adapter >= 0, jnp.int32(0), totals, backend)

    sums, pull = jax.vjp(add, x, totals)
    return sums, pull(d_ys)


def map_blocks(adapter, scales, backend: Backend = XLA):
    """What all calls of a step share, and each pays when it is timed alone."""
    return blocks_of_all(adapter, scales.shape[0])


def base_projection(case: Case) -> Case:
    """The product that a case adds to: what LoRA costs is the case's time over this one's."""
    x, ys, *_ = jax.eval_shape(case.make, jax.random.key(0))
    (tokens, d_in), d_out = x.shape, sum(y.shape[1] for y in ys)

    def make(key):
        x_key, w_key = jax.random.split(key)
        w = jax.random.normal(w_key, (d_in, d_out), x.dtype)
        return jax.random.normal(x_key, (tokens, d_in), x.dtype), d_in**-0.5 * w

    return Case(
        f"{case.name}/base",
        lambda x, w, backend=XLA: x @ w,
        make,
        flops=2.0 * tokens * d_in * d_out,
        bytes=float((tokens * (d_in + d_out) + d_in * d_out) * x.dtype.itemsize),
        bound="products" if tokens > 200 else "bandwidth",
    )


def _make(key, tokens, d_in, d_outs, adapters, rank, dtype, unused=False, job=False) -> tuple:
    """Tokens of all adapters in turn; `unused` gives every fourth token none, and NaN as input. A
    job keeps its factors and the sums of gradients in float32."""
    keys = iter(jax.random.split(key, 1 + 4 * len(d_outs)))

    def normal(*shape: int, scale: float = 1.0):
        return scale * jax.random.normal(next(keys), shape, dtype)

    x = normal(tokens, d_in)
    ys = tuple(normal(tokens, d) for d in d_outs)
    a = tuple(normal(adapters, d_in, rank, scale=d_in**-0.5) for _ in d_outs)
    b = tuple(normal(adapters, rank, d, scale=rank**-0.5) for d in d_outs)
    scales = tuple(jnp.linspace(0.5, 2, adapters, dtype=jnp.float32) for _ in d_outs)
    adapter = jnp.arange(tokens, dtype=jnp.int32) % adapters
    if unused:
        without = jnp.arange(tokens) % 4 == 3
        x = jnp.where(without[:, None], jnp.nan, x)
        adapter = jnp.where(without, -1, adapter)
    if not job:
        return x, ys, a, b, scales, adapter
    a, b = jax.tree.map(lambda w: w.astype(jnp.float32), (a, b))
    d_ys = tuple(normal(tokens, d) for d in d_outs)
    return x, ys, a, b, scales, adapter, d_ys, jax.tree.map(jnp.ones_like, (a, b))


def _layer_case(
    name: str,
    model: ModelShape,
    tokens: int,
    adapters: int,
    rank: int = 16,
    dtype: Any = jnp.bfloat16,
    apart: bool = False,
) -> Case:
    own = groups(model)
    factors = sum(rank * (d_in + d) for d_in, d_outs in own.values() for d in d_outs)
    # Attention's output, the residual and every product's once; the residual, what the products
    # read, and what is rotated and written.
    rows = tokens * (4 * model.d_model + model.d_ff + 2 * sum(sum(d) for _, d in own.values()))
    sizes = (own, tokens, adapters, rank, model.head_dim, dtype)
    return Case(
        name,
        partial(layer, apart=apart),
        lambda key: make_layer(key, *sizes),
        flops=2.0 * tokens * factors,
        bytes=float((adapters * factors + rows) * jnp.dtype(dtype).itemsize),
        bound="bandwidth",
        donated=(11, 12),
    )


def _case(
    name: str,
    group: tuple[int, tuple[int, ...]],
    tokens: int,
    adapters: int,
    rank: int = 16,
    dtype: Any = jnp.bfloat16,
    unused: bool = False,
    backward: bool = False,
) -> Case:
    d_in, d_outs = group
    factors = sum(rank * (d_in + d_out) for d_out in d_outs)
    rows = tokens * (d_in + 2 * sum(d_outs))
    values = adapters * factors + rows
    if backward:  # reads x, d_ys and the factors, writes dx and the factors' gradients
        values += 2 * adapters * factors + tokens * (2 * d_in + sum(d_outs))
    shapes = (tokens, d_in, d_outs, adapters, rank, dtype, unused, backward)
    return Case(
        name,
        forward_and_backward if backward else grouped_lora,
        lambda key: _make(key, *shapes),
        # Backward computes s again, d_s, dx, da and db.
        flops=2.0 * tokens * factors * (3.5 if backward else 1),
        bytes=float(values * jnp.dtype(dtype).itemsize),
        bound="bandwidth",
        donated=(1, 7) if backward else (1,),
    )


def _map_case(tokens: int, adapters: int) -> Case:
    return Case(
        f"block-map/{tokens}-of-{adapters}",
        map_blocks,
        lambda key: (jax.random.randint(key, (tokens,), -1, adapters), jnp.ones(adapters)),
        flops=0.0,
        bytes=3.0 * 4 * tokens,
        bound="bandwidth",
    )


def _cases() -> Iterator[Case]:
    yield _map_case(256, 64)
    yield _map_case(4096, 4)
    for model in model_shards():
        for name, group in groups(model).items():
            case = partial(_case, group=group)
            where = f"{model.name}/{name}"
            yield case(f"{where}/decode-256-of-64", tokens=256, adapters=64)
            yield case(f"{where}/decode-8-of-8", tokens=8, adapters=8)
            yield case(f"{where}/prefill-4096-of-4", tokens=4096, adapters=4)
            yield case(f"{where}/train-1024-backward", tokens=1024, adapters=1, backward=True)
        yield _layer_case(f"{model.name}/layer-256-of-64", model, tokens=256, adapters=64)
    model = next(model_shards())
    for tokens, adapters in ((64, 4), (64, 16), (2048, 4)):
        for apart in (False, True):
            name = f"{model.name}/layer-{tokens}-of-{adapters}{'/apart' * apart}"
            yield _layer_case(name, model, tokens, adapters, apart=apart)
    yield _layer_case(f"{model.name}/layer-2048-of-64", model, 2048, 64)
    yield _layer_case(f"{model.name}/layer-256-of-64/rank64", model, 256, 64, rank=64)
    odd = ModelShape("odd", 896, 14, 2, 80, 4864)
    yield _layer_case("odd/layer-333-of-3/float32", odd, 333, 3, rank=8, dtype=jnp.float32)
    for name in ("qkv", "down"):
        for tokens, adapters, where in (
            (256, 64, f"{model.name}/{name}/decode-256-of-64"),
            (2048, 64, f"{model.name}/{name}/mixed-2048-of-64"),
            (4096, 4, f"{model.name}/{name}/prefill-4096-of-4"),
        ):
            case = partial(_case, group=groups(model)[name], tokens=tokens, adapters=adapters)
            for rank in (8, 64, 128):
                yield case(f"{where}/rank{rank}", rank=rank, unused=True)
            yield case(f"{where}/float32", dtype=jnp.float32, unused=True)
        train = partial(_case, group=groups(model)[name], tokens=1024, adapters=1, backward=True)
        for rank in (8, 64, 128):
            yield train(f"{model.name}/{name}/train-1024-backward/rank{rank}", rank=rank)
        yield train(f"{model.name}/{name}/train-1024-backward/float32", dtype=jnp.float32)


CASES = tuple(_cases())
DRY_RUN_CASES = (
    _case("tiny/decode-8-of-3", (64, (32, 16)), tokens=8, adapters=3, rank=8),
    _case("tiny/train-20-backward", (64, (32, 16)), tokens=20, adapters=1, rank=8, backward=True),
)


def tuning_keys(case: Case) -> tuple[str, ...]:
    """The entries of the tuning table that a case uses: of shrink and of expand, if any."""
    if case.function is map_blocks:
        return ()
    if isinstance(case.function, partial):
        return () if case.function.keywords["apart"] else _keys_of_layer(case)
    x, _, a, *_ = jax.eval_shape(case.make, jax.random.key(0))
    num_adapters = a[0].shape[0]
    if case.function is forward_and_backward:
        columns = one_adapter.Columns.of(a)
        kernels = {
            "shrink": columns.width,
            "gradients": columns.width,
            "expand": columns.ranks[0],  # forward
        }
        own = [one_adapter.tuning_key(name, width, x.dtype) for name, width in kernels.items()]
        wide = one_adapter.tuning_key("expand", columns.width, x.dtype)  # backward
        return tuple(dict.fromkeys([*own, wide]))
    rows = block_rows(x.shape[0], num_adapters)
    ranks = [padded_rank(down.shape[2]) for down in a]
    return (
        tuning_key("shrink", rows, sum(ranks), x.dtype),
        tuning_key("expand", rows, max(ranks), x.dtype),
    )


def _keys_of_layer(case: Case) -> tuple[str, ...]:
    """Those of a layer's passes."""
    attended, x, o, gate_up, down, qkv, *_, cos, _, _, _, _ = jax.eval_shape(
        case.make, jax.random.key(0)
    )
    rows = block_rows(x.shape[0], o.a[0].shape[1])

    def rank(*own: Projections) -> int:
        return max(padded_rank(a.shape[3]) for projections in own for a in projections.a)

    keys = [
        tuning_key("shrink", rows, rank(o), attended.dtype),
        pass_key("gated", rows, rank(gate_up, down), x.dtype),
        pass_key("add", rows, rank(o, gate_up), x.dtype),
        pass_key("add", rows, rank(down, qkv), x.dtype),
        pass_key("rotate", rows, cos.shape[-1], x.dtype),
        norm_key(x.shape[1], x.dtype),
    ]
    return tuple(dict.fromkeys(keys))


def adds_to_a_product(case: Case) -> bool:
    """Whether the case has one base product to compare it with."""
    return case.function in (grouped_lora, forward_and_backward)


def candidates(key: str) -> Iterator[dict[str, int]]:
    """Tiles worth timing for a key of the tuning table."""
    if key.startswith("job-"):
        for rows in (32, 64, 128):
            for columns in (32, 64, 128, 256):
                for num_warps, num_stages in ((4, 1), (4, 3), (8, 3)):
                    own = {"rows": rows, "columns": columns}
                    yield own | {"num_warps": num_warps, "num_stages": num_stages}
    elif key.startswith("shrink"):
        for columns in (32, 64, 128, 256):
            for programs in (132, 264, 528, 1056):
                for num_warps, num_stages in ((2, 4), (4, 3), (4, 5), (8, 4)):
                    yield {
                        "columns": columns,
                        "programs": programs,
                        "num_warps": num_warps,
                        "num_stages": num_stages,
                    }
    elif key.startswith("norm"):
        for num_warps in (2, 4, 8, 16):
            yield {"num_warps": num_warps, "num_stages": 1}
    elif key.startswith("rotate"):
        for heads in (1, 2, 4):
            for num_warps in (2, 4, 8):
                yield {"heads": heads, "num_warps": num_warps, "num_stages": 1}
    else:
        split = key.startswith(("gated", "add"))
        of_pass = [{"programs": n} for n in (264, 528, 1056)] if split else [{}]
        for columns in (64, 128, 256, 512):
            for own in of_pass:
                for num_warps in (2, 4, 8):
                    yield own | {"columns": columns, "num_warps": num_warps, "num_stages": 1}
