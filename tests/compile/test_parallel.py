"""The search over shardings of bypasses: every candidate is carried out with numpy on a few
"devices", and costs are those computed by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flexllm_jax.compile.parallel import (
    Join,
    Mesh,
    ParallelError,
    Split,
    State,
    candidates,
    plan_parallel,
)
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.spec import GatedDeltaSpec, NormSpec
from tests.small_models import small_model

T, D_IN, RANK, D_OUT, TP = 3, 8, 4, 12, 4
JOINS = {
    "column": Join("q", D_IN, D_OUT, State.REPLICATED, State.PARTITIONED, TP),
    "row": Join("o", D_IN, D_OUT, State.PARTITIONED, State.PRE_REDUCE, TP),
    "after all-reduce": Join("b", D_IN, D_OUT, State.REPLICATED, State.REPLICATED, TP, False),
}


def model(**changes) -> ModelConfig:
    fields: dict[str, Any] = {
        "vocab_size": 1024,
        "d_model": 64,
        "num_layers": 2,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 8,
        "d_ff": 128,
    }
    return small_model(**(fields | changes))


def spread(whole: np.ndarray, state: State) -> list[np.ndarray]:
    """What each device holds of an activation [T, X]."""
    nothing = np.zeros_like(whole)
    if state is State.REPLICATED:
        return [whole] * TP
    if state is State.NON_PARALLEL:
        return [whole] + [nothing] * (TP - 1)
    if state is State.PARTITIONED:
        return np.split(whole, TP, axis=1)
    parts = list(np.random.default_rng(5).standard_normal((TP - 1, *whole.shape)))
    return [*parts, whole - sum(parts)]


def whole_of(held: list[np.ndarray], state: State) -> np.ndarray:
    if state is State.PARTITIONED:
        return np.concatenate(held, axis=1)
    if state is State.PRE_REDUCE:
        return np.sum(held, axis=0)
    if state is State.REPLICATED:
        assert all(np.allclose(held[0], other) for other in held)
    return held[0]


def multiply(x: list, x_state: State, weight: np.ndarray, split: Split, state: State) -> list:
    """Each device multiplies what it holds; `state` is what that should give."""
    held = {
        Split.ONE_DEVICE: [weight] + [None] * (TP - 1),
        Split.WHOLE: [weight] * TP,
        Split.ROWS: np.split(weight, TP, axis=0),
        Split.COLUMNS: np.split(weight, TP, axis=1),
    }[split]
    products = []
    for i, (own, w) in enumerate(zip(x, held, strict=True)):
        if w is None:
            products.append(np.zeros((len(own), weight.shape[1])))
            continue
        if own.shape[1] > len(w):  # replicated input, own rows of the weight
            own = np.split(own, TP, axis=1)[i]
        elif own.shape[1] < len(w):  # partitioned input, replicated weight
            w = np.split(w, TP, axis=0)[i]
        products.append(own @ w)
    return products


@pytest.mark.parametrize("kind", JOINS)
def test_every_candidate_computes_the_bypass(kind):
    join = JOINS[kind]
    random = np.random.default_rng(0)
    x, a, b = (random.standard_normal(s) for s in ((T, D_IN), (D_IN, RANK), (RANK, D_OUT)))
    base = random.standard_normal((T, D_OUT))
    inner = x @ a if join.linear else np.maximum(x @ a, 0)
    found, refused = candidates(join, RANK, T, TP, itemsize=2)
    assert len(found) + len(refused) == 4**3
    assert len({(c.a, c.b, c.used) for c in found}) == len(found) > 3
    for candidate in found:
        products = multiply(spread(x, join.x), join.x, a, candidate.a, candidate.computed)
        middle = whole_of(products, candidate.computed)
        np.testing.assert_allclose(middle, x @ a, err_msg=candidate.describe())
        middle = inner if not join.linear else middle
        products = multiply(
            spread(middle, candidate.used), candidate.used, b, candidate.b, candidate.y
        )
        added = whole_of(products, candidate.y)
        y = [
            own + more
            for own, more in zip(spread(base, join.y), spread(added, join.y), strict=True)
        ]
        np.testing.assert_allclose(whole_of(y, join.y), base + inner @ b)


@pytest.mark.parametrize("kind", JOINS)
def test_changes_that_cost_nothing_need_no_other_device(kind):
    """From one state to another without a collective, a device uses only what it holds."""
    free = {
        (State.REPLICATED, State.PARTITIONED),
        (State.REPLICATED, State.PRE_REDUCE),
        (State.PARTITIONED, State.PRE_REDUCE),
        (State.NON_PARALLEL, State.PRE_REDUCE),
    }
    for c in candidates(JOINS[kind], RANK, T, TP, itemsize=2)[0]:
        changes = [(c.computed, c.used), (c.y, JOINS[kind].y)]
        needed = [change for change in changes if change[0] is not change[1]]
        assert len(c.moves) == sum(change not in free for change in needed)
        assert (c.bytes > 0) == bool(c.moves)


class TestCosts:
    """Llama-3.1-8B's q and down on 4 devices, rank 16, 1,024 tokens, bfloat16, by hand."""

    def find(self, join, a, b, used):
        found, _ = candidates(join, 16, 1024, 4, itemsize=2)
        (one,) = [c for c in found if (c.a, c.b, c.used) == (a, b, used)]
        return one

    def test_column_parallel(self):
        join = Join("q", 4096, 4096, State.REPLICATED, State.PARTITIONED, 4)
        best = self.find(join, Split.WHOLE, Split.COLUMNS, State.REPLICATED)
        assert best == candidates(join, 16, 1024, 4, itemsize=2)[0][0]
        assert best.bytes == 0
        assert best.flops == 2 * 1024 * (4096 * 16 + 16 * 1024)
        assert best.memory == (4096 * 16 + 16 * 1024) * 18
        assert best.summed == ("a",)
        assert best.gradient_bytes == 2 * 3 * (4096 * 16 * 4) // 4
        gathered = self.find(join, Split.COLUMNS, Split.COLUMNS, State.REPLICATED)
        assert gathered.bytes == 3 * 1024 * 16 * 2 // 4
        assert gathered.flops == 2 * 1024 * (4096 * 4 + 16 * 1024)
        assert gathered.summed == ()

    def test_row_parallel(self):
        join = Join("down", 14336, 4096, State.PARTITIONED, State.PRE_REDUCE, 4)
        best = self.find(join, Split.ROWS, Split.WHOLE, State.PRE_REDUCE)
        assert best.moves == ()
        assert best.flops == 2 * 1024 * (14336 * 4 + 16 * 4096)
        assert best.summed == ("b",)
        reduced = self.find(join, Split.ROWS, Split.COLUMNS, State.REPLICATED)
        assert [m.collective for m in reduced.moves] == ["all-reduce"]
        assert reduced.bytes == 2 * 3 * 1024 * 16 * 2 // 4

    def test_nonlinear_partial_sums_are_refused(self):
        join = JOINS["after all-reduce"]
        found, refused = candidates(join, RANK, T, TP, itemsize=2)
        assert not any(c.used is State.PRE_REDUCE and c.computed is c.used for c in found)
        assert any("nonlinear" in reason for _, reason in refused)


