"""Ragged paged attention at the shapes of real models, and the tiles to choose from."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.cases import Case, ModelShape, model_shards
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.ragged_paged_attention import ragged_paged_attention
from kernels_pallas.ragged_paged_attention.pallas_triton import tuning_key

PAGE_SIZE = 64


def attention_case(
    name: str,
    model: ModelShape,
    sequences: Sequence[tuple[int, int]],
    *,
    page_size: int = PAGE_SIZE,
    dtype: Any = jnp.bfloat16,
    stored: Any = None,
    target: float = 0.0,
    options: AttentionOptions = FULL,
) -> Case:
    """A call for sequences of (keys, queries), those with one query first.

    Pages lie in random order, and those of no sequence, queries of none and keys past a sequence's
    end hold NaN. `stored`: an 8-bit dtype of the pages.
    """
    heads, kv_heads, head_dim = model.num_heads, model.num_kv_heads, model.head_dim
    stored = stored or dtype
    num_pages = [-(-keys // page_size) for keys, _ in sequences]
    spare = 4
    used = sum(num_pages)
    order = np.random.default_rng(0).permutation(used + spare)
    tables = np.zeros((len(sequences), max(num_pages)), np.int32)
    exists = np.zeros((used + spare, page_size), bool)
    at = 0
    for s, ((keys, _), count) in enumerate(zip(sequences, num_pages, strict=True)):
        tables[s, :count] = order[at : at + count]
        exists[tables[s, :count]] = np.arange(count * page_size).reshape(count, -1) < keys
        at += count
    queries = [count for _, count in sequences]
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    tokens = int(starts[-1])
    lengths = np.array([keys for keys, _ in sequences], np.int32)
    num_decode = sum(count == 1 for count in queries)
    pairs = sum(
        min(options.window or keys, keys - i) for keys, count in sequences for i in range(count)
    )
    eight_bits = jnp.dtype(stored).itemsize == 1

    def make(key: jax.Array) -> tuple:
        q_key, k_key, v_key = jax.random.split(key, 3)
        q = jax.random.normal(q_key, (tokens, heads, head_dim), dtype)
        shape = (used + spare, page_size, kv_heads, head_dim)
        pages = []
        for page_key in (k_key, v_key):
            values = jax.random.normal(page_key, shape, dtype)
            values = (32 * values).astype(stored) if eight_bits else values
            pages.append(
                values if eight_bits else jnp.where(exists[..., None, None], values, jnp.nan)
            )
        counts = jnp.int32(num_decode), jnp.int32(len(sequences))
        arguments = (q, *pages, jnp.asarray(starts), jnp.asarray(lengths), jnp.asarray(tables))
        scales = (jnp.full((used + spare, kv_heads), 1 / 32, jnp.float32),) * 2
        return (*arguments, *counts, *(scales if eight_bits else ()))

    def call(*arguments: jax.Array, **keywords: Any):
        scales = dict(zip(("k_scales", "v_scales"), arguments[8:], strict=False))
        return ragged_paged_attention(*arguments[:8], **scales, options=options, **keywords)

    keys_read = sum(min(options.window or keys, keys) for keys, _ in sequences)
    size = jnp.dtype(dtype).itemsize
    return Case(
        f"{model.name}/{name}",
        call,
        make,
        flops=4.0 * pairs * heads * head_dim,
        bytes=2.0 * keys_read * kv_heads * head_dim * jnp.dtype(stored).itemsize
        + 2.0 * tokens * heads * head_dim * size,
        bound="bandwidth" if num_decode == len(sequences) else "products",
        target=target,
        tolerance=2e-2 if jnp.dtype(dtype) == jnp.bfloat16 else 1e-4,
        chips=("h200",) if stored == jnp.float8_e4m3fn else ("h200", "a100"),
    )


def _cases() -> Iterator[Case]:
    decode = [(2048, 1)] * 64
    for model in model_shards():
        yield attention_case("decode-64x2048", model, decode, target=0.75)
        yield attention_case("decode-8x8192", model, [(8192, 1)] * 8)
        yield attention_case("prefill-8192", model, [(8192, 8192)], target=0.5)
        yield attention_case("chunk-512-of-4608", model, [(4608, 512)])
        yield attention_case("chunk-1024-of-8192", model, [(8192, 1024)], target=0.5)
        yield attention_case("mixed-64-448", model, [*decode, (448, 448)])
    model = next(model_shards())
    mixed = [*[(1000, 1)] * 7, (500, 500), (1300, 33)]
    for page_size in (16, 32, 128):
        yield attention_case(f"mixed/page{page_size}", model, mixed, page_size=page_size)
    yield attention_case("mixed/float32", model, mixed, dtype=jnp.float32)
    yield attention_case("mixed/sliding-window", model, mixed, options=AttentionOptions(window=256))
    yield attention_case("mixed/soft-cap", model, mixed, options=AttentionOptions(soft_cap=30.0))
    for stored in (jnp.int8, jnp.float8_e4m3fn):
        name = jnp.dtype(stored).name
        yield attention_case(f"decode-64x2048/{name}", model, decode, stored=stored)
        yield attention_case(f"mixed/{name}", model, mixed, stored=stored)
    sizes = ((32, 32, 64), (32, 8, 80), (28, 4, 96), (16, 8, 256), (32, 4, 512))
    for heads, kv_heads, head_dim in sizes:
        shape = ModelShape(
            f"heads{heads}-{kv_heads}-h{head_dim}", 4096, heads, kv_heads, head_dim, 1
        )
        yield attention_case("mixed", shape, mixed)
        yield attention_case("mixed/float32", shape, mixed, dtype=jnp.float32)
    gemma2 = ModelShape("heads16-8-h256", 3584, 16, 8, 256, 1)
    both = AttentionOptions(window=256, soft_cap=50.0)
    yield attention_case("mixed/window-and-cap", gemma2, mixed, options=both)


CASES = tuple(_cases())
_TINY = ModelShape("tiny", 64, 4, 2, 16, 128)
DRY_RUN_CASES = (
    attention_case("decode-3x40", _TINY, [(40, 1)] * 3, page_size=16, dtype=jnp.float32),
    attention_case("mixed", _TINY, [(9, 1), (20, 20), (40, 7)], page_size=16),
)


def tuning_keys(case: Case) -> tuple[str, ...]:
    """The entries of the tuning table that decide a case's time."""
    q, pages, *_ = jax.eval_shape(case.make, jax.random.key(0))
    kernel = "decode" if case.bound == "bandwidth" else "chunks"
    return (tuning_key(kernel, q.shape[2], pages.dtype),)


def candidates(key: str) -> Iterator[dict[str, int]]:
    """Tiles worth timing for a key of the tuning table."""
    if key.startswith("decode"):
        for keys in (32, 64, 128):
            for split_keys in (256, 512, 1024):
                for num_warps, num_stages in ((2, 3), (4, 2), (4, 3), (4, 4), (8, 3)):
                    yield {
                        "keys": keys,
                        "split_keys": split_keys,
                        "num_warps": num_warps,
                        "num_stages": num_stages,
                    }
    else:
        for rows in (64, 128):
            for keys in (32, 64, 128):
                for num_warps, num_stages in ((4, 2), (4, 3), (8, 2), (8, 3), (8, 4)):
                    yield {
                        "rows": rows,
                        "keys": keys,
                        "num_warps": num_warps,
                        "num_stages": num_stages,
                    }
