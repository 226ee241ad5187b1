"""What a layer's gradient needs, against what JAX's own rematerialization does with the same layer;
plans against brute force; and gradients, which no plan changes."""

from functools import partial
from itertools import chain, combinations, pairwise
from math import inf, prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax.ad_checkpoint import checkpoint_name

from flexllm_jax.compile.layer_graph import INPUT, trace, trace_layer
from flexllm_jax.compile.remat import Plan, all_plans, make_plan
from flexllm_jax.compile.whole_layer import PAGES
from flexllm_jax.models.checkpoints.hf_weights import abstract_parameters
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.peft.bank import KINDS, BankShape, weight_shapes
from flexllm_jax.peft.bypass import Bypass
from tests.small_models import small_model

TOKENS, D, F = 16, 32, 96


# -- small layers of three kinds, as pure functions ----------------------------------------------


def feed_forward(x, adapter, frozen, gate_bypass=None, inner_bypass=None, out_bypass=None):
    """A residual gated network with places for bypasses."""
    h = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * frozen["norm"]
    gate = h @ frozen["gate"]
    gate = checkpoint_name(gate_bypass(h, gate, adapter) if gate_bypass else gate, "gate")
    up = checkpoint_name(h @ frozen["up"], "up")
    inner = checkpoint_name(jax.nn.silu(gate) * up, "inner")
    if inner_bypass:
        inner = inner_bypass(inner, adapter)
    out = checkpoint_name(inner @ frozen["down"], "out")
    return x + (out_bypass(out, adapter) if out_bypass else out)


def lora(h, gate, adapter):
    return gate + (h @ adapter["a"]) @ adapter["b"]


def ia3(inner, adapter):
    return inner * adapter["scale"]


def bottleneck(out, adapter):
    return out + jax.nn.relu(out @ adapter["down"]) @ adapter["up"]


ADAPTERS = {
    "lora": {"a": (D, 4), "b": (4, F)},
    "ia3": {"scale": (F,)},
    "bottleneck": {"down": (D, 8), "up": (8, D)},
    "none": {},
}
LAYERS = {
    "lora": partial(feed_forward, gate_bypass=lora),
    "ia3": partial(feed_forward, inner_bypass=ia3),
    "bottleneck": partial(feed_forward, out_bypass=bottleneck),
    "none": feed_forward,
}
FROZEN = {"norm": (D,), "gate": (D, F), "up": (D, F), "down": (F, D)}


def shapes(tree):
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda s: isinstance(s, tuple)
    )


def arguments(kind):
    return shapes((TOKENS, D)), shapes(ADAPTERS[kind]), shapes(FROZEN)


@pytest.fixture(params=LAYERS)
def kind(request):
    return request.param


def product_flops(jaxpr):
    """FLOPs of all matrix products of a jaxpr, nested ones too."""
    total = 0
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            total += product_flops(inner) if hasattr(inner, "eqns") else 0
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            summed = prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * summed * eqn.outvars[0].aval.size
    return total


def xla_flops(kind, policy):
    """FLOPs of the products of a layer's gradient under a checkpoint policy, as JAX traces it."""
    layer = LAYERS[kind]

    def gradients(x, adapter, frozen, d_out):
        kept = jax.checkpoint(lambda x, adapter: layer(x, adapter, frozen), policy=policy)
        out, pull = jax.vjp(kept, x, adapter)
        return out, pull(d_out)

    x, adapter, frozen = arguments(kind)
    jaxpr = jax.make_jaxpr(gradients)(x, adapter, frozen, x)
    jaxpr = jax.interpreters.partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))[
        0
    ]
    return product_flops(jaxpr)


def subsets(names):
    return chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))


# -- what is needed --------------------------------------------------------------------------------


def test_needed_bytes_are_those_of_jaxs_residuals(kind):
    """JAX lists what `jax.vjp` of the input and the adapter keeps, frozen weights held fixed."""
    x, adapter, frozen = arguments(kind)
    layer = LAYERS[kind]
    graph = trace(layer, x, adapter, frozen)
    values = jax.tree.map(lambda s: jnp.ones(s.shape), frozen)
    residuals = saved_residuals(lambda x, a: layer(x, a, values), x, adapter)
    expected = sum(
        aval.size * aval.dtype.itemsize
        for aval, where in residuals
        if aval.shape[:1] == (TOKENS,)
        and not any(text in where for text in ("argument", "constant", "broadcast_in_dim"))
    )
    ours = [i for i in graph.needed if graph.activations[i].shape[:1] == (TOKENS,)]
    assert graph.bytes_of(set(ours) - {graph.input}) == expected


def test_frozen_weights_need_no_inputs():
    """A chain of products: only what leads to the adapter's gradient is needed of it."""

    def layer(x, adapter, frozen):
        first = checkpoint_name(x @ frozen["first"], "first")
        second = checkpoint_name(first * adapter, "second")
        return checkpoint_name(second @ frozen["last"], "third")

    x, weight = shapes((TOKENS, D)), shapes((D, D))
    graph = trace(layer, x, shapes((D,)), {"first": weight, "last": weight})
    labels = {graph.activations[i].label for i in graph.needed}
    assert labels == {"first"}
    assert {graph.activations[i].label for i in graph.kept} == {"x", "first", "second"}
    flops, arrays = graph.recomputed(())
    assert flops == 2 * TOKENS * D * D
    assert len(arrays) == 1
    assert graph.recomputed(["first"]) == (0, ())


