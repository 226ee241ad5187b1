"""The attention backward, slice by slice, against jax.vjp of dense attention over all tokens."""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.attention_backward import attention_backward, attention_of_slice
from kernels_pallas.attention_backward.arg_specs import CASES as MODEL_CASES
from kernels_pallas.attention_backward.pallas_mosaic import is_supported
from kernels_pallas.attention_backward.prepare import prepare
from kernels_pallas.attention_backward.visible import Blocks
from kernels_pallas.backend import MOSAIC_INTERPRETER, XLA, Backend
from kernels_pallas.layer_options import FULL, AttentionOptions
from tests.kernels.paged import PagePool

# Every implementation of the contract.
BACKENDS = {"xla": XLA, "pallas": Backend("pallas", interpret=True)}
MOSAIC = Backend("pallas", interpret=True, mosaic=True)

LENGTHS = (130, 1, 64, 63, 170, 2)  # packed; some begin and end at a slice's edge, some inside
# The same with two prompts and what goes on from them: an answer's sequence, its prompt's.
GROUPED_LENGTHS = (50, 37, 100, 5, 66, 33, 70, 41, 28)
PROMPTS = {2: 1, 3: 1, 4: 1, 7: 6, 8: 6}
TOKENS = sum(LENGTHS)  # the rest of the slots is padding
SLOTS = 448  # of the microbatch; a multiple of every unit


@dataclass(frozen=True)
class Shape:
    """Page size, query heads, kv heads, head dimension and dtype of a model."""

    page_size: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: type
    tolerance: float
    sinks: bool = False
    grouped: bool = False


SHAPES = {
    "page16-gqa4-h64-float32": Shape(16, 4, 1, 64, np.float32, 2e-5),
    "page16-gqa4-h64-float32-grouped": Shape(16, 4, 1, 64, np.float32, 2e-5, grouped=True),
    "page32-gqa7-h80-bfloat16": Shape(32, 14, 2, 80, ml_dtypes.bfloat16, 3e-2, grouped=True),
    "page16-gqa3-h64-bfloat16": Shape(16, 6, 2, 64, ml_dtypes.bfloat16, 2e-2, grouped=True),
    "page64-gqa2-h128-bfloat16": Shape(64, 4, 2, 128, ml_dtypes.bfloat16, 2e-2, grouped=True),
    "page128-gqa1-h16-float32": Shape(128, 2, 2, 16, np.float32, 2e-5, grouped=True),
    "page64-gqa2-h512-float32": Shape(64, 2, 1, 512, np.float32, 2e-5),
    "page16-gqa4-h64-float32-sinks": Shape(16, 4, 1, 64, np.float32, 2e-5, sinks=True),
}
CASES = [
    ("page16-gqa4-h64-float32", 64, FULL),
    ("page16-gqa4-h64-float32-grouped", 7, FULL),
    ("page128-gqa1-h16-float32", 1, FULL),
    ("page32-gqa7-h80-bfloat16", 64, FULL),
    ("page16-gqa4-h64-float32", 64, AttentionOptions(window=21)),
    # Of more queries than the reference takes at once.
    ("page16-gqa4-h64-float32-grouped", 224, AttentionOptions(window=100, scale=0.2)),
    ("page16-gqa4-h64-float32-grouped", 7, AttentionOptions(window=2)),
    ("page128-gqa1-h16-float32", 64, AttentionOptions(window=65, soft_cap=1.5, scale=0.3)),
    ("page32-gqa7-h80-bfloat16", 64, AttentionOptions(soft_cap=2.0)),
    ("page64-gqa2-h512-float32", 64, AttentionOptions(window=65, soft_cap=1.5)),
    ("page16-gqa4-h64-float32-sinks", 64, FULL),
    ("page16-gqa4-h64-float32-sinks", 7, AttentionOptions(window=21, soft_cap=1.5)),
]


# Of Mosaic's kernels, in one and in two warpgroups: slots of the microbatch, tokens of a slice.
MOSAIC_CASES = [
    ("page16-gqa3-h64-bfloat16", 448, 64, FULL),
    ("page64-gqa2-h128-bfloat16", 512, 128, AttentionOptions(window=100, scale=0.2)),
]


