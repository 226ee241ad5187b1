"""What transformers + PEFT on torch keep for the backward, for the cases of a memory experiment.

The model runs forward on torch's meta device, where nothing is allocated and nothing computed, and
every tensor that autograd saves is counted once, parameters left out. Attention saves what flash
attention does: queries, keys, values, output and log-sum-exp. What the backward allocates on top is
not counted. PEFT has no bottleneck adapters: those are left out.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flexllm_jax.config import ConfigError, load_config
from flexllm_jax.config.cli import needs_extra, run_script
from flexllm_jax.experiments.comparison.experiment import BenchmarkConfig


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="a memory experiment")
    arguments = parser.parse_args()
    section = load_config(arguments.config, [], BenchmarkConfig).memory
    if section is None:
        raise ConfigError(f"{arguments.config}: it has no section `memory`; give one that has")
    with needs_extra("test"):
        from flexllm_jax.experiments.memory.torch_peft import count_cases
    table = Table(title="kept by transformers + PEFT on torch, GB")
    for column in ("model", "tokens", "bypass", "GB"):
        table.add_column(column, justify="right" if column in ("tokens", "GB") else "left")
    for row in count_cases(section):
        size = f"{row['bytes'] / 1e9:.1f}"
        table.add_row(row["model"], f"{row['tokens']:,}", row["bypass"], size)
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    run_script(main)
