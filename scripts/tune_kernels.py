"""Choose the kernels' tiles on the GPU at hand, and write them to the tuning tables.

For every key of a kernel's tuning table, times each of the kernel's candidates on a case that uses
the key, and keeps the fastest; what does not compile (too much shared memory) is left out.
`--dry-run` tries two candidates on toy cases in Pallas' interpreter and writes nothing.
"""

import argparse
import os
import sys

DRY_RUN = "--dry-run" in sys.argv
if DRY_RUN:
    os.environ["JAX_PLATFORMS"] = "cpu"

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from itertools import islice

import jax
from rich.progress import track

from kernels_pallas.backend import Backend, select_backend
from kernels_pallas.benchmark import RepeatedCall
from kernels_pallas.cases import Case
from kernels_pallas.tuning import read_table, trial, write_table

KERNELS = ("ragged_paged_attention", "window_attention_backward", "grouped_lora")
CALLS, RUNS = (2, 1) if DRY_RUN else (20, 3)


def keys_and_cases(kernel: str) -> dict[str, Case]:
    """Every key of the kernel's table that its cases use, and the first case that does."""
    specs = import_module(f"kernels_pallas.{kernel}.arg_specs")
    found: dict[str, Case] = {}
    for case in specs.DRY_RUN_CASES if DRY_RUN else specs.CASES:
        for key in specs.tuning_keys(case):
            found.setdefault(key, case)
    return found


def lowered(
    kernel: str, key: str, case: Case, backend: Backend
) -> Iterator[tuple[dict[str, int], RepeatedCall | None]]:
    """Each candidate and its call, None when it cannot be lowered."""
    specs = import_module(f"kernels_pallas.{kernel}.arg_specs")
    shapes = jax.eval_shape(case.make, jax.random.key(0))
    for candidate in islice(specs.candidates(key), 2 if DRY_RUN else None):
        with trial(kernel, backend.chip, key, candidate):
            try:
                call = RepeatedCall(
                    partial(case.function, backend=backend), shapes, case.donated, CALLS
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


def tune(kernel: str, key: str, case: Case, backend: Backend) -> dict[str, int] | None:
    """The fastest candidate, or None when none runs."""
    items = list(lowered(kernel, key, case, backend))
    times: list[tuple[float, int]] = []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        calls = pool.map(compiled, items)
        for i, call in enumerate(track(calls, f"{kernel}/{key}", total=len(items))):
            if call is not None:
                times.append((call.seconds(case.make(jax.random.key(0)), RUNS), i))
    for seconds, i in sorted(times)[:3]:
        print(f"  {1e6 * seconds:10.1f} us  {items[i][0]}")
    return items[min(times)[1]][0] if times else None


def main() -> None:
    """Tune and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="toy cases on a CPU, no tables")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="default: all")
    parser.add_argument("--key", default="", help="only keys that contain this")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not DRY_RUN:
        parser.error("JAX finds no GPU here: use --dry-run")
    backend = select_backend("pallas", device)
    for kernel in arguments.kernel or KERNELS:
        for key, case in keys_and_cases(kernel).items():
            if arguments.key in key:
                best = tune(kernel, key, case, backend)
                if best is not None and not DRY_RUN:
                    table = read_table(kernel)
                    table.setdefault(backend.chip, {})[key] = best
                    write_table(kernel, table)


if __name__ == "__main__":
    main()
