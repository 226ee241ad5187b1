"""Make what `make demo` runs on: a small language model, and a task it does not know.

A Llama of 1.8 million parameters, or as small a model of another family, is trained for about a
minute on a made-up world (people with a city, a job and a pet; cities, animals, numbers) and
written as a Hugging Face checkpoint. Asked about a person it answers in two sentences. The
finetuning rows ask the same and answer with a record (`Anna: city = Lima | job = baker | pet =
cat`), which it never does; the validation rows ask about other people, so a right answer needs both
the new behaviour and what the base model knows. Questions that it has not heard are to be learnt
from rewards. Beside them lie a bursty trace and prompts. Nothing is downloaded, everything follows
from the seed, and a folder that exists is left alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flexllm_jax.config.cli import run_script
from flexllm_jax.experiments.demo.make import complete, make
from flexllm_jax.experiments.demo.model import FAMILIES

FOLDER = Path(__file__).resolve().parents[1] / "runs/demo-world"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder to make")
    parser.add_argument("--steps", type=int, default=210, help="training steps of the base model")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the trace")
    parser.add_argument("--seed", type=int, default=0, help="seeds all of it")
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="shape of the model")
    parser.add_argument("--force", action="store_true", help="make it again if it exists")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.seconds <= 0:
        parser.error("--steps and --seconds must be positive")
    if options.out.exists() and not options.force:
        complete(options.out, options.seed)
        print(f"{options.out} exists; --force makes it again")
        return 0
    make(options.out, options.steps, options.seed, options.seconds, options.family)
    print(f"made {options.out}")
    return 0


if __name__ == "__main__":
    run_script(main)
