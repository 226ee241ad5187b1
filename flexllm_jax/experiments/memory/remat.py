"""A layer's activations, and every plan of saving them that is worth having.

For the model, bank and finetuning slots of an engine: the arrays that a framework would keep of one
layer, whether the adapters' gradients need them, and whether the engine's plan saves or recomputes
them; then all plans, from the smallest to the largest.
"""

from __future__ import annotations

from typing import Any

from rich.table import Table

from flexllm_jax.compile.layer_graph import INPUT, LayerGraph
from flexllm_jax.compile.remat import Plan
from flexllm_jax.compile.whole_layer import PAGES
from flexllm_jax.config import Config
from flexllm_jax.engine.memory.activations import choose_saved
from flexllm_jax.engine.memory.plan import choose_backend, memory_budget
from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.models.config import ModelConfig

Row = dict[str, Any]


def planned_sizes(config: Config, device: Any) -> EngineSizes:
    """The engine of a configuration on a device, with its plan of what to save chosen."""
    model = ModelConfig.from_hf(config.model.path, config.model.max_model_len)
    backend = choose_backend(config, device)
    sizes = EngineSizes.from_config(config, model, device.platform, backend)
    return choose_saved(config, sizes, memory_budget(config, device))


def activations(graph: LayerGraph, saved: tuple[str, ...]) -> list[Row]:
    """Every array that a framework keeps of a layer, and what becomes of it here."""
    _, made = graph.recomputed(saved)
    rows = []
    for array in graph.kept:
        one = graph.activations[array]
        if array not in graph.needed:
            fate = "pruned"
        elif array in made:
            fate = "recomputed"
        else:
            fate = "in KV pages" if array in graph.named[PAGES] else "saved"
        rows.append(
            {
                "array": one.label,
                "made_by": one.where,
                "shape": one.shape,
                "dtype": one.dtype,
                "bytes": one.bytes,
                "flops": graph.recomputed(saved, [array])[0] if array in made else 0.0,
                "fate": fate,
            }
        )
    return rows


def activation_table(rows: list[Row], sizes: EngineSizes) -> Table:
    """The arrays of one layer."""
    table = Table(title=f"what a framework keeps of one layer, {sizes.finetune_slots:,} tokens")
    for column in ("array", "made by", "shape", "dtype", "MiB", "MFLOP again", "here"):
        table.add_column(column, justify="right" if column.startswith("M") else "left")
    for row in rows:
        table.add_row(
            row["array"],
            row["made_by"],
            "x".join(map(str, row["shape"])),
            row["dtype"],
            f"{row['bytes'] / 2**20:.2f}",
            f"{row['flops'] / 1e6:,.1f}" if row["fate"] == "recomputed" else "",
            row["fate"],
        )
    return table


def summary(graph: LayerGraph, saved: tuple[str, ...]) -> list[str]:
    """Bytes of the four sets, and the FLOPs of the last."""
    flops, made = graph.recomputed(saved)
    sets = {
        "a framework keeps": graph.kept,
        "the adapters' gradients need": graph.needed,
        "saved": [graph.input, *(i for name in saved for i in graph.named[name])],
        "in KV pages": graph.named[PAGES],
        "needed and recomputed": [array for array in graph.needed if array in made],
    }
    lines = [f"{name}: {graph.bytes_of(arrays) / 2**20:,.2f} MiB" for name, arrays in sets.items()]
    return [*lines[:-1], f"{lines[-1]}, with {flops / 1e6:,.1f} MFLOP"]


def plan_row(plan: Plan, sizes: EngineSizes) -> Row:
    """A plan over all layers."""
    layers = sizes.model.num_layers
    return {
        "saved": [INPUT, *plan.saved],
        "bytes": plan.bytes * layers,
        "recomputed_flops_per_token": plan.flops * layers / sizes.finetune_slots,
    }


def plan_table(rows: list[Row], sizes: EngineSizes) -> Table:
    """The plans from the smallest to the largest."""
    table = Table(title=f"plans for {sizes.finetune_slots:,} tokens, all layers")
    table.add_column("saved")
    measured = "tokens_per_s" in rows[0]
    for column in ("MiB", "MFLOP/token again", *(("tokens/s", "gradients off by") * measured)):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [f"{row['bytes'] / 2**20:,.1f}", f"{row['recomputed_flops_per_token'] / 1e6:,.2f}"]
        if measured:
            low, high = min(row["rounds"]), max(row["rounds"])
            cells += [f"{row['tokens_per_s']:,.0f} ({low:,.0f} to {high:,.0f})"]
            cells += [f"{row['gradient_difference']:.0e}"]
        table.add_row(", ".join(row["saved"]), *cells)
    return table
