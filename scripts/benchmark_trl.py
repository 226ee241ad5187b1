"""Learn from rewards beside TRL's GRPOTrainer on this machine's CPU, in one run.

The model and the task are those of `make demo-rl`: eight answers to each of eight prompts a step,
LoRA of rank 16 on all linear layers. Fresh adapters are trained in turns by TRL (transformers'
generation) and by this engine, with answers from the weights that are trained and from those of a
step before. Prints answered tokens/s and the time to a mean reward, as ratios too, and how far
advantages and loss of TRL's first step are from what is computed here of the same answers. Writes
`trl.json`.
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
    """Run the benchmark; returns the exit status: 1 if advantages or loss differ by over 1e-4."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--world", type=Path, default=Path("runs/demo-world"))
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of a run")
    parser.add_argument("--reward", type=float, default=0.5, help="the mean reward to reach")
    parser.add_argument("--torch-threads", type=int, default=1, help="0: as many as PyTorch likes")
    arguments = parser.parse_args()
    with needs_extra("trl"):
        from flexllm_jax.experiments.side_by_side.trl import WithTrl
    from flexllm_jax.experiments.side_by_side.answers import AnswerTask, compare_answers
    from flexllm_jax.experiments.side_by_side.report import show_answers, write_result

    world: Path = arguments.world
    task = AnswerTask(
        world / "model", world / "questions.jsonl", steps=arguments.steps, reward=arguments.reward
    )
    theirs = WithTrl(task, arguments.out, arguments.torch_threads or None)
    result = compare_answers(task, theirs, arguments.out, arguments.rounds)
    console = Console()
    show_answers(result, console)
    write_result(result, arguments.out / "trl.json")
    console.print(f"written: {arguments.out / 'trl.json'}")
    return int(max(result["first_step"].values()) > 1e-4)


if __name__ == "__main__":
    run_script(main)
