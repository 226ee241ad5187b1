"""Rematerialization (FlexLLM, section 5): which of what a layer's backward needs is kept.

`layer_graph` finds what is needed. A plan saves some of it and computes the rest again. An array
that the layer taps (`models.decoder`) can be saved; the layer's input is in any case, and keys and
values are in their pages anyway.

A plan is exact: of all sets of tapped arrays that fit the budget, the one with the fewest FLOPs to
recompute, so a larger budget never means more. Any plan gives the same gradients.
"""

from dataclasses import dataclass
from itertools import chain, combinations

from flexllm_jax.compile.layer_graph import LayerGraph

_MOST_TAPPED = 16


@dataclass(frozen=True)
class Plan:
    """Which taps of every layer to save.

    saved: their names. bytes: of a layer's saved arrays for the tokens traced, the input included
    and keys and values, which are in their pages, not. flops: to recompute in a layer.
    """

    saved: tuple[str, ...]
    bytes: int
    flops: float


def make_plan(graph: LayerGraph, budget: float) -> Plan:
    """The plan with the least to recompute whose saved arrays take at most `budget` bytes a layer
    beyond the input's; of equal ones the smallest. A budget below 0 is as good as 0.

    Exact: every set of taps is looked at (a layer has less than ten).
    """
    most = max(budget, 0) + _input_bytes(graph)
    return next(plan for plan in reversed(all_plans(graph)) if plan.bytes <= most)


def all_plans(graph: LayerGraph) -> list[Plan]:
    """The plans worth having, from the smallest to the one with the least to recompute: each saves
    more than the one before and recomputes less."""
    names = graph.candidates
    if len(names) > _MOST_TAPPED:
        raise ValueError(f"{len(names)} taps in a layer: at most {_MOST_TAPPED} can be searched")
    plans = []
    for saved in chain.from_iterable(combinations(names, n) for n in range(len(names) + 1)):
        size = _input_bytes(graph) + graph.bytes_saved(saved)
        plans.append(Plan(saved, size, graph.recomputed(saved)[0]))
    worth: list[Plan] = []
    for plan in sorted(plans, key=lambda p: (p.bytes, p.flops, len(p.saved))):
        if not worth or plan.flops < worth[-1].flops:
            worth.append(plan)
    return worth


def _input_bytes(graph: LayerGraph) -> int:
    return graph.activations[graph.input].bytes
