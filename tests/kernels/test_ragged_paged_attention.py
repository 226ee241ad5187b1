"""Ragged paged attention against softmax attention written out query by query in float64."""

from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.layer_options import FULL, AttentionOptions
from kernels_pallas.ragged_paged_attention import pallas_triton, ragged_paged_attention
from tests.kernels.paged import PagePool, round_to

BACKENDS = {"xla": XLA, "pallas": Backend("pallas", interpret=True)}

TOKENS, SEQUENCES, LONGEST = 160, 12, 400


@dataclass(frozen=True)
class Shape:
    """Page size, query heads, kv heads, head dimension and dtype of a model."""

    page_size: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: type
    tolerance: float
    tokens: int = TOKENS


SHAPES = [
    Shape(16, 8, 2, 64, np.float32, 1e-5),
    Shape(32, 4, 4, 80, np.float32, 1e-5),
    Shape(128, 7, 1, 16, np.float32, 1e-5),
    Shape(128, 14, 2, 80, ml_dtypes.bfloat16, 2e-2),
    Shape(16, 8, 2, 64, np.float32, 1e-5, tokens=20),
    Shape(64, 10, 2, 96, ml_dtypes.bfloat16, 2e-2, tokens=70),
    Shape(16, 2, 1, 256, np.float32, 1e-5, tokens=70),
]


def label(shape: Shape) -> str:
    group = shape.heads // shape.kv_heads
    dtype = np.dtype(shape.dtype).name
    return f"page{shape.page_size}-gqa{group}-h{shape.head_dim}-{dtype}-t{shape.tokens}"


@dataclass(frozen=True)
class Sequence:
    """A sequence of a batch: its keys and values up to its last query, and its queries."""

    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    shared_tokens: int = 0  # it begins like the first sequence of the batch


