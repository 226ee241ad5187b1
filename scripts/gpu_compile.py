"""Compile every kernel and the engine's programs for H100, H200 and A100, without a GPU.

Each kernel compiles at the shapes of its `arg_specs.py`, the engine's programs at those of
Llama-3.1-8B and of Qwen3.5-9B (nothing is allocated). Prints a table and writes it as JSON: shared
memory, registers and spills of the kernels, temporary bytes, donated bytes updated in place,
launches and how many of them no CUDA graph holds. Exit status 1 when something does not compile,
spills much, is copied, or has grown by over 5 % since it was recorded
(`flexllm_jax/experiments/gpu/compiled.json`).
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import json
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from flexllm_jax.config.cli import run_script
from flexllm_jax.experiments.gpu.compile import chips, compilations, compile_all
from flexllm_jax.experiments.gpu.growth import grown, record


def main() -> int:
    """Compile, print, write; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--chip", action="append", choices=chips(), help="default: all")
    parser.add_argument("--case", default="", help="only names that contain this")
    parser.add_argument("--quick", action="store_true", help="kernels of one model, few layers")
    parser.add_argument("--record", action="store_true", help="what is compared with from now on")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_compile.json"))
    arguments = parser.parse_args()
    jobs = compilations(arguments.chip or chips(), arguments.case, arguments.quick)
    if not jobs:
        parser.error(f"--case {arguments.case!r} is in no name")
    table, rows = compile_all(jobs)
    Console(width=None if os.isatty(1) else 220).print(table)
    versions = {name: version(name) for name in ("jax", "jaxlib", "jax-cuda12-plugin")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        json.dumps({"versions": versions, "programs": rows}, indent=1) + "\n", encoding="utf-8"
    )
    failed = sum(bool(row["faults"]) for row in rows)
    more = [] if arguments.record else grown(rows, versions)
    if arguments.record:
        record(rows, versions)
    for line in more:
        print(f"grown by over 5 % (--record, if that is meant): {line}")
    print(f"{len(jobs)} programs, {failed} with faults; written: {arguments.out}")
    return int(failed > 0 or bool(more))


if __name__ == "__main__":
    run_script(main)
