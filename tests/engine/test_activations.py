"""Any plan of saved activations gives the same gradients; `finetune.saved: auto` picks the plan by
the memory that is free."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexllm_jax.compile.remat import all_plans
from flexllm_jax.config import Config
from flexllm_jax.engine.device.programs import list_programs
from flexllm_jax.engine.memory.activations import (
    choose_saved,
    describe_saved,
    layer_graph,
    saved_names,
    with_saved,
)
from flexllm_jax.engine.memory.cache import tree_bytes
from flexllm_jax.engine.memory.plan import fixed_parts
from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.models.checkpoints.hf_weights import abstract_parameters
from flexllm_jax.peft.bank import BankShape
from kernels_pallas.backend import XLA
from tests.numerics import dense
from tests.packing import pack
from tests.small_models import small_model

LENGTHS = (19, 8)  # packed; units and forward steps of 16 cut the first
PAGES, SEED = 8, 3
MODEL = small_model(
    vocab_size=40,
    d_model=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    qk_norm=True,
    max_position_embeddings=64,
)
SIZES = EngineSizes(
    model=MODEL,
    dtype=jnp.dtype(jnp.float32),
    backend=XLA,
    max_model_len=32,
    page_size=8,
    rows=2,
    finetune_slots=32,
    unit_tokens=16,
    buckets=(16,),
    bank=BankShape(rows=1, rank=3, modules=("q", "k", "v", "o", "gate", "up", "down")),
    columns={},
)


def filled(shapes, scale=0.3):
    """Random arrays."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(SEED), len(leaves))
    made = [
        scale * jax.random.normal(k, s.shape, s.dtype) for k, s in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


def zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


@pytest.fixture(scope="module")
def microbatch():
    """Two sequences, packed, and the steps that bring them forward, 16 tokens each."""
    random = np.random.default_rng(SEED)
    tokens = [random.integers(3, MODEL.vocab_size, n) for n in LENGTHS]
    # First 16 tokens of one sequence, then the rest of it and the other.
    steps = [[(0, 0, 16)], [(0, 16, 19), (1, 0, 8)]]
    return SimpleNamespace(
        tokens=tokens, packed=pack(SIZES, PAGES, tokens, [[5, 2, 7], [1]], steps)
    )


@pytest.fixture(scope="module")
def weights():
    master = filled(SIZES.adapter_row.weights)
    return SimpleNamespace(
        params=filled(abstract_parameters(MODEL, SIZES.dtype)),
        master=master,
        scale={"others": 1.5},
    )


def gradients_of(sizes, weights, microbatch):
    """The engine's programs over the microbatch: gradients by layer, and the loss."""
    programs = {p.name: jax.jit(p.function) for p in list_programs(sizes, PAGES)}
    (scales,) = [
        {
            site: jnp.full(s.shape, weights.scale.get(site, weights.scale["others"]))
            for site, s in stack.items()
        }
        for stack in sizes.adapter_row.scales
    ]
    (master,) = weights.master
    bank = jax.tree.map(lambda w: w[:, None], {"weights": [master], "scales": [scales]})
    pages, finetune = zeros(sizes.pages(PAGES)), zeros(sizes.finetune_arrays)
    last = jnp.zeros(sizes.rows, jnp.int32)
    for vector in microbatch.packed.vectors:
        pages, finetune, *_ = programs["forward/adapters/16"](
            weights.params, bank, pages, finetune, last, microbatch.packed.page_tables, vector
        )
    flow, loss = finetune["flow"], microbatch.packed.batch.loss.packed()
    head = {name: weights.params[name] for name in ("norm", "head")}
    for start in (16, 0):
        flow, _, _ = programs["unit/loss"](
            head, None, flow, None, microbatch.packed.table, loss, start
        )
    (gradients,) = zeros(sizes.job_state["gradients"])
    for layer in reversed(range(MODEL.num_layers)):
        for start in (16, 0):
            flow, gradients, _ = programs["unit/layer"](
                weights.params["layers"][layer],
                {"weights": master, "scales": scales},
                pages[layer],
                finetune["saved"][layer],
                flow,
                gradients,
                microbatch.packed.table,
                layer,
                start,
            )
    gradients = sizes.stacks.by_layer([gradients])
    return gradients, microbatch.packed.batch.evaluate(flow["logprob"][: sum(LENGTHS)])[0].sum()


PLANS = [plan.saved for plan in all_plans(layer_graph(SIZES))]


@pytest.fixture(scope="module")
def expected(weights, microbatch):
    """The same by jax.grad through a dense decoder, in float64."""
    sequences = [(t, np.arange(len(t)) > 0) for t in microbatch.tokens]
    layers = SIZES.stacks.by_layer(weights.master)
    adapter = {(i, m): w for i, layer in enumerate(layers) for m, w in layer.items()}
    scales = dict.fromkeys(adapter, 1.5)
    with jax.enable_x64(True):
        params, adapter = jax.tree.map(
            lambda w: np.asarray(w, np.float64), (weights.params, adapter)
        )
        return jax.jit(
            jax.value_and_grad(lambda own: dense.loss(MODEL, params, scales, sequences, own))
        )(adapter)


@pytest.mark.parametrize("saved", [*PLANS[::4], PLANS[-1], ("attended", "up")], ids="+".join)
def test_every_plan_gives_the_gradients_of_the_whole_sequences(
    saved, weights, microbatch, expected
):
    gradients, own_loss = gradients_of(with_saved(SIZES, saved), weights, microbatch)
    loss, exact = expected
    assert own_loss == pytest.approx(float(loss), rel=1e-5)
    for (layer, module), factors in exact.items():
        for name, theirs in factors.items():
            ours = np.asarray(gradients[layer][module][name])
            error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
            assert error < 1e-5, (layer, module, name, error)


def test_every_plan_gives_the_same_gradients_of_all_kinds_of_adapters(weights, microbatch):
    """A bank with every kind, against the plan that saves most."""
    bank = BankShape(1, 2, ("q", "down"), ("lora", "ia3", "bottleneck", "prefix"), 4, 3)
    sizes = replace(SIZES, bank=bank)
    plans = all_plans(layer_graph(sizes))
    own = SimpleNamespace(
        params=weights.params,
        master=filled(sizes.adapter_row.weights),
        scale={"prefix": 3.0, "others": 1.0},
    )
    expected, _ = gradients_of(with_saved(sizes, plans[-1].saved), own, microbatch)
    assert set(expected[0]) == set(bank.sites(MODEL, 0))
    for plan in plans[:1], plans[len(plans) // 2 :][:1]:
        gradients, _ = gradients_of(with_saved(sizes, plan[0].saved), own, microbatch)
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
            assert np.abs(theirs).max() > 0
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.linalg.norm(theirs))


def config(saved, **cache):
    return Config.model_validate(
        {
            "model": {"path": "m"},
            "cache": {"page_size": 8} | cache,
            "finetune": {"max_tokens": 32, "unit_tokens": 16, "saved": saved},
        }
    )


def test_auto_saves_more_the_more_memory_is_free():
    graph, sizes = layer_graph(SIZES), SIZES
    saved_bytes, recomputed, left = [], [], []
    for available in np.linspace(0, 2_000_000, 40):
        chosen = choose_saved(config("auto", num_pages=8), sizes, available)
        arrays = (chosen.finetune_arrays, chosen.pending_arrays, chosen.pages(8))
        weights = abstract_parameters(MODEL, SIZES.dtype)
        left.append(available - tree_bytes((arrays, weights, chosen.bank_arrays)))
        saved_bytes.append(tree_bytes(chosen.finetune_arrays["saved"]))
        flops = graph.recomputed(n for n in saved_names(chosen) if n != "x")[0]
        recomputed.append(flops)
        if "attended" in saved_names(chosen):
            assert left[-1] >= 0, "more is saved than fits"
    assert saved_bytes == sorted(saved_bytes)
    assert recomputed == sorted(recomputed, reverse=True)
    assert saved_bytes[-1] == tree_bytes(with_saved(SIZES, PLANS[-1]).finetune_arrays["saved"])
    assert saved_bytes[0] == tree_bytes(with_saved(SIZES, ()).finetune_arrays["saved"])


def test_auto_leaves_pages_most_of_the_memory():
    """Without a fixed number of pages it may take a quarter of what is left."""
    sizes, left = replace(SIZES, rows=1000), 400_000
    smallest = with_saved(sizes, ())
    fixed = sum(fixed_parts(config("auto"), smallest).values())
    chosen = choose_saved(config("auto"), sizes, fixed + left)
    extra = tree_bytes(chosen.finetune_arrays) - tree_bytes(smallest.finetune_arrays)
    assert 0 < extra <= 0.25 * left


@pytest.mark.parametrize(
    ("saved", "columns"),
    [
        ("attention", {"x", "attended"}),
        ("all", {"x", *PLANS[-1]}),
        (["up", "query"], {"x", "query", "up"}),
        ([], {"x"}),
    ],
)
def test_other_settings_do_not_look_at_memory(saved, columns):
    assert set(saved_names(choose_saved(config(saved), SIZES, 0))) == columns


def test_a_name_that_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"finetune.saved names sideways, which .* residual"):
        choose_saved(config(["sideways"]), SIZES, 0)


def test_the_plan_is_told():
    lines = list(describe_saved(with_saved(SIZES, ("attended",))))
    assert lines[0].startswith("finetuning saves x, attended: 0.0 MiB for 32 tokens; the backward")
    assert "smallest: x:" in lines[1]
    assert "largest: x, " in lines[2]
