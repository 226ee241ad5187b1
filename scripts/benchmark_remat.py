"""What a layer's activations are, which plans of saving them there are, and what each costs.

Prints, for the model, bank and finetuning slots of a configuration: every array that a framework
would keep of a layer, whether the adapters' gradients need it, and whether the configured plan
saves or recomputes it; then every plan worth having. Unless --analysis is given, it runs a
microbatch under each plan on the device at hand, in turns, and compares their gradients. Writes
remat.json in output_dir.
"""

import json
import os
import platform
import time
from importlib.metadata import version
from statistics import median
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from flexllm_jax.compile.remat import INPUT, PAGES, LayerGraph, Plan, all_plans
from flexllm_jax.config import Config, ConfigError
from flexllm_jax.config.cli import (
    check_output_dir,
    make_parser,
    read_config,
    run_script,
    shows_progress,
    without_jobs,
)
from flexllm_jax.engine.activations import choose_saved, layer_graph
from flexllm_jax.engine.batch import Batch
from flexllm_jax.engine.cache import device_memory, tree_bytes
from flexllm_jax.engine.programs import EngineSizes
from flexllm_jax.engine.runner import Runner
from flexllm_jax.models.config import ModelConfig
from kernels_pallas.backend import select_backend

Row = dict[str, Any]


