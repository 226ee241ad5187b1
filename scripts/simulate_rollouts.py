"""Predict what a reinforcement job's answers and training take, and measure it.

Runs the configuration's first job, which learns from rewards, with the workload beside it, and the
same in the simulator with the step times that were measured. Prints both throughputs; exit status 1
if they differ by over 20 %.
"""

import json

from rich.console import Console

from flexllm_jax.config import Config
from flexllm_jax.config.cli import check_output_dir, make_parser, read_config, run_script

MOST = 0.2


def main() -> int:
    """Measure and predict; returns the exit status."""
    arguments = make_parser(__doc__, Config).parse_args()
    config = read_config(arguments, Config)
    check_output_dir(config.output_dir)
    from flexllm_jax.experiments.comparison.rollouts import compare_rollouts

    made = compare_rollouts(config)
    console = Console()
    for name in ("measured", "predicted"):
        own = made[name]
        console.print(
            f"{name:10} {own['sampled_tokens_per_s']:8.0f} tokens/s answered, "
            f"{own['trained_tokens_per_s']:8.0f} trained, {own['seconds']:.1f} s"
        )
    console.print(f"predicted / measured: {made['predicted_over_measured']:.2f}")
    out = config.output_dir / "rollouts.json"
    out.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    console.print(f"written: {out}")
    return int(abs(made["predicted_over_measured"] - 1) > MOST)


if __name__ == "__main__":
    run_script(main)
