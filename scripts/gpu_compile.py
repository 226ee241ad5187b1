"""Compile every kernel and the engine's programs for H200 and A100, without a GPU.

Each kernel compiles at the shapes of its `arg_specs.py`, the engine's programs at those of
Llama-3.1-8B (nothing is allocated). Prints a table and writes it as JSON: shared memory, registers
and spills of the kernels, temporary bytes, donated bytes updated in place, launches and how many of
them no CUDA graph holds. Exit status 1 when something does not compile, spills, or is copied.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import jax
from llama_8b import write_config
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flexllm_jax.config import Config
from flexllm_jax.engine.programs import EngineSizes, list_programs
from flexllm_jax.models.config import ModelConfig
from kernels_pallas.backend import Backend
from kernels_pallas.gpu_target import CompiledProgram, Target, compile_for

KERNELS = ("ragged_paged_attention", "window_attention_backward", "grouped_lora")
TARGETS = Path(__file__).parent / "gpu_targets"
# The engine's programs that run in a step; their sizes are those of an 80 GB or larger GPU.
ENGINE_PROGRAMS = (
    "forward/base/256",
    "forward/adapters/256",
    "forward/base/2048",
    "forward/adapters/2048",
    "sample/greedy/256",
    "sample/full/256",
    "loss_unit",
    "layer_unit",
    "optimizer_step",
)
ENGINE_CONFIG = {
    "model": {"path": "llama-3.1-8b", "dtype": "bfloat16", "max_model_len": 16384},
    "cache": {"page_size": 64},
    "adapters": {"slots": 8, "max_rank": 16},
    "scheduler": {"max_sequences": 256, "max_tokens_per_step": 2048},
    "finetune": {"max_tokens": 8192, "window": 1024},
    "compile": {"token_buckets": [256, 2048]},
}
ENGINE_PAGES = 4096
_QUICK_LAYERS = 4


@dataclass(frozen=True)
class Job:
    """One program to compile for one target."""

    kind: str
    name: str
    target: Target
    function: Callable
    arguments: tuple
    donated: tuple[int, ...]


def kernel_jobs(target: Target, match: str, quick: bool) -> Iterator[Job]:
    """Every case of every kernel, or those of one model and of odd shapes."""
    backend = Backend("pallas", target.name)
    key = jax.eval_shape(lambda: jax.random.key(0))
    for kernel in KERNELS:
        for case in import_module(f"kernels_pallas.{kernel}.arg_specs").CASES:
            skipped = quick and "/tp" in case.name and "llama-3.1-8b/tp1" not in case.name
            name = f"{kernel}/{case.name}"
            if match in name and target.name in case.chips and not skipped:
                arguments = jax.eval_shape(case.make, key)
                function = partial(case.function, backend=backend)
                yield Job(kernel, case.name, target, function, arguments, case.donated)


def engine_jobs(target: Target, match: str, quick: bool) -> Iterator[Job]:
    """The engine's programs at the size of Llama-3.1-8B, or of a few of its layers."""
    with tempfile.TemporaryDirectory() as folder:
        model = ModelConfig.from_hf(write_config(Path(folder)))
    if quick:
        model = replace(model, num_layers=_QUICK_LAYERS)  # they are all alike
    config = Config.model_validate(ENGINE_CONFIG)
    sizes = EngineSizes.from_config(config, model, Backend("pallas", target.name))
    for program in list_programs(sizes, ENGINE_PAGES):
        if program.name in ENGINE_PROGRAMS and match in f"engine/{program.name}":
            yield Job(
                "engine",
                program.name,
                target,
                program.function,
                program.arguments,
                program.donated,
            )


def compile_job(job: Job) -> CompiledProgram | str:
    """What the program is made of, or why it does not compile."""
    try:
        return compile_for(job.target, job.function, job.arguments, job.donated)
    except Exception as error:  # the table says which and why; the others go on
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def describe(result: CompiledProgram) -> list[str]:
    """The cells of a row of the table."""
    kernels = result.kernels
    outside = ", ".join(f"{count} {name}" for name, count in result.outside_graphs.items())
    return [
        " ".join(f"{k.shared / 1024:.0f}" for k in kernels),
        " ".join(str(k.registers) for k in kernels),
        str(sum(k.spilled for k in kernels)),
        f"{result.temp / 2**20:,.1f}",
        f"{result.aliased / 2**20:,.0f} / {result.donated / 2**20:,.0f}",
        str(result.launches),
        outside or "0",
    ]


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    chips = sorted(file.stem for file in TARGETS.glob("*.txtpb"))
    parser.add_argument("--chip", action="append", choices=chips, help="default: all")
    parser.add_argument("--case", default="", help="only names that contain this")
    parser.add_argument("--quick", action="store_true", help="kernels of one model, few layers")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_compile.json"))
    arguments = parser.parse_args()

    targets = [Target.read(TARGETS / f"{chip}.txtpb") for chip in arguments.chip or chips]
    jobs = [
        job
        for t in targets
        for job in (
            *kernel_jobs(t, arguments.case, arguments.quick),
            *engine_jobs(t, arguments.case, arguments.quick),
        )
    ]
    if not jobs:
        parser.error(f"--case {arguments.case!r} is in no name")
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = list(track(pool.map(compile_job, jobs), "compiling", total=len(jobs)))

    table = Table(title="compiled without a GPU")
    for column in (
        "chip",
        "program",
        "shared KiB",
        "registers",
        "spills",
        "temp MiB",
        "in place / donated MiB",
        "launches",
        "outside graphs",
        "faults",
    ):
        table.add_column(column, overflow="fold")
    rows, failed = [], 0
    for job, result in zip(jobs, results, strict=True):
        faults = [result] if isinstance(result, str) else result.faults(job.target)
        failed += bool(faults)
        cells = [""] * 7 if isinstance(result, str) else describe(result)
        table.add_row(job.target.name, f"{job.kind}/{job.name}", *cells, "; ".join(faults))
        row = {"chip": job.target.name, "kind": job.kind, "name": job.name, "faults": faults}
        rows.append(row if isinstance(result, str) else row | result.as_dict())
    Console(width=None if os.isatty(1) else 220).print(table)
    versions = {name: version(name) for name in ("jax", "jaxlib", "jax-cuda12-plugin")}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        json.dumps({"versions": versions, "programs": rows}, indent=1) + "\n", encoding="utf-8"
    )
    print(f"{len(jobs)} programs, {failed} with faults; written: {arguments.out}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
