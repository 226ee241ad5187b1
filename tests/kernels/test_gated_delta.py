"""The gated delta rule and its convolution against loops over tokens in float64, and against
transformers' own."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.backend import XLA, Backend
from kernels_pallas.gated_delta import (
    causal_conv,
    conv_window,
    delta_rule,
    delta_window,
    delta_window_backward,
)
from tests.kernels.paged import round_to

BACKENDS = {"xla": XLA, "pallas": Backend("pallas", interpret=True)}
KEY_HEADS, VALUE_HEADS, DK, DV = 2, 4, 16, 32
NOWHERE = 1000


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


@cache
def compiled(function, backend, **static):
    """A function, compiled once for all tests of a shape."""
    return jax.jit(partial(function, backend=backend, **static))


def token_inputs(tokens: int, dtype=np.float32, kind: str = "usual", seed: int = 0):
    """q, k, v, log_decay, beta of so many tokens. equal: all keys are the same and beta is 1, where
    powers of the chunk's matrix are huge. strong: decays down to e^-20."""
    rng = np.random.default_rng(seed)
    q, k = rng.standard_normal((2, tokens, KEY_HEADS, DK))
    v = rng.standard_normal((tokens, VALUE_HEADS, DV))
    beta = rng.uniform(0, 1, (tokens, VALUE_HEADS))
    log_decay = -rng.exponential(0.1, (tokens, VALUE_HEADS))
    if kind == "equal":
        k[:], beta[:], log_decay[:] = k[0], 1, -1e-3
    if kind == "strong":
        log_decay = rng.uniform(-20, 0, log_decay.shape)
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    small = [(x).astype(np.float32).astype(dtype) for x in (q * DK**-0.5, k, v)]
    return [*small, log_decay.astype(np.float32), beta.astype(np.float32)]


def exact(*arrays):
    return [round_to(array, array.dtype) for array in arrays]


def token_by_token(state, q, k, v, log_decay, beta):
    """Outputs of one sequence from a state, and the states before each token and after the last."""
    states, out = [state], []
    group = v.shape[1] // k.shape[1]
    for t in range(len(v)):
        keys, queries = np.repeat(k[t], group, axis=0), np.repeat(q[t], group, axis=0)
        state = state * np.exp(log_decay[t])[:, None, None]
        u = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", state, keys))
        state = state + keys[:, :, None] * u[:, None, :]
        out.append(np.einsum("hkv,hk->hv", state, queries))
        states.append(state)
    return np.array(out).reshape(-1, *v.shape[1:]), states


