"""Every kernel on the GPU at hand: is it right, and how near to the roofline is it?

The roofline is measured in the same run: a large copy and a large bfloat16 product. A kernel is
compared with the XLA reference in float32, on fresh random inputs, into memory that was filled with
NaN. Attention is timed beside cuDNN's where that can do the same work; grouped LoRA as a fraction
of the base projection that it adds to. A dry run does the same at toy sizes in Pallas' interpreter.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flexllm_jax.experiments.gpu.measure import measure_roofline
from kernels_pallas.backend import XLA, Backend
from kernels_pallas.benchmark import seconds_per_call
from kernels_pallas.cases import KERNELS, Case, arg_specs
from kernels_pallas.check import relative_error, widened

Row = dict[str, Any]
_REPEATS, _DRY_REPEATS = (20, 5), (2, 1)  # calls of a kernel in a row, and how often


def kernel_cases(match: str, *, dry_run: bool) -> list[tuple[str, Case]]:
    """Every case of every kernel, or a few tiny ones in a dry run."""
    found = []
    for kernel in KERNELS:
        specs = arg_specs(kernel)
        cases = specs.DRY_RUN_CASES if dry_run else specs.CASES
        found += [(kernel, case) for case in cases if match in f"{kernel}/{case.name}"]
    return found


def poison(outputs: Any) -> None:
    """Leave NaN in the memory that the next outputs will be given."""
    filled = [jnp.full(x.shape, jnp.nan, x.dtype) for x in jax.tree.leaves(outputs)]
    jax.block_until_ready(filled)


def compile_all(cases: list[tuple[str, Case]], backend: Backend) -> dict[str, Callable]:
    """Compile the calls, as many at once as there are cores: name -> executable."""

    def compile_one(item: tuple[str, Case]) -> Callable:
        _, case = item
        shapes = jax.eval_shape(case.make, jax.random.key(0))
        function = jax.jit(partial(case.function, backend=backend), donate_argnums=case.donated)
        return function.lower(*shapes).compile()

    names = [f"{kernel}/{case.name}" for kernel, case in cases]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        compiled = track(
            pool.map(compile_one, cases),
            "compiling kernels",
            total=len(cases),
            console=Console(stderr=True),
        )
        return dict(zip(names, compiled, strict=True))


def run_kernels(
    cases: list[tuple[str, Case]], backend: Backend, roofline: dict[str, float], *, dry_run: bool
) -> list[Row]:
    """Error and speed of every case."""
    calls, runs = _DRY_REPEATS if dry_run else _REPEATS
    compiled = compile_all(cases, backend)
    rows = []
    for kernel, case in track(cases, "checking and timing", console=Console(stderr=True)):
        name = f"{kernel}/{case.name}"
        run, seed = compiled[name], secrets.randbits(31)
        function = partial(case.function, backend=backend)
        arguments = case.make(jax.random.key(seed))
        with jax.default_matmul_precision("highest"):
            expected = jax.jit(partial(case.function, backend=XLA))(*widened(arguments))
        kept = jax.tree.map(jnp.copy, arguments) if case.donated else arguments
        poison(jax.eval_shape(partial(case.function, backend=XLA), *arguments))
        error = relative_error(run(*arguments), expected)
        del expected
        seconds = seconds_per_call(function, kept, case.donated, calls=calls, runs=runs)
        least = {
            "bandwidth": case.bytes / roofline["bytes_per_s"],
            "products": case.flops / roofline["flops_per_s"],
        }[case.bound]
        rows.append(
            {
                "kernel": kernel,
                "case": case.name,
                "seed": seed,
                "error": error,
                "tolerance": case.tolerance,
                "microseconds": 1e6 * seconds,
                "bound": case.bound,
                "fraction_of_roofline": least / seconds,
                "target": case.target,
            }
        )
    return rows


def beside_cudnn(rows: list[Row]) -> list[Row]:
    """The work of the prefill cases, causal attention of one fresh sequence, by cuDNN
    (`jax.nn.dot_product_attention`)."""
    specs = arg_specs("ragged_paged_attention")
    found = []
    for row in rows:
        if row["kernel"] != "ragged_paged_attention" or "prefill-8192" not in row["case"]:
            continue
        case = next(case for case in specs.CASES if case.name == row["case"])
        q, pages, *_ = jax.eval_shape(case.make, jax.random.key(0))
        keys = jax.random.split(jax.random.key(0), 3)
        heads = (q.shape[1], pages.shape[2], pages.shape[2])
        q, k, v = (
            jax.random.normal(key, (1, q.shape[0], n, q.shape[2]), q.dtype)
            for key, n in zip(keys, heads, strict=True)
        )
        attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        seconds = seconds_per_call(attend, (q, k, v))
        found.append(
            {
                "case": row["case"],
                "ours_microseconds": row["microseconds"],
                "cudnn_microseconds": 1e6 * seconds,
                "ratio": 1e6 * seconds / row["microseconds"],
            }
        )
    return found


def lora_overhead(rows: list[Row], *, dry_run: bool) -> list[Row]:
    """Time of grouped LoRA as a fraction of the base projection's."""
    specs = arg_specs("grouped_lora")
    cases = {case.name: case for case in (specs.DRY_RUN_CASES if dry_run else specs.CASES)}
    found = []
    for row in rows:
        if row["kernel"] != "grouped_lora" or not specs.adds_to_a_product(cases[row["case"]]):
            continue
        product = specs.base_projection(cases[row["case"]])
        base = 1e6 * seconds_per_call(product.function, product.make(jax.random.key(0)))
        found.append(
            {
                "case": row["case"],
                "base_microseconds": base,
                "added": row["microseconds"] / base,
                "target": 0.1 if "decode-256-of-64" in row["case"] else None,
            }
        )
    return found