@dataclass(frozen=True)
class Problem:
    """A microbatch in the contract's arrays, and the gradients it has."""

    per_token: dict  # q, out, lse, d_out, sequence_starts: [SLOTS, ...]
    shared: np.ndarray  # [2, SLOTS]
    k_pages: np.ndarray
    v_pages: np.ndarray
    kv_slots: np.ndarray
    gradients: dict  # dq, dk, dv [TOKENS, ...]
    sinks: np.ndarray | None = None


def layout(shape: Shape) -> tuple[tuple[int, ...], dict[int, int]]:
    """The sequences' lengths, and which of them go on from which."""
    return (GROUPED_LENGTHS, PROMPTS) if shape.grouped else (LENGTHS, {})


def sequences_of(shape: Shape) -> list[list[int]]:
    """Each sequence's tokens, those that it goes on from first."""
    lengths, prompts = layout(shape)
    ends = np.cumsum(lengths)
    own = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True)]
    return [(own[prompts[i]] if i in prompts else []) + tokens for i, tokens in enumerate(own)]


def visible_pairs(sequences: list[list[int]], window: int | None) -> np.ndarray:
    """[query, key]: which keys a query sees, of sequences of tokens that may share their first."""
    visible = np.zeros((TOKENS, TOKENS), bool)
    for sequence in sequences:
        for i, token in enumerate(sequence):
            visible[token, sequence[max(0, i + 1 - (window or TOKENS)) : i + 1]] = True
    return visible


def dense_attention(q, k, v, visible, sinks, options):
    """(output, log-sum-exp) of packed causal attention; float32, one score for every pair. A sink
    is a score more in each row of its head, for a value of zeros."""
    group = q.shape[1] // k.shape[1]
    k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
    scores = jnp.einsum("qnh,knh->nqk", q, k) * (options.scale or 1 / np.sqrt(q.shape[-1]))
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    scores = jnp.where(visible, scores, -jnp.inf)
    everywhere = scores
    if sinks is not None:
        more = jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))
        everywhere = jnp.concatenate([scores, more], axis=-1)
    lse = jax.nn.logsumexp(everywhere, axis=-1)
    return jnp.einsum("nqk,knh->qnh", jnp.exp(scores - lse[..., None]), v), lse.T


@partial(jax.jit, static_argnames="options")
def dense_gradients(q, k, v, d_out, visible, sinks, options):
    """Output, log-sum-exp, and the gradients of q, k and v."""
    (out, lse), pull = jax.vjp(lambda *qkv: dense_attention(*qkv, visible, sinks, options), q, k, v)
    return out, lse, pull((d_out, jnp.zeros_like(lse)))


