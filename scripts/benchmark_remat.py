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
import sys
from importlib.metadata import version
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
from rich.console import Console

from flexllm_jax.compile.layer_graph import INPUT
from flexllm_jax.compile.remat import all_plans
from flexllm_jax.config.cli import (
    check_output_dir,
    make_parser,
    read_config,
    run_script,
    without_jobs,
)
from flexllm_jax.engine.memory.activations import layer_graph, saved_names
from flexllm_jax.experiments.memory import remat, remat_speed


def main() -> int:
    """Analyse, measure, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--analysis", action="store_true", help="run nothing")
    parser.add_argument("--rounds", type=int, default=5, help="microbatches timed of each plan")
    arguments = parser.parse_args()
    config = without_jobs(read_config(arguments))
    config.require_inputs()
    check_output_dir(config.output_dir)
    console = Console(width=None if sys.stdout.isatty() else 130)
    device = jax.devices()[0]
    sizes = remat.planned_sizes(config, device)
    graph = layer_graph(sizes)
    saved = tuple(name for name in saved_names(sizes) if name != INPUT)
    activations = remat.activations(graph, saved)
    console.print(remat.activation_table(activations, sizes))
    for line in remat.summary(graph, saved):
        console.print(line)
    plans = all_plans(graph)
    rows = [remat.plan_row(plan, sizes) for plan in plans]
    if not arguments.analysis:
        remat_speed.measure(config, plans, arguments.rounds, rows, console)
    console.print(remat.plan_table(rows, sizes))
    result: dict[str, Any] = {
        "model": str(config.model.path),
        "tokens": sizes.finetune_slots,
        "saved": saved,
        "activations": activations,
        "plans": rows,
        "environment": {
            "machine": platform.machine(),
            "device": device.device_kind,
            "versions": {name: version(name) for name in ("jax", "jaxlib")},
        },
    }
    config.output_dir.mkdir(parents=True, exist_ok=True)
    file = config.output_dir / "remat.json"
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {file}")
    return 0


if __name__ == "__main__":
    run_script(main)
