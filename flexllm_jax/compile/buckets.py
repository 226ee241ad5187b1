"""Ahead-of-time compilation of a small set of programs, and the proof that nothing compiles later.

Every program an engine runs is listed with abstract arguments, compiled at start-up with a progress
bar (and from JAX's persistent cache when it was compiled before), and called as an executable,
which cannot recompile.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax._src import monitoring
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flexllm_jax.compile.kept import KeptPrograms, compile_noting_key, signature_of


@dataclass(frozen=True)
class Program:
    """A function to compile: its abstract arguments (pytrees of ShapeDtypeStruct) and which of them
    it may overwrite. `results` says how what it returns is sharded, for `Placement.distribute`."""

    name: str
    function: Callable
    arguments: tuple
    donated: tuple[int, ...] = ()
    results: Any = None


def token_buckets(largest: int, smallest: int = 8, ratio: int = 4) -> tuple[int, ...]:
    """Sizes from `smallest`, each `ratio` times the one before, and `largest` as the last one.

    Few sizes keep start-up short; finetuning tokens fill what would be padding.
    """
    buckets = []
    size = smallest
    while size < largest:
        buckets.append(size)
        size *= ratio
    return (*buckets, largest)


def use_persistent_cache(folder: Path | None) -> None:
    """Keep compiled programs in `folder`, small and quick ones too; None keeps none."""
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_programs(
    programs: Iterable[Program], *, progress: bool = True, kept: KeptPrograms | None = None
) -> dict[str, jax.stages.Compiled]:
    """Compile the programs, as many at once as there are cores; the result is keyed by name. Those
    in `kept` are not traced, and what is compiled is kept there."""
    programs = list(programs)
    bar = Progress(
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[name]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not progress,
    )

    def compile_one(program: Program) -> jax.stages.Compiled:
        signature = signature_of(program.arguments, program.donated) if kept else ""
        if kept and (found := kept.load(program.name, signature)):
            return found
        # Donated arguments that are only overwritten are kept too: dropped, as jit would, they
        # would stay beside what takes their place.
        jitted = jax.jit(program.function, donate_argnums=program.donated, keep_unused=True)
        executable, key = compile_noting_key(jitted.lower(*program.arguments))
        if kept and key:
            kept.add(program.name, signature, executable, key)
        return executable

    with bar, ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        task = bar.add_task("compiling", total=len(programs), name="")
        compiled = {}
        for program, executable in zip(programs, pool.map(compile_one, programs), strict=True):
            compiled[program.name] = executable
            bar.update(task, advance=1, name=program.name)
    if kept:
        kept.save()
    return compiled


class CompilationCounter:
    """Counts what JAX compiles from now on, in any thread, cached or not."""

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int | float) -> None:
        if event == self._EVENT:
            self.count += 1

    def close(self) -> None:
        """Stop counting."""
        monitoring.unregister_event_duration_listener(self._on_event)
