"""Which activations of the finetuning forward the engine saves: `finetune.saved` and what memory is
free decide (`compile.remat` finds what there is to choose from)."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cache
from math import inf

import jax.numpy as jnp

from flexllm_jax.compile.layer_graph import LayerGraph, trace_layer
from flexllm_jax.compile.remat import Plan, all_plans, make_plan
from flexllm_jax.config import Config, ConfigError
from flexllm_jax.engine.memory.cache import tree_bytes
from flexllm_jax.engine.memory.plan import fixed_parts
from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.finetune.backward import job_bypass
from flexllm_jax.finetune.buffers import columns_of_kind, saved_columns
from flexllm_jax.models.checkpoints.hf_weights import abstract_parameters
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.spec import AttentionSpec, LayerSpec
from flexllm_jax.peft.bank import BankShape, weight_shapes
from flexllm_jax.peft.stacks import shapes_of_one
from kernels_pallas.backend import XLA

# Of what weights and adapters leave, the part that `auto` may take from KV pages.
_AUTO_SHARE = 0.25


def layer_graph(sizes: EngineSizes, kind: int = 0) -> LayerGraph:
    """The trace of a layer of that kind with the bypasses of the bank, over the finetuning slots.
    Layers that differ in no array have the same: that of those whose attention costs most."""
    kinds = sizes.model.kinds
    alike = [spec for spec in kinds if spec.arrays == kinds[kind].arrays]
    spec = max(alike, key=_most_keys)
    return _traced(sizes.model, spec, sizes.dtype, sizes.bank, sizes.finetune_slots)


def _most_keys(spec: LayerSpec) -> float:
    mixer = spec.mixer
    return (mixer.options.window or inf) if isinstance(mixer, AttentionSpec) else 0


@cache
def _traced(
    model: ModelConfig, spec: LayerSpec, dtype: jnp.dtype, bank: BankShape, tokens: int
) -> LayerGraph:
    layer = model.layers.index(spec)
    stack, _ = bank.stacks(model).place(layer)
    weights = shapes_of_one(weight_shapes(model, bank, None, jnp.float32)[stack])
    scales = dict.fromkeys(weights, jnp.ones(1))
    is_token = jnp.ones(tokens, bool)
    return trace_layer(
        Decoder(model, dtype),
        spec,
        abstract_parameters(model, dtype)["layers"][layer],
        weights,
        lambda own: job_bypass({"weights": own, "scales": scales}, is_token, XLA),
        tokens,
    )


def saved_names(sizes: EngineSizes) -> tuple[str, ...]:
    """What is saved in some layer, its input first."""
    return tuple(dict.fromkeys(name for columns in sizes.columns for name in columns))


def recomputed(sizes: EngineSizes) -> float:
    """FLOPs that the backward of all layers computes again, of as many tokens as there are
    slots."""
    return sum(
        layer_graph(sizes, kind).recomputed(n for n in sizes.columns[kind] if n != "x")[0]
        for kind in sizes.model.kind_of
    )


def with_saved(sizes: EngineSizes, names: Collection[str]) -> EngineSizes:
    """The sizes with these taps saved, in the layers that have them."""
    taps = {name for spec in sizes.decoder.config.kinds for name in sizes.decoder.taps(spec)}
    if unknown := set(names) - taps:
        raise ConfigError(
            f"finetune.saved names {', '.join(sorted(unknown))}, which this model does not "
            f"have: use auto, all, attention or some of {', '.join(sorted(taps))}"
        )
    return replace(sizes, columns=saved_columns(sizes.decoder, names))


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
    if saved == "all":
        return _within(sizes, inf)
    smallest = with_saved(sizes, ())
    pages = config.cache.num_pages or sizes.wanted_pages
    left = available - sum(fixed_parts(config, smallest).values())
    spare = left - pages * sizes.page_bytes
    budget = spare if config.cache.num_pages else max(spare, _AUTO_SHARE * left)
    return _within(sizes, budget * sizes.devices / sizes.model.num_layers)


def _within(sizes: EngineSizes, budget: float) -> EngineSizes:
    """The sizes with the best plan of every kind of layer within a budget for each."""
    decoder = sizes.decoder
    return replace(
        sizes,
        columns=tuple(
            columns_of_kind(decoder, spec, make_plan(layer_graph(sizes, kind), budget).saved)
            for kind, spec in enumerate(decoder.config.kinds)
        ),
    )


def describe_saved(sizes: EngineSizes) -> Iterator[str]:
    """Lines for the start-up log: what is saved, what that makes the backward compute again, and
    what the neighbouring plans would take."""
    saved, layers = tree_bytes(sizes.finetune_arrays["saved"]), sizes.model.num_layers
    yield (
        f"finetuning saves {', '.join(saved_names(sizes))}: {saved / 2**20:,.1f} MiB for "
        f"{sizes.finetune_slots:,} tokens; the backward recomputes "
        f"{recomputed(sizes) / sizes.finetune_slots / 1e9:.3g} GFLOP a token"
    )
    for text, at in (("smallest", 0), ("largest", -1)):
        plans = [all_plans(layer_graph(sizes, kind))[at] for kind in sizes.model.kind_of]
        names = {name for plan in plans for name in plan.saved}
        if names != set(saved_names(sizes)) - {"x"}:
            total = Plan(
                tuple(dict.fromkeys(name for plan in plans for name in plan.saved)),
                sum(plan.bytes for plan in plans) // layers,
                sum(plan.flops for plan in plans) / layers,
            )
            yield f"  {text}: {describe_plan(total, sizes)}"


def describe_plan(plan: Plan, sizes: EngineSizes) -> str:
    """One line."""
    layers = sizes.model.num_layers
    return (
        f"{', '.join(('x', *plan.saved))}: {plan.bytes * layers / 2**20:,.1f} MiB, "
        f"{plan.flops / sizes.finetune_slots * layers / 1e9:.3g} GFLOP a token"
    )
