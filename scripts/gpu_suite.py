"""Check and time everything on the GPU at hand: kernels, and the engine beside transformers + PEFT.

1. Roofline: a large copy (bytes/s) and a large bfloat16 product (FLOP/s), measured in this run.
2. Numerics: every kernel at every shape of its `arg_specs.py`, on fresh random inputs, into memory
   that was filled with NaN, against the XLA reference in float32.
3. Speed: the same calls as a fraction of the roofline; attention beside cuDNN's where that can do
   the same work; grouped LoRA as a fraction of the base projection that it adds to.
4. Engine: an 8B-sized random model, finetuning and decoding beside transformers + PEFT, and both at
   once.

Writes one JSON file with device, versions and command, and prints tables. Exit status 1 when a
number is wrong (a missed speed target is reported, not an error). `--dry-run` goes through all of
it on a CPU at toy sizes, kernels in Pallas' interpreter: its times mean nothing.
"""

import argparse
import os
import sys

DRY_RUN = "--dry-run" in sys.argv
if DRY_RUN:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# torch needs its share of the GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import json
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from llama_8b import HF_CONFIG
from rich.console import Console
from rich.progress import track
from rich.table import Table
from side_by_side import Workload, compare, plot, show

from kernels_pallas.backend import XLA, Backend, select_backend
from kernels_pallas.benchmark import seconds_per_call
from kernels_pallas.cases import Case

CALLS, RUNS = (2, 1) if DRY_RUN else (20, 5)  # of a kernel: in a row, and how often
KERNELS = ("ragged_paged_attention", "window_attention_backward", "grouped_lora")


def measure_roofline() -> dict[str, float]:
    """Bytes/s of a large copy and FLOP/s of a large bfloat16 product, here and now."""
    values, side = (2**20, 256) if DRY_RUN else (2**30, 8192)
    x = jnp.zeros(values, jnp.bfloat16)
    copied = seconds_per_call(lambda x: x + 1, (x,), donated=(0,))
    a = jnp.ones((side, side), jnp.bfloat16)
    product = seconds_per_call(jnp.matmul, (a, a))
    return {"bytes_per_s": 2 * x.nbytes / copied, "flops_per_s": 2 * side**3 / product}


def kernel_cases(match: str) -> list[tuple[str, Case]]:
    """Every case of every kernel, or a few tiny ones in a dry run."""
    found = []
    for kernel in KERNELS:
        specs = import_module(f"kernels_pallas.{kernel}.arg_specs")
        cases = specs.DRY_RUN_CASES if DRY_RUN else specs.CASES
        found += [(kernel, case) for case in cases if match in f"{kernel}/{case.name}"]
    return found


def widened(arguments: tuple) -> tuple:
    """The arguments with bfloat16 as float32; scales and stored 8-bit values stay."""
    wide = lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x  # noqa: E731
    return jax.tree.map(wide, arguments)


def poison(outputs: Any) -> None:
    """Leave NaN in the memory that the next outputs will be given."""
    filled = [jnp.full(x.shape, jnp.nan, x.dtype) for x in jax.tree.leaves(outputs)]
    jax.block_until_ready(filled)


def relative_error(actual: Any, expected: Any) -> float:
    """Largest error of any output, relative to the output's largest value; NaN counts as inf."""
    errors = []
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        got, want = (jnp.asarray(x, jnp.float32) for x in (got, want))
        scale = jnp.maximum(jnp.max(jnp.abs(want)), 1e-30)
        errors.append(float(jnp.nan_to_num(jnp.max(jnp.abs(got - want)) / scale, nan=jnp.inf)))
    return max(errors)


def compile_all(cases: list[tuple[str, Case]], backend: Backend) -> dict[str, Callable]:
    """Compile the calls, as many at once as there are cores: name -> executable."""

    def compile_one(item: tuple[str, Case]) -> Callable:
        _, case = item
        shapes = jax.eval_shape(case.make, jax.random.key(0))
        function = jax.jit(partial(case.function, backend=backend), donate_argnums=case.donated)
        return function.lower(*shapes).compile()

    names = [f"{kernel}/{case.name}" for kernel, case in cases]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        compiled = track(pool.map(compile_one, cases), "compiling kernels", total=len(cases))
        return dict(zip(names, compiled, strict=True))