# -- plans -----------------------------------------------------------------------------------------


def test_recomputed_flops_are_what_jax_adds(kind):
    """The products a policy adds to a gradient that keeps all, counted in JAX's own program."""
    graph = trace(LAYERS[kind], *arguments(kind))
    everything = xla_flops(kind, jax.checkpoint_policies.everything_saveable)
    for saved in subsets(graph.candidates):
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        added = xla_flops(kind, policy) - everything
        operations = graph.recomputed(saved)[0]
        elementwise = 20 * TOKENS * F  # which JAX's count leaves out
        assert added <= operations <= added + elementwise, saved


def test_plans_are_those_of_brute_force(kind):
    """For every budget, the least FLOPs over all sets of names that fit, found without the graph's
    search: JAX counts them."""
    graph = trace(LAYERS[kind], *arguments(kind))
    costs = []
    for saved in subsets(graph.candidates):
        policy = jax.checkpoint_policies.save_only_these_names(*saved)
        costs.append((graph.bytes_saved(saved), xla_flops(kind, policy)))
    for budget in range(0, 1 + max(size for size, _ in costs), 512):
        plan = make_plan(graph, budget)
        assert graph.bytes_saved(plan.saved) <= budget
        best = min(flops for size, flops in costs if size <= budget)
        chosen = xla_flops(kind, jax.checkpoint_policies.save_only_these_names(*plan.saved))
        assert chosen == best


def llama(qk_norm=False):
    model = small_model(
        vocab_size=64,
        d_model=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        d_ff=160,
        qk_norm=qk_norm,
    )
    return Decoder(model, jnp.dtype(jnp.float32))


def graph_of(decoder, modules=(), kinds=("lora",), tokens=64):
    bank = BankShape(1, 4, modules, kinds, bottleneck=8, prefix=5)
    adapter = weight_shapes(decoder.config, bank, 1, decoder.dtype)[0]
    adapter = jax.tree.map(lambda w: jax.ShapeDtypeStruct((1, *w.shape[1:]), w.dtype), adapter)
    row, scales = jnp.zeros(tokens, jnp.int32), dict.fromkeys(adapter, jnp.ones((1, 1)))
    return trace_layer(
        decoder,
        decoder.config.layers[0],
        abstract_parameters(decoder.config, decoder.dtype)["layers"][0],
        adapter,
        lambda weights: Bypass(weights, scales, row),
        tokens,
    )


ALL = ("q", "k", "v", "o", "gate", "up", "down")


@pytest.mark.parametrize(
    ("modules", "kinds", "qk_norm"),
    [
        (ALL, ("lora",), False),
        (("down",), ("lora",), True),
        ((), ("ia3",), False),
        ((), ("bottleneck",), False),
        ((), ("prefix",), True),
        (("q", "v"), KINDS, True),
    ],
)
def test_more_memory_never_means_more_to_recompute(modules, kinds, qk_norm):
    graph = graph_of(llama(qk_norm=qk_norm), modules, kinds)
    plans = all_plans(graph)
    assert plans[0].saved == ()
    assert len(plans) > 3
    for smaller, larger in pairwise(plans):
        assert smaller.bytes < larger.bytes
        assert smaller.flops > larger.flops
    most = max(plan.bytes for plan in plans)
    made: list[Plan] = [make_plan(graph, budget) for budget in np.linspace(0, most, 60)]
    flops = [plan.flops for plan in made]
    assert flops == sorted(flops, reverse=True)
    assert made[0] == plans[0]
    assert made[-1] == make_plan(graph, inf) == plans[-1]


def test_a_decoder_layers_arrays():
    """The taps of a Llama layer with LoRA: attention's output counts with its log-sum-exp, keys and
    values are in their pages, and what the adapters do not touch is not needed."""
    graph = graph_of(llama(), ("down",))
    taps = {"query", "attended", "residual", "gate", "up"}
    assert set(graph.candidates) == taps
    assert set(graph.named) == taps | {PAGES}
    tokens, heads, head_dim = 64, 4, 16
    assert graph.bytes_saved(["attended"]) == tokens * heads * (head_dim + 1) * 4
    assert graph.bytes_saved([PAGES]) == 2 * tokens * 2 * head_dim * 4
    assert graph.activations[graph.input].label == INPUT
    pruned, whole = graph.bytes_of(graph.needed), graph.bytes_of(graph.kept)
    everywhere = graph_of(llama(), ALL)
    assert pruned < everywhere.bytes_of(everywhere.needed)
    assert pruned < whole
    # IA3 scales `up` before its tap: the gradient of the scale needs what was there before.
    scaled = graph_of(llama(), kinds=("ia3",))
    assert scaled.recomputed(taps)[0] > 2 * tokens * 64 * 160 > graph.recomputed(taps)[0]
    query, attention = 2 * tokens * 64 * 64, 4 * heads * head_dim * tokens * (tokens + 1) / 2
    added = graph.recomputed(["residual", "gate", "up"])[0]
    added -= graph.recomputed(["residual", "gate", "up", "attended"])[0]
    assert added == pytest.approx(attention)
    assert graph.recomputed(["attended"])[0] > query
