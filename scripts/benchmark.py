"""Run an experiment: ways to share a device, compared in simulation and on the real engine.

`--config configs/benchmarks/NAME.yaml` names the systems, the loads, and what is the same for all;
results go to output_dir as results.json, tables and plots. `--only simulation` or `--only engine`
leaves the other half out.
"""

import json
import os
import platform
import sys
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from rich.console import Console

from flexllm_jax.config.cli import (
    check_output_dir,
    make_parser,
    read_config,
    run_script,
)
from flexllm_jax.experiments.comparison import run
from flexllm_jax.experiments.comparison.experiment import BenchmarkConfig


def main() -> int:
    """Run the experiment that the configuration describes."""
    parser = make_parser(__doc__, BenchmarkConfig)
    parser.add_argument("--only", choices=["simulation", "engine"], help="run one half")
    arguments = parser.parse_args()
    config = read_config(arguments, BenchmarkConfig)
    check_output_dir(config.output_dir)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 110)
    results: dict[str, Any] = {"title": config.title, "config": config.model_dump(mode="json")}
    if config.paper_rows and arguments.only != "engine":
        results["paper_rows"] = run.compare_with_paper(config.paper_rows, console)
    if config.simulation and arguments.only != "engine":
        results["simulation"] = run.run_simulations(config, config.simulation, console)
    if config.engine and arguments.only != "simulation":
        results["engine"] = run.run_engines(config, config.engine, console)
    if config.memory:
        results["memory"] = run.run_memory(config, config.memory, console)
    results["environment"] = {"machine": platform.machine(), "python": platform.python_version()}
    file = config.output_dir / "results.json"
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    left = sorted(f.name for f in config.output_dir.iterdir() if f.suffix in (".json", ".png"))
    console.print(f"written: {config.output_dir}/ ({', '.join(left)})")
    return 0


if __name__ == "__main__":
    run_script(main)