def run_kernels(
    cases: list[tuple[str, Case]], backend: Backend, roofline: dict[str, float]
) -> list[dict]:
    """Error and speed of every case."""
    compiled = compile_all(cases, backend)
    rows = []
    for kernel, case in track(cases, "checking and timing"):
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
        seconds = seconds_per_call(function, kept, case.donated, calls=CALLS, runs=RUNS)
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


def beside_cudnn(rows: list[dict], roofline: dict[str, float]) -> list[dict]:
    """The work of the prefill cases, causal attention of one fresh sequence, by cuDNN
    (`jax.nn.dot_product_attention`)."""
    if DRY_RUN:
        return []
    specs = import_module("kernels_pallas.ragged_paged_attention.arg_specs")
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


def lora_overhead(rows: list[dict]) -> list[dict]:
    """Time of grouped LoRA as a fraction of the base projection's."""
    specs = import_module("kernels_pallas.grouped_lora.arg_specs")
    cases = {case.name: case for case in (specs.DRY_RUN_CASES if DRY_RUN else specs.CASES)}
    found = []
    for row in rows:
        if row["kernel"] != "grouped_lora" or row["case"].startswith("block-map"):
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


def engine_workload() -> Workload:
    """An 8B-sized random Llama in bfloat16; a toy in a dry run."""
    if DRY_RUN:
        toy = {
            "vocab_size": 4096,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float32",
        }
        return Workload(
            title="toy Llama, float32 (dry run)",
            hf_config=HF_CONFIG | toy,
            dtype="float32",
            sequence=64,
            prompts=2,
            prompt=16,
            new_tokens=8,
            rank=8,
            tpot_ms=1000.0,
            token_buckets=[8, 64],
            engine={
                "cache": {"page_size": 16},
                "finetune": {"max_tokens": 64, "window": 32, "checkpoint_every": 0},
            },
        )
    return Workload(
        title="8B-parameter Llama, bfloat16",
        hf_config=HF_CONFIG,
        dtype="bfloat16",
        sequence=4096,
        prompts=64,
        prompt=512,
        new_tokens=128,
        rank=16,
        tpot_ms=50.0,
        token_buckets=[64, 512, 2048],
        engine={
            "cache": {"page_size": 64, "memory_fraction": 0.45},
            "finetune": {"max_tokens": 8192, "window": 1024, "checkpoint_every": 0},
        },
    )


def tables(result: dict) -> list[Table]:
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


def main() -> None:
    """Run the suite."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--case", default="", help="only kernel cases whose name contains this")
    parser.add_argument("--skip", choices=("kernels", "engine"), help="leave a part out")
    parser.add_argument("--rounds", type=int, default=3, help="of the engine beside its peer")
    parser.add_argument("--steps", type=int, default=4, help="finetuning steps a round")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_suite"))
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu" and not DRY_RUN:
        parser.error("JAX finds no GPU here: use --dry-run")
    started, console = time.monotonic(), Console(width=160)
    arguments.out.mkdir(parents=True, exist_ok=True)
    backend = select_backend("pallas", device)
    result: dict[str, Any] = {
        "device": device.device_kind,
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
        "dry_run": DRY_RUN,
        "versions": {p: version(p) for p in ("jax", "flax", "torch", "transformers", "peft")},
    }

    def save() -> None:
        result["seconds"] = time.monotonic() - started
        text = json.dumps(result, indent=1) + "\n"
        (arguments.out / "gpu_suite.json").write_text(text, encoding="utf-8")

    wrong: list[str] = []
    if arguments.skip != "kernels":
        roofline = result["roofline"] = measure_roofline()
        console.print(
            f"{device.device_kind}: copy {roofline['bytes_per_s'] / 1e9:,.0f} GB/s, "
            f"product {roofline['flops_per_s'] / 1e12:,.1f} TFLOP/s"
        )
        result["kernels"] = run_kernels(kernel_cases(arguments.case), backend, roofline)
        result["lora_overhead"] = lora_overhead(result["kernels"])
        result["cudnn"] = beside_cudnn(result["kernels"], roofline)
        for table in tables(result):
            console.print(table)
        wrong = [r["case"] for r in result["kernels"] if not r["error"] <= r["tolerance"]]
        save()
    if arguments.skip != "engine":
        workload = engine_workload()
        result["engine"] = compare(workload, arguments.out, arguments.rounds, arguments.steps)
        show(workload, result["engine"], console)
        plot(result["engine"], arguments.out / "gpu_suite.png")
        save()
    console.print(f"written: {arguments.out / 'gpu_suite.json'}")
    if wrong:
        raise SystemExit(f"wrong results: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