class Batches:
    """Makes batches of one shape, as arguments of the contract."""

    def __init__(self, shape: Shape, seed: int):
        self.shape, self.rng = shape, np.random.default_rng(seed)

    def sequence(self, length: int, queries: int, like: Sequence | None = None, shared: int = 0):
        """A random sequence of `length` tokens whose last `queries` are asked for."""

        def normal(count, heads):
            x = self.rng.standard_normal((count, heads, self.shape.head_dim))
            return x.astype(self.shape.dtype)

        keys, values = normal(length, self.shape.kv_heads), normal(length, self.shape.kv_heads)
        if like is not None:
            keys[:shared], values[:shared] = like.keys[:shared], like.values[:shared]
        return Sequence(keys, values, normal(queries, self.shape.heads), shared)

    def random(self) -> tuple[list[Sequence], int]:
        """Decoding sequences, then chunks that continue or begin a sequence; some slots empty.

        Some share their first pages, some end exactly at a page's end, and padding is left.
        """
        page, rng = self.shape.page_size, self.rng
        decodes = [self.sequence(int(rng.integers(1, LONGEST)), 1) for _ in range(rng.integers(6))]
        chunks, left = [], self.shape.tokens - len(decodes) - 1
        while left > 0 and len(decodes) + len(chunks) < SEQUENCES - 1:
            count = int(min(rng.choice([0, 1, 31, 32, 33, int(rng.integers(1, 90))]), left))
            before = int(rng.choice([0, page, int(rng.integers(LONGEST - 90))]))
            chunks.append(self.sequence(before + count, count))
            left -= count
        sequences = decodes + chunks
        for i, sequence in enumerate(sequences[1:], 1):
            before = len(sequence.keys) - len(sequence.queries)
            shared = min(before, len(sequences[0].keys)) // page * page
            if shared and rng.random() < 0.5:
                sequences[i] = self.sequence(
                    len(sequence.keys), len(sequence.queries), sequences[0], shared
                )
        return sequences, len(decodes)

    def arguments(self, sequences: list[Sequence], num_decode: int) -> list:
        """The contract's arguments. Whatever it calls ignored is as wrong as can be."""
        shape, rng = self.shape, self.rng
        pages = -(-LONGEST // shape.page_size)
        pool = PagePool(
            SEQUENCES * pages + 1, shape.page_size, shape.kv_heads, shape.head_dim, shape.dtype, rng
        )
        q = np.full((shape.tokens, shape.heads, shape.head_dim), np.nan).astype(shape.dtype)
        starts = np.zeros(SEQUENCES + 1, np.int32)
        lengths = rng.integers(0, LONGEST, SEQUENCES).astype(np.int32)
        tables = np.full((SEQUENCES, pages), 2**30, np.int32)
        at = 0
        for s, sequence in enumerate(sequences):
            shared = sequence.shared_tokens // shape.page_size
            first = tuple(tables[0, :shared])
            table = pool.write(sequence.keys, sequence.values, first)
            tables[s, : len(table)], lengths[s] = table, len(sequence.keys)
            q[at : at + len(sequence.queries)] = sequence.queries
            at += len(sequence.queries)
            starts[s + 1 :] = at
        counts = np.int32(num_decode), np.int32(len(sequences))
        return [q, pool.k, pool.v, starts, lengths, tables, *counts]


def expected(
    sequence: Sequence, options: AttentionOptions = FULL, sinks: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Output [queries, N, H] and log-sum-exp [queries, N] of a sequence's queries."""
    keys, values, queries = (
        round_to(x, x.dtype) for x in (sequence.keys, sequence.values, sequence.queries)
    )
    count, heads, head_dim = queries.shape
    group = heads // keys.shape[1]
    out, lse = np.zeros(queries.shape), np.zeros((count, heads))
    for i in range(count):
        end = len(keys) - count + i + 1
        visible = slice(max(0, end - (options.window or end)), end)
        for head in range(heads):
            scores = keys[visible, head // group] @ queries[i, head]
            scores = scores * (options.scale or head_dim**-0.5)
            if options.soft_cap is not None:
                scores = options.soft_cap * np.tanh(scores / options.soft_cap)
            largest = scores.max()
            weights = np.exp(scores - largest)
            total = weights.sum()
            if sinks is not None:
                total += np.exp(sinks[head] - largest)
            lse[i, head] = largest + np.log(total)
            out[i, head] = weights / total @ values[visible, head // group]
    return out, lse


@pytest.fixture(params=BACKENDS)
def attend(request):
    """An implementation, compiled once for all tests of a shape; returns float32 arrays."""

    def run(arguments, scales=(None, None), sinks=None, **options):
        compiled = _compiled(request.param, tuple(options.items()))
        outputs = compiled(*arguments, k_scales=scales[0], v_scales=scales[1], sinks=sinks)
        return [np.asarray(x, np.float32) for x in outputs]

    return run


@cache
def _compiled(name: str, options: tuple):
    return jax.jit(partial(ragged_paged_attention, backend=BACKENDS[name], **dict(options)))


def check(attend, batches: Batches, sequences: list[Sequence], num_decode: int, **options):
    out, lse = attend(batches.arguments(sequences, num_decode), **options)
    tolerance, at = batches.shape.tolerance, 0
    for sequence in sequences:
        rows = slice(at, at + len(sequence.queries))
        want_out, want_lse = expected(sequence, **options)
        np.testing.assert_allclose(out[rows], want_out, rtol=tolerance, atol=tolerance)
        # The log-sum-exp accumulates in float32 whatever the dtype of the keys.
        np.testing.assert_allclose(lse[rows], want_lse, rtol=1e-5, atol=1e-5)
        at = rows.stop
    assert not out[at:].any()
    assert not lse[at:].any()


@pytest.mark.parametrize("shape", SHAPES, ids=label)
def test_random_batches(attend, shape):
    for seed in range(8):
        batches = Batches(shape, seed)
        check(attend, batches, *batches.random())


def test_a_program_for_every_block(monkeypatch):
    """As large batches have them: without the loop over blocks that small ones have."""
    monkeypatch.setattr(pallas_triton, "_FEW_TOKENS", 0)
    attend = jax.jit(partial(ragged_paged_attention, backend=BACKENDS["pallas"]))

    def run(arguments):
        return [np.asarray(x, np.float32) for x in attend(*arguments)]

    for seed in range(3):
        batches = Batches(SHAPES[0], seed)
        check(run, batches, *batches.random())


@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(window=1),
        AttentionOptions(window=50),
        AttentionOptions(window=20, soft_cap=2.0, scale=0.3),
    ],
    ids=str,
)
def test_windows_soft_caps_and_scales(attend, options):
    for seed in range(3):
        batches = Batches(SHAPES[0], seed)
        check(attend, batches, *batches.random(), options=options)


def test_heads_of_512(attend):
    options = AttentionOptions(window=20, soft_cap=2.0, scale=0.3)
    batches = Batches(Shape(64, 8, 1, 512, np.float32, 1e-5, tokens=40), 0)
    sequences = [batches.sequence(length, 1) for length in (300, 7)]
    sequences.append(batches.sequence(90, 33))
    check(attend, batches, sequences, 2, options=options)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (SHAPES[0], FULL),
        (SHAPES[3], AttentionOptions(window=20, soft_cap=2.0, scale=0.3)),
    ],
    ids=["float32", "bfloat16-window-and-cap"],
)
def test_sinks(attend, shape, options):
    """Some below all scores, and some far above them."""
    for seed in range(2):
        batches = Batches(shape, seed)
        sinks = batches.rng.uniform(-30, 9, shape.heads).astype(shape.dtype)
        given = {"options": options, "sinks": sinks.astype(np.float32)}
        check(attend, batches, *batches.random(), **given)


