"""Simulate an engine or a fleet: the scheduler's own code on a virtual clock.

Prints a summary, and writes report.json (what the engine reports) and report.png to output_dir.
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from flexllm_jax.config.cli import (
    check_output_dir,
    make_parser,
    read_config,
    run_script,
    shows_progress,
)
from flexllm_jax.experiments.simulation.config import SimulationConfig
from flexllm_jax.experiments.simulation.report import comparison_table, figures, plot_series
from flexllm_jax.experiments.simulation.simulate import Simulation, simulate


def main() -> int:
    """Run the simulation that the configuration describes."""
    arguments = make_parser(__doc__, SimulationConfig).parse_args()
    config = read_config(arguments, SimulationConfig)
    check_output_dir(config.output_dir)
    console = Console(width=None if sys.stdout.isatty() else 110)
    with Progress(console=Console(stderr=True), disable=not shows_progress()) as bar:
        task = bar.add_task("requests", total=None)
        made = simulate(config, lambda done, total: bar.update(task, completed=done, total=total))
    console.print(comparison_table([(config.policy, figures(made.report))]))
    for path in write(made, config.output_dir):
        console.print(f"written: {path}")
    return 0


def write(made: Simulation, out: Path) -> list[Path]:
    """Write the report and, if progress was noted, the plot."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / "report.json"]
    files[0].write_text(json.dumps(made.report, indent=2) + "\n", encoding="utf-8")
    if any(engine.samples for engine in made.engines):
        files.append(out / "report.png")
        plot_series({made.config.policy: made}, files[1])
    return files


if __name__ == "__main__":
    run_script(main)
