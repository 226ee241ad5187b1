"""Every kernel and the engine's programs, compiled for a GPU that is not there.

Each kernel compiles at the shapes of its `arg_specs.py`, the engine's programs at those of
Llama-3.1-8B and of a hybrid (nothing is allocated). `targets/` describes the GPUs, as XLA's
GpuTargetConfigProto. Faults are what does not compile, spills registers, or copies what it should
update in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flexllm_jax.config import Config
from flexllm_jax.engine.device.programs import list_programs
from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.models.config import ModelConfig
from kernels_pallas.backend import Backend, chip_name
from kernels_pallas.cases import KERNELS, arg_specs
from kernels_pallas.gpu_target import CompiledProgram, Target, compile_for

TARGETS = Path(__file__).parent / "targets"
MODELS = Path(__file__).parents[3] / "configs" / "models"
# The engine's programs that run in a step; their sizes are those of an 80 GB or larger GPU.
_ENGINE_PROGRAMS = (
    "forward/base/256",
    "forward/adapters/256",
    "forward/base/2048",
    "forward/adapters/2048",
    "sample/greedy/256",
    "sample/adjusted/256",
    "sample/drawn/256",
    "sample/filtered/256",
    "logprobs/256",
    "unit/score",
    "unit/loss",
    "unit/layer",
    "unit/layer/slices-8",
    "optimizer_step",
    "optimizer_step/muon",
    "commit",
    "begin_backward",
    "clear",
)
# Of a hybrid, those that its layers change; few of them are compiled with `quick`.
_HYBRID_PROGRAMS = (
    *("forward/base/256", "forward/adapters/256", "forward/base/2048", "forward/adapters/2048"),
    *("unit/loss", "unit/layer", "unit/layer/1", "unit/layer/slices-8", "unit/layer/1/slices-8"),
    *("copy_slot", "begin_backward", "clear", "commit", "optimizer_step"),
)
_HYBRID_QUICK = ("forward/base/256", "forward/adapters/2048", "unit/layer", "unit/layer/1")
# Model -> its programs, and those with `quick`.
_ENGINES = {
    "llama-3.1-8b": (_ENGINE_PROGRAMS, _ENGINE_PROGRAMS),
    "qwen3.5-9b": (_HYBRID_PROGRAMS, _HYBRID_QUICK),
}
_ENGINE_CONFIG = {
    "model": {"path": "model", "dtype": "bfloat16", "max_model_len": 16384},
    "cache": {"page_size": 64},
    "adapters": {"slots": 8, "max_rank": 16},
    "scheduler": {"max_sequences": 256, "max_tokens_per_step": 2048},
    "finetune": {"max_tokens": 8192, "unit_tokens": 1024, "optimizers": ["muon"]},
    "compile": {"token_buckets": [256, 2048]},
}
_ENGINE_PAGES = 4096
_QUICK_LAYERS = 4
_QUICK_MODELS = ("llama-3.1-8b/tp1", "qwen3.5-9b/tp1")
COLUMNS = (
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
)


def chips() -> list[str]:
    """Names of the GPUs that can be compiled for."""
    return sorted(file.stem for file in TARGETS.glob("*.txtpb"))


@dataclass(frozen=True)
class Compilation:
    """One program to compile for one target."""

    kind: str
    name: str
    target: Target
    function: Callable
    arguments: tuple
    donated: tuple[int, ...]


def kernel_jobs(target: Target, match: str, quick: bool) -> Iterator[Compilation]:
    """Every case of every kernel, or those of one model of a kind and of odd shapes."""
    backend = Backend("pallas", chip_name(target.name))
    key = jax.eval_shape(lambda: jax.random.key(0))
    for kernel in KERNELS:
        for case in arg_specs(kernel).CASES:
            skipped = quick and "/tp" in case.name and not case.name.startswith(_QUICK_MODELS)
            name = f"{kernel}/{case.name}"
            if match in name and chip_name(target.name) in case.chips and not skipped:
                arguments = jax.eval_shape(case.make, key)
                function = partial(case.function, backend=backend)
                yield Compilation(kernel, case.name, target, function, arguments, case.donated)


def engine_sizes(chip: str, name: str, quick: bool) -> EngineSizes:
    """Those of the engine whose programs are compiled, with a model's first layers if `quick`."""
    model = ModelConfig.from_hf(MODELS / name)
    if quick:
        model = replace(model, layers=model.layers[:_QUICK_LAYERS])  # of each kind there is one
    config = Config.model_validate(_ENGINE_CONFIG)
    return EngineSizes.from_config(config, model, "gpu", Backend("pallas", chip_name(chip)))


def engine_jobs(target: Target, match: str, quick: bool) -> Iterator[Compilation]:
    """The engine's programs at the sizes of real models, or of a few of their layers."""
    for model, (every, few) in _ENGINES.items():
        wanted = {program: f"{model}/{program}" for program in (few if quick else every)}
        if not any(match in f"engine/{name}" for name in wanted.values()):
            continue
        for program in list_programs(engine_sizes(target.name, model, quick), _ENGINE_PAGES):
            name = wanted.get(program.name)
            if name is not None and match in f"engine/{name}":
                yield Compilation(
                    *("engine", name, target),
                    *(program.function, program.arguments, program.donated),
                )


def compile_job(job: Compilation) -> CompiledProgram | str:
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


def compilations(chips: Sequence[str], match: str, quick: bool) -> list[Compilation]:
    """What is to be compiled for the chips: the programs whose name contains `match`."""
    targets = [Target.read(TARGETS / f"{chip}.txtpb") for chip in chips]
    return [
        job
        for target in targets
        for job in (*kernel_jobs(target, match, quick), *engine_jobs(target, match, quick))
    ]


def compile_all(jobs: Sequence[Compilation]) -> tuple[Table, list[dict[str, Any]]]:
    """Compile, as many at once as there are cores; a table, and a row with `faults` for each."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = list(
            track(
                pool.map(compile_job, jobs),
                "compiling",
                total=len(jobs),
                console=Console(stderr=True),
            )
        )
    table = Table(title="compiled without a GPU")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    rows = []
    for job, result in zip(jobs, results, strict=True):
        faults = [result] if isinstance(result, str) else result.faults(job.target)
        cells = [""] * (len(COLUMNS) - 3) if isinstance(result, str) else describe(result)
        table.add_row(job.target.name, f"{job.kind}/{job.name}", *cells, "; ".join(faults))
        row = {"chip": job.target.name, "kind": job.kind, "name": job.name, "faults": faults}
        rows.append(row if isinstance(result, str) else row | result.as_dict())
    return table, rows