def main() -> int:
    """Analyse, measure, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--analysis", action="store_true", help="run nothing")
    parser.add_argument("--rounds", type=int, default=5, help="microbatches timed of each plan")
    arguments = parser.parse_args()
    config = without_jobs(read_config(arguments))
    config.require_inputs()
    check_output_dir(config.output_dir)
    console = Console(width=None if shows_progress() else 130)
    model = ModelConfig.from_hf(config.model.path)
    device = jax.devices()[0]
    sizes = EngineSizes.from_config(config, model, select_backend(config.kernels, device))
    available = int(device_memory(device) * config.cache.memory_fraction)
    sizes = choose_saved(config, sizes, available)
    graph = layer_graph(sizes)
    saved = tuple(name for name in sizes.columns if name != INPUT)
    rows = activations(graph, saved)
    console.print(activation_table(rows, sizes))
    for line in summary(graph, saved):
        console.print(line)
    plans = all_plans(graph)
    result: Row = {
        "model": str(config.model.path),
        "tokens": sizes.slots,
        "saved": saved,
        "activations": rows,
        "plans": [plan_row(plan, sizes) for plan in plans],
        "environment": {
            "machine": platform.machine(),
            "device": device.device_kind,
            "versions": {name: version(name) for name in ("jax", "jaxlib")},
        },
    }
    if not arguments.analysis:
        measure(config, plans, arguments.rounds, result["plans"], console)
    console.print(plan_table(result["plans"], sizes))
    config.output_dir.mkdir(parents=True, exist_ok=True)
    file = config.output_dir / "remat.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {file}")
    return 0


# -- the analysis ----------------------------------------------------------------------------------


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
    table = Table(title=f"what a framework keeps of one layer, {sizes.slots:,} tokens")
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
        "recomputed_flops_per_token": plan.flops * layers / sizes.slots,
    }


def plan_table(rows: list[Row], sizes: EngineSizes) -> Table:
    """The plans from the smallest to the largest."""
    table = Table(title=f"plans for {sizes.slots:,} tokens, all layers")
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


# -- the measurement -------------------------------------------------------------------------------


class Microbatch:
    """The finetuning slots filled with sequences of random tokens, and an adapter to train."""

    def __init__(self, runner: Runner):
        self.runner, sizes = runner, runner.sizes
        self.bucket = sizes.buckets[-1]
        self.length = sizes.max_model_len // self.bucket * self.bucket
        count = sizes.slots // self.length if self.length else 0
        if not count or sizes.slots % self.length:
            raise ConfigError(
                f"finetune.max_tokens: got {sizes.slots}; to fill it, it must be a multiple of "
                f"{self.length or self.bucket}, the part of model.max_model_len "
                f"({sizes.max_model_len}) that steps of {self.bucket} tokens fill"
            )
        random = np.random.default_rng(0)
        self.tokens = random.integers(0, runner.model.vocab_size, sizes.slots)
        self.position = np.tile(np.arange(self.length), count)
        pages = -(-self.length // sizes.page_size)
        self.tables = np.arange(count * pages).reshape(count, pages)
        offset = np.arange(self.length)
        self.kv_slot = (
            self.tables[:, offset // sizes.page_size] * sizes.page_size + offset % sizes.page_size
        ).reshape(-1)
        first = np.repeat(np.arange(count) * self.length, self.length)
        label = np.where(self.position < self.length - 1, np.roll(self.tokens, -1), -1)
        table = np.stack([label, self.position, self.kv_slot, first]).astype(np.int32)
        self.table = jax.device_put(table, runner.device)
        values, scales = sizes.bank_row
        self.weights = jax.tree.map(
            lambda s: random.normal(0, 0.02, s.shape).astype(s.dtype), values
        )
        runner.write_adapter(
            1, self.weights, jax.tree.map(lambda s: np.ones(s.shape, s.dtype), scales)
        )
        self.weights = jax.device_put(self.weights, runner.device)
        ones = jax.tree.map(lambda s: np.ones(1, s.dtype), scales)
        self.scales = jax.device_put(ones, runner.device)
        self.vectors = [self._batch(start) for start in range(0, sizes.slots, self.bucket)]

    def _batch(self, start: int) -> np.ndarray:
        sizes = self.runner.sizes
        shape = sizes.batch_shapes[self.bucket]
        kv_slots = self.runner.num_pages * sizes.page_size
        batch, vector = Batch.empty(shape, kv_slots, sizes.slots)
        rows = slice(start, start + self.bucket)
        batch.token[:], batch.position[:] = self.tokens[rows], self.position[rows]
        batch.kv_slot[:], batch.saved_row[:] = self.kv_slot[rows], np.arange(rows.start, rows.stop)
        batch.adapter[:] = 0
        batch.query_starts[1:] = self.bucket
        batch.kv_lengths[0] = self.position[rows][-1] + 1
        own = self.tables[start // self.length]
        batch.page_tables[0, : len(own)] = own
        batch.num_sequences[...] = 1
        return vector

    def run(self) -> float:
        """Forward and backward once; seconds."""
        runner, window = self.runner, self.runner.sizes.window
        starts = list(reversed(range(0, runner.sizes.slots, window)))
        began = time.perf_counter()
        for vector in self.vectors:
            runner.forward("adapters", self.bucket, vector)
        runner.begin_backward()
        for start in starts:
            done = runner.loss_unit(self.table, self.weights, self.scales, start)
        for layer in reversed(range(runner.model.num_layers)):
            for start in starts:
                done = runner.layer_unit(layer, self.table, self.weights, self.scales, start)
        jax.block_until_ready(done)
        return time.perf_counter() - began

    def gradients(self) -> np.ndarray:
        """Of the last run, as one vector."""
        leaves = jax.tree.leaves(jax.device_get(self.runner.pending["gradients"]))
        return np.concatenate([leaf.ravel() for leaf in leaves])


def measure(
    config: Config, plans: list[Plan], rounds: int, rows: list[Row], console: Console
) -> None:
    """Add each plan's speed and measured bytes to its row, and how far its gradients are from those
    of the plan that recomputes least."""
    microbatches = []
    for plan in plans:
        console.print(f"compiling: {', '.join((INPUT, *plan.saved))}")
        finetune = config.finetune.model_copy(update={"saved": plan.saved})
        runner = Runner(config.model_copy(update={"finetune": finetune}), progress=False)
        microbatches.append(Microbatch(runner))
        microbatches[-1].run()
    expected = microbatches[-1].gradients()
    seconds = [[one.run() for one in microbatches] for _ in range(rounds)]
    for row, one, own in zip(rows, microbatches, zip(*seconds, strict=True), strict=True):
        slots = one.runner.sizes.slots
        row["rounds"] = [slots / s for s in own]
        row["tokens_per_s"] = median(row["rounds"])
        row["allocated_bytes"] = tree_bytes(one.runner.finetune["saved"])
        difference = np.linalg.norm(one.gradients() - expected) / np.linalg.norm(expected)
        row["gradient_difference"] = float(difference)


if __name__ == "__main__":
    run_script(main)