def test_a_plan_has_no_collective_of_its_own_and_says_why():
    sites = ("q", "k", "v", "o", "gate", "up", "down", "bottleneck_o", "ia3_k", "prefix")
    for tp in (2, 8):
        plan = plan_parallel(model(), Mesh.of(model(), tp), sites, rank=16)
        assert set(plan.weights) == set(sites)
        for search in plan.searches:
            assert search.chosen.moves == ()
            assert all(search.chosen.cost <= other.cost for other in search.others)
    text = plan.describe()
    assert "keys and values over 2, each head on 4" in text
    assert "all-gather of X A" in text and "do not compose" in text
    down, up = plan.weights["down"], plan.weights["up"]
    assert (down["a"].dimension, down["b"].dimension) == (0, None)
    assert (up["a"].dimension, up["b"].dimension) == (None, 1)
    assert plan.weights["k"]["b"].summed and plan.weights["k"]["b"].kv_only


@pytest.mark.parametrize(
    ("changes", "tp", "named"),
    [
        ({"num_heads": 6, "num_kv_heads": 6}, 4, "num_heads=6"),
        ({"d_ff": 130}, 4, "d_ff=130"),
        ({"vocab_size": 1001}, 2, "vocab_size=1001"),
        ({"num_heads": 24, "num_kv_heads": 3, "d_ff": 96}, 8, "num_kv_heads=3"),
    ],
)
def test_models_that_do_not_divide_are_refused_in_one_line(changes, tp, named):
    with pytest.raises(ParallelError, match=named) as error:
        Mesh.of(model(**changes), tp)
    assert "\n" not in str(error.value)
    assert f"parallel.tp={tp}" in str(error.value)


def with_mixers(*mixers, **fields) -> ModelConfig:
    one = model()
    layers = tuple(replace(one.layers[0], mixer=mixer) for mixer in mixers)
    return replace(one, layers=layers, **fields)


@pytest.mark.parametrize(
    ("changed", "fused", "tp", "named"),
    [
        ({"fused": True}, True, 4, "does not divide the model's num_kv_heads=2"),
        ({}, True, 8, "does not divide the model's linear_num_key_heads=4"),
        ({}, False, 4, "keys of .* gated delta nets .* over 4 devices and those of attention"),
    ],
)
def test_mixers_that_do_not_divide_are_refused_in_one_line(changed, fused, tp, named):
    delta = GatedDeltaSpec(4, 8, 8, 16, 4, NormSpec(1e-6), fused=fused)
    attention = replace(model().attention[0], **changed)
    with pytest.raises(ParallelError, match=f"parallel.tp={tp}.*{named}.* a divisor") as error:
        Mesh.of(with_mixers(delta, attention), tp)
    assert "\n" not in str(error.value)


def test_tables_of_tokens_for_single_layers_must_divide():
    with pytest.raises(ParallelError, match="vocab_size_per_layer_input=99"):
        Mesh.of(with_mixers(model().attention[0], token_table=99), 2)