@pytest.mark.parametrize("stored", [np.int8, ml_dtypes.float8_e4m3fn], ids=lambda d: d.__name__)
def test_pages_of_eight_bits(attend, stored):
    """Against the same batch with what the pages hold multiplied out."""
    batches = Batches(SHAPES[0], 11)
    q, k, v, *tables = batches.arguments(*batches.random())
    rng = np.random.default_rng(0)
    pages, scales, plain = [], [], []
    for values in (k, v):
        scale = rng.uniform(0.01, 0.05, (values.shape[0], values.shape[2])).astype(np.float32)
        scaled = np.nan_to_num(values) / scale[:, None, :, None]
        kept = np.clip(np.round(scaled) if stored is np.int8 else scaled, -127, 127).astype(stored)
        unused = np.isnan(values).all(axis=(1, 3))  # pages that no sequence has
        scales.append(np.where(unused, np.nan, scale).astype(np.float32))
        pages.append(kept)
        plain.append(kept.astype(np.float32) * scale[:, None, :, None])
    out, lse = attend([q, *pages, *tables], scales)
    want_out, want_lse = attend([q, *plain, *tables])
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, want_out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES[:1], ids=label)
class TestBatchesOfOneKind:
    def test_nothing_but_padding(self, attend, shape):
        check(attend, Batches(shape, 0), [], 0)

    def test_decode_alone_in_every_slot(self, attend, shape):
        batches = Batches(shape, 1)
        sequences = [batches.sequence(length, 1) for length in range(1, 34, 3)]
        sequences.append(batches.sequence(LONGEST, 1))
        assert len(sequences) == SEQUENCES
        check(attend, batches, sequences, SEQUENCES)

    def test_one_prompt_fills_the_step(self, attend, shape):
        batches = Batches(shape, 2)
        check(attend, batches, [batches.sequence(TOKENS, TOKENS)], 0)

    def test_slots_without_queries_anywhere(self, attend, shape):
        batches = Batches(shape, 3)
        lengths = [(5, 0), (40, 1), (40, 0), (70, 70), (0, 0), (64, 33), (9, 0)]
        check(attend, batches, [batches.sequence(*pair) for pair in lengths], 0)

    def test_a_single_token_prompt_is_no_decode(self, attend, shape):
        batches = Batches(shape, 4)
        check(attend, batches, [batches.sequence(1, 1), batches.sequence(50, 1)], 0)


@pytest.mark.parametrize("num_decode", [0, 1], ids=["chunk", "decode"])
def test_a_step_of_one_token(attend, num_decode):
    batches = Batches(replace(SHAPES[0], tokens=1), 0)
    check(attend, batches, [batches.sequence(37, 1)], num_decode)


def test_a_step_of_one_token_behind_an_empty_slot(attend):
    batches = Batches(replace(SHAPES[0], tokens=1), 1)
    check(attend, batches, [batches.sequence(20, 0), batches.sequence(37, 1)], 0)


@pytest.mark.parametrize("shape", SHAPES[2:4], ids=label)
def test_a_sequence_gets_the_same_bits_whatever_else_is_in_the_batch(attend, shape):
    """Co-serving and batching do not change what a tenant sees."""
    batches = Batches(shape, 5)
    decode, chunk = batches.sequence(150, 1), batches.sequence(190, 45)
    alone, alone_lse = attend(batches.arguments([decode, chunk], 1))
    others = [batches.sequence(length, 1) for length in (1, 399, 64)]
    more = [batches.sequence(90, 33), batches.sequence(300, 60)]
    crowd = [*others, decode, more[0], chunk, more[1]]
    crowded, crowded_lse = attend(batches.arguments(crowd, 4))
    for rows, crowd_rows in (
        (slice(0, 1), slice(3, 4)),
        (slice(1, 46), slice(37, 82)),
    ):
        np.testing.assert_array_equal(alone[rows], crowded[crowd_rows])
        np.testing.assert_array_equal(alone_lse[rows], crowded_lse[crowd_rows])
