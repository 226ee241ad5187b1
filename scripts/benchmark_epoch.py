"""Measure one epoch beside transformers' Trainer with PEFT on this machine's CPU, in one run.

A small random Llama (33M parameters, float32) and LoRA of rank 16 on all linear layers, over rows
with `question` and `answer` (GSM8K as it is, for example), about 8 rows a step: this engine,
Trainer with its default padding, and Trainer with the rows of a batch packed into one sequence.
Prints a table of tokens that count in the loss per second, writes `epoch.json` and `epoch.png`.
"""

import argparse
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console

from flexllm_jax.config.cli import needs_extra, run_script


def main() -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="JSONL: question, answer")
    parser.add_argument("--out", type=Path, default=Path("runs/epoch"))
    parser.add_argument("--slices", type=int, default=5, help="parts of the epoch, trained in turn")
    parser.add_argument("--limit", type=int, help="only so many rows")
    arguments = parser.parse_args()
    out: Path = arguments.out
    with needs_extra("test"):
        from flexllm_jax.experiments.side_by_side.epoch import compare_epoch
    from flexllm_jax.experiments.side_by_side.report import plot_epoch, show_epoch, write_result
    from flexllm_jax.experiments.side_by_side.small_llama import EPOCH

    result = compare_epoch(arguments.rows, out, EPOCH, arguments.slices, arguments.limit)
    console = Console()
    show_epoch(EPOCH, result, console)
    write_result(result, out / "epoch.json")
    plot_epoch(result, out / "epoch.png")
    console.print(f"written: {out / 'epoch.json'}, {out / 'epoch.png'}")
    return 0


if __name__ == "__main__":
    run_script(main)
