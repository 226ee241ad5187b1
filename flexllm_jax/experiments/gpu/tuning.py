"""The fastest tiles of a kernel on the GPU at hand, for every key of its tuning table.

Each of the kernel's candidates is timed on a case that uses the key; what does not compile (too
much shared memory) is left out. A dry run tries two candidates on toy cases.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import jax
from rich.console import Console
from rich.progress import track

from kernels_pallas.backend import Backend
from kernels_pallas.benchmark import RepeatedCall
from kernels_pallas.cases import Case, arg_specs
from kernels_pallas.tuning import read_table, trial, write_table

_REPEATS, _DRY_REPEATS = (20, 3), (2, 1)  # calls of a candidate in a row, and how often


def keys_and_cases(kernel: str, *, dry_run: bool = False) -> dict[str, Case]:
    """Every key of the kernel's table that its cases use, and the first case that does."""
    specs = arg_specs(kernel)
    found: dict[str, Case] = {}
    for case in specs.DRY_RUN_CASES if dry_run else specs.CASES:
        for key in specs.tuning_keys(case):
            found.setdefault(key, case)
    return found


def lowered(
    kernel: str, key: str, case: Case, backend: Backend, *, dry_run: bool
) -> Iterator[tuple[dict[str, int], RepeatedCall | None]]:
    """Each candidate and its call, None when it cannot be lowered."""
    specs, calls = arg_specs(kernel), (_DRY_REPEATS if dry_run else _REPEATS)[0]
    shapes = jax.eval_shape(case.make, jax.random.key(0))
    for candidate in islice(specs.candidates(key), 2 if dry_run else None):
        with trial(kernel, backend.chip, key, candidate):
            try:
                call = RepeatedCall(
                    partial(case.function, backend=backend), shapes, case.donated, calls
                )
            except (ValueError, NotImplementedError):
                call = None
        yield candidate, call


def compiled(item: tuple[dict[str, int], RepeatedCall | None]) -> RepeatedCall | None:
    """The call, compiled; None when it does not fit the chip."""
    try:
        return item[1] and item[1].compile()
    except jax.errors.JaxRuntimeError:
        return None


def tune(
    kernel: str, key: str, case: Case, backend: Backend, *, dry_run: bool = False
) -> dict[str, int] | None:
    """The fastest candidate, or None when none runs; prints the best three."""
    items = list(lowered(kernel, key, case, backend, dry_run=dry_run))
    runs = (_DRY_REPEATS if dry_run else _REPEATS)[1]
    times: list[tuple[float, int]] = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        calls = pool.map(compiled, items)
        for i, call in enumerate(
            track(calls, f"{kernel}/{key}", total=len(items), console=Console(stderr=True))
        ):
            if call is not None:
                times.append((call.seconds(case.make(jax.random.key(0)), runs), i))
    print(f"{kernel}/{key}")
    for seconds, i in sorted(times)[:3]:
        print(f"  {1e6 * seconds:10.1f} us  {items[i][0]}")
    return items[min(times)[1]][0] if times else None


def keep(kernel: str, key: str, chip: str, best: dict[str, int]) -> None:
    """Write a choice to the kernel's tuning table."""
    table = read_table(kernel)
    table.setdefault(chip, {})[key] = best
    write_table(kernel, table)
