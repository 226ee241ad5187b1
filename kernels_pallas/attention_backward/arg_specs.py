"""The attention backward at the shapes of real models, and the tiles to choose from."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.attention_backward import attention_backward, attention_of_slice
from kernels_pallas.attention_backward.pallas_triton import mosaic_key, tuning_key
from kernels_pallas.backend import Backend
from kernels_pallas.cases import Case, ModelShape, model_shards
from kernels_pallas.layer_options import FULL, AttentionOptions

# Sequences of a few hundred tokens that fill a microbatch of 4096 up to some padding.
PACKED = (700, 200, 450, 310, 620, 90, 540, 380, 260, 480)
# A prompt and six answers to it.
GROUP = (512, 580, 610, 545, 600, 570, 590)
# Heads in groups of a power of two, and of five.
_MOSAIC, _MOSAIC_MODELS = "/mosaic", ("llama-3.1-8b/tp1", "qwen2.5-14b/tp1")


class _Slice(NamedTuple):
    """What a slice's tokens see, without padding: their rows, their sequences' starts, and how many
    keys of the `shared` ones ahead of it and of their own."""

    token: np.ndarray
    starts: np.ndarray
    shared: int
    before: np.ndarray
    own: np.ndarray

    @classmethod
    def of(cls, lengths, start: int, unit_tokens: int, grouped: bool, options: AttentionOptions):
        """Of packed sequences; `grouped`: all go on from the first."""
        token = np.arange(start, min(start + unit_tokens, sum(lengths)))
        starts = np.repeat(np.cumsum((0, *lengths[:-1])), lengths)[token]
        shared = lengths[0] if grouped else 0
        most = options.window or sum(lengths)
        own = np.minimum(token + 1 - starts, most)
        before = np.where(starts > 0, np.minimum(most - own, shared), 0)
        return cls(token, starts, shared, before, own)

    @property
    def keys(self) -> int:
        """How many keys some query sees."""
        read = np.zeros(self.token[-1] + 1, bool)
        read[min(self.token + 1 - self.own) :] = True
        read[self.shared - max(self.before) : self.shared] = True
        return int(read.sum())

    def contract(self, unit_tokens: int, slots: int) -> tuple[jax.Array, jax.Array]:
        """sequence_starts and shared, with padding."""
        starts, shared = np.full(unit_tokens, slots), np.full((2, unit_tokens), slots)
        starts[: len(self.token)] = self.starts
        goes_on = (self.starts > 0) & (self.shared > 0)
        first, end = (np.where(goes_on, n, self.starts) for n in (0, self.shared))
        shared[:, : len(self.token)] = first, end
        return jnp.asarray(starts, jnp.int32), jnp.asarray(shared, jnp.int32)


def _make(
    key, model: ModelShape, tokens: int, rows_of: _Slice, slots, unit_tokens, page_size, dtype
) -> tuple:
    """One slice of a microbatch whose pages lie in the pool in a random order, among as many that
    are not its own and hold NaN, as padding does."""
    keys = iter(jax.random.split(key, 7))
    start = int(rows_of.token[0])
    padding = jnp.arange(start, start + unit_tokens) >= tokens
    own = -(-slots // page_size)
    pages = jax.random.permutation(next(keys), 2 * own)[:own]
    offset = jnp.arange(slots)
    kv_slots = (pages[offset // page_size] * page_size + offset % page_size).astype(jnp.int32)

    def pool():
        shape = (slots, model.num_kv_heads, model.head_dim)
        values = jax.random.normal(next(keys), shape, dtype)
        values = jnp.where(offset[:, None, None] < tokens, values, jnp.nan)
        all_slots = jnp.full((2 * own * page_size, *shape[1:]), jnp.nan, dtype)
        return all_slots.at[kv_slots].set(values).reshape(2 * own, page_size, *shape[1:])

    def rows(*shape: int, dtype=dtype):
        values = jax.random.normal(next(keys), (unit_tokens, model.num_heads, *shape), dtype)
        return jnp.where(padding.reshape(-1, *[1] * (values.ndim - 1)), jnp.nan, values)

    k_pages, v_pages, q, out, d_out = pool(), pool(), *(rows(model.head_dim) for _ in range(3))
    # About the log-sum-exp of that many random scores, so that the weights sum to about 1.
    seen = np.ones(unit_tokens)
    seen[: len(rows_of.token)] = rows_of.own + rows_of.before
    lse = rows(dtype=jnp.float32) * 0.1 + np.log(seen)[:, None] + 0.5
    accumulator = jnp.zeros((slots, model.num_kv_heads, model.head_dim), jnp.float32)
    return (
        q,
        k_pages,
        v_pages,
        kv_slots,
        *rows_of.contract(unit_tokens, slots),
        jnp.int32(start),
        out,
        lse.astype(jnp.float32),
        d_out,
        accumulator,
        accumulator + 0,
    )


def _case(
    name: str,
    model: ModelShape,
    lengths: tuple[int, ...],
    slots: int,
    unit_tokens: int,
    start: int,
    page_size: int = 64,
    dtype=jnp.bfloat16,
    target: float = 0.0,
    options: AttentionOptions = FULL,
    grouped: bool = False,
) -> Case:
    rows = _Slice.of(lengths, start, unit_tokens, grouped, options)
    pairs = int(np.sum(rows.own + rows.before)) * model.num_heads
    item = jnp.dtype(dtype).itemsize
    keys_read = rows.keys * model.num_kv_heads
    # q, out, d_out and dq; the log-sum-exp; k, v and both accumulators, read and written.
    values = len(rows.token) * model.num_heads * (4 * model.head_dim * item + 4)
    values += keys_read * model.head_dim * (2 * item + 4 * 4)
    return Case(
        name,
        partial(attention_backward, options=options),
        lambda key: _make(key, model, sum(lengths), rows, slots, unit_tokens, page_size, dtype),
        flops=5.0 * 2 * pairs * model.head_dim,
        bytes=float(values),
        bound="products",
        donated=(10, 11),
        target=target,
    )


def _again(case: Case, options: AttentionOptions = FULL) -> Case:
    """The attention that the backward of a case belongs to, computed again: two of its five
    products; it reads q, keys and values and writes the output."""
    return replace(
        case,
        name=f"{case.name}/again",
        function=partial(attention_of_slice, options=options),
        make=lambda key: case.make(key)[:7],
        flops=case.flops * 2 / 5,
        bytes=case.bytes / 2,
        donated=(),
        target=0.0,
    )


def _on_mosaic(case: Case) -> Case:
    """The same by Mosaic's kernels, to be seen beside Triton's."""

    def function(*arguments, backend: Backend):
        return case.function(*arguments, backend=replace(backend, mosaic=True))

    return replace(case, name=f"{case.name}{_MOSAIC}", function=function, chips=("h200",))


def _cases() -> Iterator[Case]:
    for model in model_shards():
        last = partial(
            _case, model=model, lengths=(8192,), slots=8192, unit_tokens=1024, start=7168
        )
        yield last(f"{model.name}/last-1024-of-8192", target=0.4)
        if model.name in _MOSAIC_MODELS:
            yield _on_mosaic(last(f"{model.name}/last-1024-of-8192", target=0.4))
        yield _again(last(f"{model.name}/last-1024-of-8192"))
        packed = partial(_case, model=model, lengths=PACKED, slots=4096, unit_tokens=512)
        yield packed(f"{model.name}/packed-512-of-4096", start=2048)
        if model.name in _MOSAIC_MODELS:
            yield _on_mosaic(packed(f"{model.name}/packed-512-of-4096", start=2048))
    model = next(model_shards())
    extra = partial(_case, lengths=PACKED, slots=4096, unit_tokens=512, start=3584)
    others = {h: ModelShape(model.name, 0, 16, 4, h, 0) for h in (64, 80, 96, 256, 512)}
    for head_dim, other in others.items():
        yield extra(f"{model.name}/packed-512-of-4096/h{head_dim}", model=other)
    yield _on_mosaic(extra(f"{model.name}/packed-512-of-4096/h64", model=others[64]))
    yield _again(extra(f"{model.name}/packed-512-of-4096/h512", model=others[512]))
    for name, shape, options in (
        ("window", model, AttentionOptions(window=256)),
        ("h256/window-and-cap", others[256], AttentionOptions(window=256, soft_cap=50.0)),
    ):
        case = extra(f"{model.name}/packed-512-of-4096/{name}", model=shape, options=options)
        yield case
        yield _again(case, options)
        if options.soft_cap is None:
            yield _on_mosaic(case)
    grouped = partial(_case, model=model, lengths=GROUP, slots=4096, unit_tokens=512, grouped=True)
    case = grouped(f"{model.name}/grouped-512-of-4096", start=3072)
    yield case
    yield _on_mosaic(case)
    yield _again(case)
    yield extra(f"{model.name}/packed-512-of-4096/float32", model=model, dtype=jnp.float32)
    yield extra(f"{model.name}/packed-512-of-4096/page16", model=model, page_size=16)
    odd = partial(_case, model=model, lengths=(1000, 77), slots=1099, page_size=128)
    yield odd(f"{model.name}/odd-333-of-1099", unit_tokens=333, start=766)


CASES = tuple(_cases())
DRY_RUN_CASES = (
    _case(
        "tiny/last-20-of-50",
        model=ModelShape("tiny", 64, 4, 2, 16, 128),
        lengths=(33, 17),
        slots=50,
        unit_tokens=20,
        start=30,
        page_size=16,
    ),
)


def tuning_keys(case: Case) -> tuple[str, ...]:
    """The entries of the tuning table that a case uses: of dq and of dkv; the forward takes dq's
    tiles, and has none of its own."""
    if not case.donated:  # the forward
        return ()
    q = jax.eval_shape(case.make, jax.random.key(0))[0]
    key = mosaic_key if case.name.endswith(_MOSAIC) else tuning_key
    dq, dkv = (key(kernel, q.shape[2], q.dtype) for kernel in ("dq", "dkv"))
    return dq, dkv


def candidates(key: str) -> Iterator[dict[str, int]]:
    """Tiles worth timing for a key of the tuning table; some do not fit every chip."""
    if key.startswith("mosaic"):
        walked = "keys" if "/dq/" in key else "queries"
        for rows, stages in product((64, 128), (2, 3, 4)):
            yield {walked: rows, "stages": stages}
        return
    programs = (264, 512, 1024) if key.startswith("dq") else (0,)
    for queries, keys, warps, stages, count in product(
        (16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3), programs
    ):
        tile = {"queries": queries, "keys": keys, "num_warps": warps, "num_stages": stages}
        yield tile | ({"programs": count} if count else {})