def assert_close(actual, desired, tolerance):
    """To within a fraction of the largest value."""
    scale = max(0.1, np.abs(desired).max(initial=0))
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), desired, rtol=0, atol=tolerance * scale
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "unit_tokens", "tolerance"),
    (
        *[("usual", np.float32, unit, 2e-6) for unit in (1, 5, 64)],
        ("equal", np.float32, 64, 2e-5),
        ("strong", np.float32, 64, 5e-5),
        ("usual", ml_dtypes.bfloat16, 64, 2e-2),
    ),
)
def test_a_step_of_every_kind_of_sequence(backend, kind, dtype, unit_tokens, tolerance):
    """Decode rows, chunks, and training sequences that start and end anywhere in a microbatch."""
    rng = np.random.default_rng(1)
    num_decode, lengths = 3, (1, 1, 1, 70, 1, 130, 33, 2, 90)
    trained_at = {5: 11, 7: 141, 8: 143}  # sequence: its first row's place in the microbatch
    fresh = np.array([0, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0], bool)
    slots, sequences, padding = 12, len(fresh), 9
    read = rng.permutation(slots)[:sequences].astype(np.int32)
    write = read.copy()
    write[[2, 6]] = NOWHERE  # not written
    write[3] = np.setdiff1d(np.arange(slots), read)[0]  # goes on in another slot
    starts = np.full(sequences + 1, sum(lengths), np.int32)
    starts[: len(lengths)] = np.cumsum((0, *lengths[:-1]))
    used, tokens = sum(lengths), sum(lengths) + padding
    microbatch = -(-240 // unit_tokens)
    places = np.full(tokens, NOWHERE * 10, np.int32)
    for s, place in trained_at.items():
        places[starts[s] : starts[s + 1]] = place + np.arange(lengths[s])
    inputs = token_inputs(tokens, dtype, kind)
    for array in inputs:
        array[used:] = np.nan
    state = rng.standard_normal((slots, VALUE_HEADS, DK, DV)).astype(np.float32)
    state[read[fresh]] = np.nan
    windows = rng.standard_normal((microbatch, VALUE_HEADS, DK, DV)).astype(np.float32)

    run = compiled(delta_rule, backend, unit_tokens=unit_tokens)
    out, new_state, new_windows = run(
        *inputs, state, starts, fresh, read, write, num_decode, len(lengths), places, windows
    )

    want_state, want_windows = state.copy(), windows.copy()
    for s in range(len(lengths)):
        own = slice(starts[s], starts[s + 1])
        before = np.zeros(state.shape[1:]) if fresh[s] else state[read[s]].astype(np.float64)
        o, states = token_by_token(before, *exact(*(x[own] for x in inputs)))
        assert_close(out[own].astype(np.float32), o, tolerance)
        if write[s] < slots:
            want_state[write[s]] = states[-1]
        for i, place in enumerate(places[own]):
            begins = place < NOWHERE and place % unit_tokens == 0
            if begins and not (fresh[s] and i == 0):
                want_windows[place // unit_tokens] = states[i]
    untouched = np.isnan(want_state)
    np.testing.assert_array_equal(np.isnan(new_state), untouched)
    if backend == XLA:  # whose products are of float32 whatever the dtype
        tolerance = min(tolerance, 2e-5)
    assert_close(np.nan_to_num(new_state), np.nan_to_num(want_state), tolerance)
    assert_close(new_windows, want_windows, tolerance)


def test_a_step_without_training(backend):
    """More decoding sequences than a block holds, and none of them."""
    rng = np.random.default_rng(2)
    inputs = token_inputs(40)
    state = rng.standard_normal((20, VALUE_HEADS, DK, DV)).astype(np.float32)
    order = rng.permutation(20).astype(np.int32)
    places = np.full(40, NOWHERE, np.int32)
    run = compiled(delta_rule, backend, unit_tokens=16)
    fresh = np.zeros(20, bool)
    for num_decode, lengths in ((18, [1] * 18), (0, [37])):
        starts = np.cumsum([0, *lengths, *[0] * (20 - len(lengths))]).astype(np.int32)
        out, new_state, windows = run(
            *inputs, state, starts, fresh, order, order, num_decode, len(lengths), places, None
        )
        assert windows is None
        want = state.astype(np.float64)
        for s in range(len(lengths)):
            own = slice(starts[s], starts[s + 1])
            o, states = token_by_token(want[order[s]], *exact(*(x[own] for x in inputs)))
            want[order[s]] = states[-1]
            assert_close(out[own], o, 2e-6)
        assert_close(new_state, want, 2e-6)


TOKENS, PADDING = 203, 9  # the last of which are padding
FIRSTS = (0, 3, 66, 67, 140)  # of the packed sequences
NAMES = ("q", "k", "v", "log_decay", "beta")


def packed(kind: str, dtype):
    """Packed sequences: what their windows take of each row; padding is NaN."""
    rows: dict[str, np.ndarray] = {}
    rows.update(zip(NAMES, token_inputs(TOKENS, dtype, kind), strict=True))
    rng = np.random.default_rng(3)
    rows["d_out"] = rng.standard_normal((TOKENS, VALUE_HEADS, DV)).astype(dtype)
    for array in rows.values():
        array[TOKENS - PADDING :] = np.nan
    rows["first"] = np.isin(np.arange(TOKENS), FIRSTS)
    rows["is_token"] = np.arange(TOKENS) < TOKENS - PADDING
    return rows


def windows_of(rows: dict[str, np.ndarray], unit_tokens: int):
    """The rows of each window; after the last there is more padding."""
    short = -TOKENS % unit_tokens
    padded = {
        name: np.concatenate([x, np.full((short, *x.shape[1:]), np.nan).astype(x.dtype)])
        if x.dtype != bool
        else np.pad(x, (0, short))
        for name, x in rows.items()
    }
    for start in range(0, TOKENS, unit_tokens):
        yield {name: x[start : start + unit_tokens] for name, x in padded.items()}


@cache
def whole_sequences(kind: str, dtype):
    """Outputs and gradients, in float64, of a loop over all tokens."""
    rows = packed(kind, dtype)
    q, k, v, log_decay, beta, d_out = (
        np.nan_to_num(round_to(rows[name], rows[name].dtype)) for name in (*NAMES, "d_out")
    )
    group = VALUE_HEADS // KEY_HEADS

    def step(state, row):
        q, k, v, g, b, first = row
        q, k = (jnp.repeat(x, group, axis=0) for x in (q, k))
        state = jnp.where(first, 0, state) * jnp.exp(g)[:, None, None]
        u = b[:, None] * (v - jnp.einsum("hkv,hk->hv", state, k))
        state = state + k[:, :, None] * u[:, None, :]
        return state, jnp.einsum("hkv,hk->hv", state, q)

    def run(*inputs):
        return jax.lax.scan(step, jnp.zeros((VALUE_HEADS, DK, DV)), (*inputs, rows["first"]))[1]

    with jax.enable_x64(True):
        out, pull = jax.vjp(run, *map(jnp.asarray, (q, k, v, log_decay, beta)))
        return np.asarray(out), dict(zip(NAMES, map(np.asarray, pull(d_out)), strict=True))


@pytest.mark.parametrize(
    ("kind", "dtype", "unit_tokens", "tolerance"),
    (
        *[("usual", np.float32, unit, 1e-5) for unit in (1, 5, 64, TOKENS)],
        ("equal", np.float32, 64, 2e-4),
        ("strong", np.float32, 64, 5e-5),
        ("usual", ml_dtypes.bfloat16, 64, 2e-2),
    ),
)
def test_windows_add_up_to_the_whole_sequences(backend, kind, dtype, unit_tokens, tolerance):
    """Outputs, and, with the gradient of the state carried from the last window to the first, all
    gradients, whatever the windows."""
    rows = packed(kind, dtype)
    exact_out, exact_gradients = whole_sequences(kind, dtype)
    forward = compiled(delta_window, backend)
    backward = compiled(delta_window_backward, backend)
    state = np.full((VALUE_HEADS, DK, DV), np.nan, np.float32)
    out, saved, windows = [], [], list(windows_of(rows, unit_tokens))
    for window in windows:
        window["state"] = state
        o, state = forward(*(window[name] for name in (*NAMES, "first", "is_token", "state")))
        out.append(o)
    d_state = np.zeros(state.shape, np.float32)
    order = (*NAMES, "first", "is_token", "state", "d_out")
    for window in reversed(windows):
        *gradients, d_state = backward(*(window[name] for name in order), d_state)
        saved.append(gradients)
        if window["first"][0]:
            assert not np.asarray(d_state).any()
    out = np.concatenate(out)[:TOKENS]
    assert out.dtype == dtype
    assert_close(out, exact_out, min(tolerance, 2e-2))
    assert not out[TOKENS - PADDING :].any()
    for name, *parts in zip(NAMES, *reversed(saved), strict=True):
        ours = np.concatenate(parts)[:TOKENS]
        assert ours.dtype == rows[name].dtype
        assert not ours[TOKENS - PADDING :].any()
        assert_close(ours, exact_gradients[name], tolerance)


def test_gradients_by_finite_differences(backend):
    """Of one window with a state before it and a gradient of the state after it."""
    tokens, rng = 64, np.random.default_rng(4)
    inputs = token_inputs(tokens)
    state, d_state, direction = rng.standard_normal((3, VALUE_HEADS, DK, DV))
    d_out = rng.standard_normal((tokens, VALUE_HEADS, DV))
    moves = [rng.standard_normal(x.shape) for x in inputs] + [direction]
    at = [*exact(*inputs), state]

    def value(step):
        *rows, before = (x + step * move for x, move in zip(at, moves, strict=True))
        out, states = token_by_token(before, *rows)
        return (out * d_out).sum() + (states[-1] * d_state).sum()

    want = (value(1e-5) - value(-1e-5)) / 2e-5
    first, is_token = np.zeros(tokens, bool), np.ones(tokens, bool)
    narrow = [x.astype(np.float32) for x in (state, d_out, d_state)]
    gradients = compiled(delta_window_backward, backend)(*inputs, first, is_token, *narrow)
    got = sum(
        (np.asarray(d, np.float64) * move).sum() for d, move in zip(gradients, moves, strict=True)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_padding_window_hands_the_state_and_its_gradient_on(backend):
    rng = np.random.default_rng(5)
    inputs = [np.full_like(x, np.nan) for x in token_inputs(5)]
    state, d_state = rng.standard_normal((2, VALUE_HEADS, DK, DV)).astype(np.float32)
    none = np.zeros(5, bool)
    arguments = (*inputs, none, none, state)
    out, after = compiled(delta_window, backend)(*arguments)
    assert not np.asarray(out).any()
    np.testing.assert_array_equal(after, state)
    backward = compiled(delta_window_backward, backend)
    *gradients, before = backward(*arguments, inputs[2], d_state)
    assert not any(np.asarray(d).any() for d in gradients)
    np.testing.assert_array_equal(before, d_state)


def test_the_formulas_are_those_of_transformers(backend):
    modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")
    torch = pytest.importorskip("torch")
    tokens, group = 150, VALUE_HEADS // KEY_HEADS
    q, k, v, log_decay, beta = token_inputs(tokens)
    state = np.random.default_rng(6).standard_normal((1, VALUE_HEADS, DK, DV)).astype(np.float32)
    per_head = [np.repeat(x, group, axis=1) for x in (q * DK**0.5, k)]
    rows = [torch.from_numpy(np.array(x))[None] for x in (*per_head, v, log_decay, beta)]
    starts, slot = np.array([0, tokens], np.int32), np.zeros(1, np.int32)
    arguments = (starts, np.zeros(1, bool), slot, slot, 0, 1, np.full(tokens, NOWHERE, np.int32))
    run = compiled(delta_rule, backend, unit_tokens=16)
    out, after, _ = run(q, k, v, log_decay, beta, state, *arguments, None)
    for theirs in (
        modeling.torch_chunk_gated_delta_rule,
        modeling.torch_recurrent_gated_delta_rule,
    ):
        want, want_state = theirs(
            *rows, initial_state=torch.from_numpy(state), output_final_state=True
        )
        assert_close(out, want[0].numpy(), 1e-5)
        assert_close(after, want_state.numpy(), 1e-5)


@pytest.mark.parametrize("dtype", (np.float32, ml_dtypes.bfloat16), ids=("float32", "bfloat16"))
def test_a_convolution_goes_on_where_it_was(backend, dtype):
    """Any cut of sequences in steps gives the convolution of whole sequences, slots keep the last
    inputs, and padding is not read."""
    width, kept, slots = 6, 3, 5
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((kept + 1, width)).astype(np.float32).astype(dtype)
    sequences = [rng.standard_normal((n, width)).astype(np.float32).astype(dtype) for n in (9, 13)]
    tail = jnp.full((slots, kept, width), np.nan, dtype)
    run = compiled(causal_conv, backend)
    done, outputs = [0, 0], [[], []]
    slot_of = [np.array([4, 1, 0], np.int32), np.array([4, 2, 0], np.int32)]
    for lengths in ((1, 2), (2, 1), (1, 1), (5, 1), (0, 8)):
        rows = [u[at : at + n] for u, at, n in zip(sequences, done, lengths, strict=True)]
        rows = np.concatenate([*rows, np.full((9 - sum(lengths), width), np.nan).astype(dtype)])
        starts = np.array([0, lengths[0], *[sum(lengths)] * 2], np.int32)
        fresh = np.array([at == 0 for at in done] + [False])
        read, write = slot_of if done[1] == 2 else (slot_of[bool(done[1])],) * 2
        out, tail, before = run(rows, weight, tail, starts, fresh, read, write, 2)
        for s, u in enumerate(sequences):
            known = np.concatenate([np.zeros((kept, width), dtype), u[: done[s]]])[-kept:]
            np.testing.assert_array_equal(before[s], known)
        for s, n in enumerate(lengths):
            outputs[s].append(np.asarray(out[starts[s] : starts[s] + n], np.float64))
            done[s] += n
    for s, u in enumerate(sequences):
        (inputs, w) = exact(u, weight)
        total = sum(w[i] * np.pad(inputs, ((kept - i, 0), (0, 0)))[: len(u)] for i in range(4))
        want = total / (1 + np.exp(-total))
        assert_close(np.concatenate(outputs[s]), want, 1e-6 if dtype == np.float32 else 1e-2)
        np.testing.assert_array_equal(tail[slot_of[1][s]], u[-kept:])
    assert np.isnan(np.asarray(tail, np.float32)[[0, 3]]).all()


@pytest.mark.parametrize("unit_tokens", (1, 2, 5, 16))
def test_windows_of_a_convolution(unit_tokens):
    """With the rows before it, and gradients that are added there, a window is what it is in the
    whole; other sequences' rows do not count."""
    tokens, width, kept = 16, 6, 3
    rng = np.random.default_rng(8)
    u, d_out = rng.standard_normal((2, tokens, width)).astype(np.float32)
    weight = rng.standard_normal((kept + 1, width)).astype(np.float32)
    first = np.isin(np.arange(tokens), (0, 2, 3, 9))

    def whole(u):
        out = []
        for t in range(tokens):
            start = max(np.flatnonzero(first[: t + 1]))
            out.append(sum(weight[kept - b] * u[t - b] for b in range(min(kept, t - start) + 1)))
        return jax.nn.silu(jnp.stack(out))

    want, pull = jax.vjp(whole, u)
    sequence = np.pad(np.cumsum(first), (kept, 0))
    padded = np.concatenate([np.zeros((kept, width), np.float32), u])
    d_u = np.zeros(padded.shape, np.float32)
    run = jax.jit(lambda u, before, first: conv_window(u, jnp.asarray(weight), before, first))
    for start in range(0, tokens, unit_tokens):
        own, above = slice(start, start + unit_tokens), slice(start, start + kept)
        same = (sequence[above] == sequence[start + kept])[:, None]
        before = np.where(same, padded[above], np.nan if first[start] else 0)
        out, back = jax.vjp(partial(run, first=first[own]), u[own], before)
        np.testing.assert_allclose(out, want[own], atol=1e-6)
        d_own, d_before = back(d_out[own])
        d_u[start + kept : start + kept + len(d_own)] += d_own
        d_u[above] += np.where(same, d_before, 0)
        if first[start]:
            assert not np.asarray(d_before).any()
    np.testing.assert_allclose(d_u[kept:], pull(d_out)[0], atol=1e-5)


def test_no_program_waits_for_the_threads_that_it_runs_on():
    """XLA's calls of LAPACK on a CPU do, and as many at once as there are threads never end."""
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(70, 2, 8)), jnp.float32) for _ in range(2))
    v, numbers = jnp.ones((70, 4, 8)), -jnp.ones((70, 4))
    window = (q, k, v, numbers, -numbers, jnp.arange(70) == 0, jnp.ones(70, bool))
    state = jnp.zeros((4, 8, 8))
    forward = jax.jit(delta_window).lower(*window, state)
    backward = jax.jit(delta_window_backward).lower(*window, state, v, state)
    assert "custom_call" not in forward.as_text() + backward.as_text()
