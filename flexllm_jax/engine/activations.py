"""Which activations of the finetuning forward the engine saves: `finetune.saved` and what memory is
free decide (`compile.remat` finds what there is to choose from)."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import inf

import jax.numpy as jnp

from flexllm_jax.compile.layer_graph import LayerGraph, trace_layer
from flexllm_jax.compile.remat import Plan, all_plans, make_plan
from flexllm_jax.config import Config, ConfigError
from flexllm_jax.engine.cache import tree_bytes
from flexllm_jax.engine.memory import fixed_parts
from flexllm_jax.engine.sizes import EngineSizes
from flexllm_jax.finetune.backward import job_bypass
from flexllm_jax.finetune.buffers import saved_columns
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.hf_weights import abstract_parameters
from flexllm_jax.peft.bank import BankShape, weight_shapes
from flexllm_jax.peft.stacks import shapes_of_one
from kernels_pallas.backend import XLA

# Of what weights and adapters leave, the part that `auto` may take from KV pages.
_AUTO_SHARE = 0.25


def layer_graph(sizes: EngineSizes) -> LayerGraph:
    """The trace of a layer with the bypasses of the bank, over the finetuning slots. One plan is
    made for all layers: for the kind whose attention costs most."""
    return _traced(sizes.model, sizes.dtype, sizes.bank, sizes.finetune_slots)


@cache
def _traced(model: ModelConfig, dtype: jnp.dtype, bank: BankShape, tokens: int) -> LayerGraph:
    weights = shapes_of_one(weight_shapes(model, bank, None, jnp.float32)[0])
    scales = dict.fromkeys(weights, jnp.ones(1))
    is_token = jnp.ones(tokens, bool)
    spec = max(model.kinds, key=lambda kind: kind.attention.options.window or inf)
    return trace_layer(
        Decoder(model, dtype),
        spec,
        abstract_parameters(model, dtype)["layers"][0],
        weights,
        lambda own: job_bypass({"weights": own, "scales": scales}, is_token, XLA),
        tokens,
    )


def with_saved(sizes: EngineSizes, names: tuple[str, ...]) -> EngineSizes:
    """The sizes with these taps saved."""
    taps = sizes.decoder.taps()
    if unknown := set(names) - set(taps):
        raise ConfigError(
            f"finetune.saved names {', '.join(sorted(unknown))}, which this model does not "
            f"have: use auto, all, attention or some of {', '.join(taps)}"
        )
    ordered = tuple(name for name in taps if name in names)
    return replace(sizes, columns=saved_columns(sizes.decoder, ordered))


def choose_saved(config: Config, sizes: EngineSizes, available: float) -> EngineSizes:
    """The sizes with the activations saved that `finetune.saved` asks for.

    Args:
        config: the whole configuration.
        sizes: everything else.
        available: bytes the engine may use; only `auto` looks at them. Of what all else leaves it
            takes what the KV pages could never use, and a quarter in any case.
    """
    saved = config.finetune.saved
    if not isinstance(saved, str):
        return with_saved(sizes, saved)
    if saved == "attention":
        return with_saved(sizes, ("attended",))
    graph = layer_graph(sizes)
    if saved == "all":
        return with_saved(sizes, make_plan(graph, inf).saved)
    smallest = with_saved(sizes, ())
    pages = config.cache.num_pages or sizes.wanted_pages
    left = available - sum(fixed_parts(config, smallest).values())
    spare = left - pages * tree_bytes(sizes.pages(1))
    budget = spare if config.cache.num_pages else max(spare, _AUTO_SHARE * left)
    budget *= sizes.devices
    return with_saved(sizes, make_plan(graph, budget / sizes.model.num_layers).saved)


def describe_saved(sizes: EngineSizes) -> Iterator[str]:
    """Lines for the start-up log: what is saved, what that makes the backward compute again, and
    what the neighbouring plans would take."""
    graph, layers = layer_graph(sizes), sizes.model.num_layers
    own = tuple(name for name in sizes.columns if name != "x")
    saved = tree_bytes(sizes.finetune_arrays["saved"])
    flops = graph.recomputed(own)[0]
    yield (
        f"finetuning saves {', '.join(sizes.columns)}: {saved / 2**20:,.1f} MiB for "
        f"{sizes.finetune_slots:,} tokens; the backward recomputes "
        f"{flops / sizes.finetune_slots * layers / 1e9:.3g} GFLOP a token"
    )
    plans = all_plans(graph)
    for text, plan in (
        ("smallest", plans[0]),
        ("largest", plans[-1]),
    ):
        if set(plan.saved) != set(own):
            yield f"  {text}: {describe_plan(plan, sizes)}"


def describe_plan(plan: Plan, sizes: EngineSizes) -> str:
    """One line."""
    layers = sizes.model.num_layers
    return (
        f"{', '.join(('x', *plan.saved))}: {plan.bytes * layers / 2**20:,.1f} MiB, "
        f"{plan.flops / sizes.finetune_slots * layers / 1e9:.3g} GFLOP a token"
    )