@cache
def problem(name: str, options: AttentionOptions = FULL, slots: int = SLOTS) -> Problem:
    """A random microbatch whose padding, in the arrays and in the pages, is NaN."""
    shape, rng = SHAPES[name], np.random.default_rng(0)

    def normal(heads):
        return rng.standard_normal((TOKENS, heads, shape.head_dim)).astype(shape.dtype)

    q, d_out, k, v = (normal(n) for n in [shape.heads] * 2 + [shape.kv_heads] * 2)
    lengths, prompts = layout(shape)
    ends = np.cumsum(lengths)
    firsts = ends - lengths
    starts = np.repeat(firsts, lengths).astype(np.int32)
    shared = np.stack([firsts, firsts])
    for answer, prompt in prompts.items():
        shared[:, answer] = firsts[prompt], ends[prompt]
    shared = np.repeat(shared, lengths, axis=1).astype(np.int32)
    visible = visible_pairs(sequences_of(shape), options.window)
    exact = [x.astype(np.float32) for x in (q, k, v)]
    sinks = np.linspace(-4, 5, shape.heads, dtype=np.float32) if shape.sinks else None
    out, lse, gradients = dense_gradients(*exact, d_out.astype(np.float32), visible, sinks, options)

    pool = PagePool(64, shape.page_size, shape.kv_heads, shape.head_dim, shape.dtype, rng)
    kv_slots = np.zeros(slots, np.int32)
    for first, length in zip(firsts, lengths, strict=True):
        own = slice(first, first + length)
        table = np.asarray(pool.write(k[own], v[own]), np.int32)
        offsets = np.arange(length)
        page = table[offsets // shape.page_size]
        kv_slots[own] = page * shape.page_size + offsets % shape.page_size
    # Padding's keys are in a slot that nothing has written.
    never_written = np.isnan(pool.k.astype(np.float32)).all(axis=(2, 3)).reshape(-1)
    kv_slots[TOKENS:] = np.flatnonzero(never_written)[0]

    def padded(x, fill=np.nan):
        rows = np.full((slots - TOKENS, *x.shape[1:]), fill)
        return np.concatenate([np.asarray(x), rows.astype(x.dtype)])

    per_token = {
        "q": padded(q),
        "out": padded(np.asarray(out).astype(shape.dtype)),
        "lse": padded(np.asarray(lse)),
        "d_out": padded(d_out),
        "sequence_starts": padded(starts, slots),
    }
    names = ("dq", "dk", "dv")
    gradients = dict(zip(names, map(np.asarray, gradients), strict=True))
    shared = padded(shared.T, slots).T
    return Problem(per_token, shared, pool.k, pool.v, kv_slots, gradients, sinks)


@pytest.fixture(params=BACKENDS)
def backward(request):
    """An implementation, compiled once for all tests of a shape."""
    return lambda *arguments, options=FULL: _compiled(request.param, options)(*arguments)


@cache
def _compiled(name: str, options: AttentionOptions):
    backend = MOSAIC if name == "mosaic" else BACKENDS[name]
    function = partial(attention_backward, options=options, backend=backend)
    return jax.jit(function, donate_argnums=(10, 11))


def run_slice(backward, problem: Problem, start: int, unit_tokens: int, dk, dv, options=FULL):
    rows = {name: x[start : start + unit_tokens] for name, x in problem.per_token.items()}
    return backward(
        rows["q"],
        problem.k_pages,
        problem.v_pages,
        problem.kv_slots,
        rows["sequence_starts"],
        problem.shared[:, start : start + unit_tokens],
        np.int32(start),
        rows["out"],
        rows["lse"],
        rows["d_out"],
        dk,
        dv,
        options=options,
    )


def zeros(shape: Shape, slots: int = SLOTS):
    return jnp.zeros((slots, shape.kv_heads, shape.head_dim), jnp.float32)


def assert_close(actual, desired, tolerance):
    """Equal to within a fraction of the largest value: sums of many terms lose digits where they
    cancel."""
    scale = np.abs(desired).max()
    np.testing.assert_allclose(
        np.asarray(actual, np.float32), desired, rtol=0, atol=tolerance * scale
    )


@pytest.mark.parametrize(("name", "unit_tokens", "options"), CASES)
def test_slices_in_reverse_order_add_up_to_the_whole_gradient(backward, name, unit_tokens, options):
    check_slices(backward, name, SLOTS, unit_tokens, options)


@pytest.mark.skipif(
    jax.__version_info__ < MOSAIC_INTERPRETER, reason="this JAX cannot interpret Mosaic's kernels"
)
@pytest.mark.parametrize(("name", "slots", "unit_tokens", "options"), MOSAIC_CASES)
def test_slices_add_up_in_the_kernels_of_hopper(name, slots, unit_tokens, options):
    whole = problem(name, options, slots)
    q = whole.per_token["q"][:unit_tokens]
    assert is_supported(q, whole.k_pages, whole.kv_slots, options)
    backward = lambda *arguments, options: _compiled("mosaic", options)(*arguments)  # noqa: E731
    check_slices(backward, name, slots, unit_tokens, options)
    # What they cannot take is Triton's: other rows, heads, dtypes, and a soft cap.
    capped = AttentionOptions(soft_cap=2.0)
    others = [(q[:7], whole.k_pages, options), (q[..., :32], whole.k_pages, options)]
    others += [(q, whole.k_pages.astype(np.float32), options), (q, whole.k_pages, capped)]
    for q, k_pages, options in others:
        assert not is_supported(q, k_pages, whole.kv_slots, options)


def test_what_is_timed_as_mosaic_is_mosaic():
    """Else Triton's kernels would be compared with themselves."""
    cases = [case for case in MODEL_CASES if case.name.endswith("/mosaic")]
    assert len(cases) > 3
    for case in cases:
        q, k_pages, _, kv_slots, *_ = jax.eval_shape(case.make, jax.random.key(0))
        assert is_supported(q, k_pages, kv_slots, FULL), case.name
        assert {"h200", "a100"} - {*case.chips} == {"a100"}


def check_slices(backward, name, slots, unit_tokens, options):
    shape, whole = SHAPES[name], problem(name, options, slots)
    dk, dv = zeros(shape, slots), zeros(shape, slots)
    dq = np.zeros((slots, shape.heads, shape.head_dim), np.float32)
    done = {"dk": np.zeros(dk.shape, np.float32), "dv": np.zeros(dv.shape, np.float32)}
    for start in reversed(range(0, slots, unit_tokens)):
        rows = slice(start, start + unit_tokens)
        dq_rows, dk, dv = run_slice(backward, whole, start, unit_tokens, dk, dv, options)
        assert dq_rows.dtype == shape.dtype
        dq[rows] = dq_rows
        # A slice's own keys are complete as soon as it is done: nothing earlier reads them.
        done["dk"][rows], done["dv"][rows] = dk[rows], dv[rows]

    assert_close(dq[:TOKENS], whole.gradients["dq"], shape.tolerance)
    for key, total in (("dk", dk), ("dv", dv)):
        assert_close(done[key][:TOKENS], whole.gradients[key], shape.tolerance)
        np.testing.assert_array_equal(done[key], np.asarray(total))
        assert not done[key][TOKENS:].any()
    assert not dq[TOKENS:].any()


def test_a_window_adds_to_what_the_accumulators_hold(backward):
    name, unit_tokens, start = "page16-gqa4-h64-float32", 64, 128
    shape, whole = SHAPES[name], problem(name)
    rng = np.random.default_rng(1)
    before = rng.standard_normal((2, SLOTS, shape.kv_heads, shape.head_dim)).astype(np.float32)
    _, *share = run_slice(backward, whole, start, unit_tokens, zeros(shape), zeros(shape))
    _, *after = run_slice(backward, whole, start, unit_tokens, *map(jnp.asarray, before))
    np.testing.assert_allclose(np.stack(after), before + np.stack(share), rtol=0, atol=1e-5)
    # Queries 128..192 see the sequences 0..130, 130, 131..195: keys from 192 on are untouched.
    np.testing.assert_array_equal(np.stack(after)[:, 192:], before[:, 192:])


def test_a_window_of_padding_changes_nothing(backward):
    name, unit_tokens = "page16-gqa4-h64-float32", 64
    shape, whole = SHAPES[name], problem(name)
    padding = {
        name: np.roll(x, unit_tokens - SLOTS + TOKENS, 0) for name, x in whole.per_token.items()
    }
    padding["sequence_starts"][:] = SLOTS
    ones = jnp.ones((SLOTS, shape.kv_heads, shape.head_dim), jnp.float32)
    shared = np.full((2, SLOTS), SLOTS, np.int32)
    nothing = Problem(padding, shared, whole.k_pages, whole.v_pages, whole.kv_slots, {})
    dq, dk, dv = run_slice(backward, nothing, SLOTS - unit_tokens, unit_tokens, ones, ones + 0)
    assert not np.asarray(dq).any()
    assert (np.asarray(dk) == 1).all()
    assert (np.asarray(dv) == 1).all()


def test_rows_that_no_query_sees_are_left_alone(backward):
    """Queries 200..206 see keys 195..206; the same call twice gives the same bits."""
    name, unit_tokens, start = "page16-gqa4-h64-float32", 7, 200
    shape, whole = SHAPES[name], problem(name)
    seen = (np.arange(SLOTS) >= 195) & (np.arange(SLOTS) < 207)
    before = np.where(seen[:, None, None], np.asarray(zeros(shape)), np.nan).astype(np.float32)
    first, second = (
        np.stack(
            run_slice(backward, whole, start, unit_tokens, *map(jnp.asarray, [before] * 2))[1:]
        )
        for _ in range(2)
    )
    assert np.isnan(first[:, ~seen]).all()
    assert np.isfinite(first[:, seen]).all()
    np.testing.assert_array_equal(first, second)


def test_what_lies_between_a_prompt_and_its_answer_costs_nothing(backward):
    """Queries 192..256 are one answer's: its prompt is 50..87, others' answers lie between. A sum
    with anything, zeros too, would take the sign off the zeros there."""
    name, unit_tokens, start = "page16-gqa4-h64-float32-grouped", 64, 192
    shape, whole = SHAPES[name], problem(name)
    shares = run_slice(backward, whole, start, unit_tokens, -zeros(shape), -zeros(shape))[1:]
    for share in map(np.asarray, shares):
        assert np.signbit(share[128:192]).all()
        assert (share[[50, 86, 192, 255]] != 0).any(axis=(1, 2)).all()


def test_blocks_that_kernels_walk():
    """Of these sequences exactly the blocks of keys of which a block of queries sees some, each
    once; without masks exactly those of which every query sees all. And the other way round."""
    name, size = "page16-gqa4-h64-float32-grouped", 16
    whole = problem(name)
    rows, tile = whole.per_token, {"queries": size, "keys": size}
    ranges, _ = prepare(
        *(jnp.int32(0), rows["sequence_starts"], whole.shared),
        *(rows[key] for key in ("q", "d_out", "out", "lse")),
        *(SLOTS, tile, tile, FULL),
        interpret=True,
    )
    blocks = SLOTS // size
    pairs = np.zeros((SLOTS, SLOTS), bool)
    pairs[:TOKENS, :TOKENS] = visible_pairs(sequences_of(SHAPES[name]), None)
    pairs = pairs.reshape(blocks, size, blocks, size)
    tables = ((ranges.seen, pairs), (ranges.seeing, pairs.transpose(2, 3, 0, 1)))
    for table, sees in tables:
        walked, full = (np.zeros((blocks, blocks), int) for _ in range(2))
        for i in range(blocks):
            program = Blocks.load(table, i)
            for nth in range(int(program.size)):
                block = int(program.block(nth))
                walked[i, block] += 1
                full[i, block] = program.is_full(block)
        np.testing.assert_array_equal(walked, sees.any(axis=(1, 3)))
        np.testing.assert_array_equal(full, sees.all(axis=(1, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "unit_tokens", "options"), CASES)
def test_the_forward_of_a_slice(backend, name, unit_tokens, options):
    """Output and log-sum-exp are those of dense attention, and zeros in padding."""
    shape, whole = SHAPES[name], problem(name, options)
    given = {"options": options, "backend": BACKENDS[backend], "sinks": whole.sinks}
    forward = jax.jit(partial(attention_of_slice, **given))
    starts = range(0, SLOTS, unit_tokens)
    for start in starts[:: max(1, len(starts) // 8)]:
        rows = {key: x[start : start + unit_tokens] for key, x in whole.per_token.items()}
        pages = (whole.k_pages, whole.v_pages, whole.kv_slots)
        shared = whole.shared[:, start : start + unit_tokens]
        out, lse = forward(rows["q"], *pages, rows["sequence_starts"], shared, np.int32(start))
        assert out.dtype == shape.dtype
        tokens = max(0, min(unit_tokens, TOKENS - start))
        for ours, expected in ((out, rows["out"]), (lse, rows["lse"])):
            ours, expected = np.asarray(ours, np.float32), np.asarray(expected, np.float32)
            if tokens:
                assert_close(ours[:tokens], expected[:tokens], shape.tolerance)
            assert not ours[tokens:].any()
