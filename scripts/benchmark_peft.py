"""Measure the engine beside transformers + PEFT on this machine's CPU, in one run.

A small random Llama (33M parameters, float32): finetuning of LoRA rank 16 on all seven projections
with one 512-token sequence a step, decoding of 8 prompts of 128 tokens with 64 new tokens each, and
both at once. Prints a table, writes `benchmark.json` and `benchmark.png`.
Ratios are medians over the rounds.
"""

import argparse
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from rich.console import Console

from flexllm_jax.config.cli import needs_extra, run_script


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="finetuning steps a round")
    arguments = parser.parse_args()
    out: Path = arguments.out
    with needs_extra("test"):
        from flexllm_jax.experiments.side_by_side.compare import compare
    from flexllm_jax.experiments.side_by_side.report import plot, show, write_result
    from flexllm_jax.experiments.side_by_side.small_llama import WORKLOAD

    result = compare(WORKLOAD, out, arguments.rounds, arguments.steps)
    console = Console()
    show(WORKLOAD, result, console)
    write_result(result, out / "benchmark.json")
    plot(result, out / "benchmark.png")
    console.print(f"written: {out / 'benchmark.json'}, {out / 'benchmark.png'}")
    return 0


if __name__ == "__main__":
    run_script(main)