def tables(result: Row) -> list[Table]:
    """What the suite found about the kernels."""
    kernels = Table(title="kernels")
    for column in ("kernel", "case", "error", "time us", "of roofline", "target"):
        kernels.add_column(column, justify="left" if column in ("kernel", "case") else "right")
    for row in result["kernels"]:
        wrong = row["error"] > row["tolerance"]
        kernels.add_row(
            row["kernel"],
            row["case"],
            f"{row['error']:.1e}" + (" WRONG" if wrong else ""),
            f"{row['microseconds']:.1f}",
            f"{row['fraction_of_roofline']:.2f} ({row['bound']})",
            f"{row['target']:.2f}" if row["target"] else "",
        )
    lora = Table(title="grouped LoRA beside its base projection")
    for column in ("case", "base us", "added", "target"):
        lora.add_column(column, justify="left" if column == "case" else "right")
    for row in result["lora_overhead"]:
        target = f"<= {row['target']}" if row["target"] else ""
        lora.add_row(row["case"], f"{row['base_microseconds']:.1f}", f"{row['added']:.2f}", target)
    cudnn = Table(title="prefill beside cuDNN")
    for column in ("case", "ours us", "cuDNN us", "cuDNN ÷ ours"):
        cudnn.add_column(column, justify="left" if column == "case" else "right")
    for row in result["cudnn"]:
        cells = (row["ours_microseconds"], row["cudnn_microseconds"])
        cudnn.add_row(row["case"], *(f"{c:.1f}" for c in cells), f"{row['ratio']:.2f}")
    return [kernels, lora, cudnn]


def check_and_time(match: str, backend: Backend, console: Console, *, dry_run: bool) -> Row:
    """Roofline, and every kernel's errors and times; prints tables."""
    roofline = measure_roofline(dry_run=dry_run)
    console.print(
        f"{jax.devices()[0].device_kind}: copy {roofline['bytes_per_s'] / 1e9:,.0f} GB/s, "
        f"product {roofline['flops_per_s'] / 1e12:,.1f} TFLOP/s"
    )
    cases = kernel_cases(match, dry_run=dry_run)
    cases = [(kernel, case) for kernel, case in cases if backend.chip in case.chips]
    rows = run_kernels(cases, backend, roofline, dry_run=dry_run)
    result: Row = {
        "roofline": roofline,
        "kernels": rows,
        "lora_overhead": lora_overhead(rows, dry_run=dry_run),
        "cudnn": [] if dry_run else beside_cudnn(rows),
    }
    for table in tables(result):
        console.print(table)
    return result
