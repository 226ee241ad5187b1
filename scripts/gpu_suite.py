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
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from flexllm_jax.config.cli import needs_extra, run_script
from flexllm_jax.experiments.gpu import kernels
from flexllm_jax.experiments.gpu.workload import engine_workload
from flexllm_jax.experiments.side_by_side.report import plot, show
from kernels_pallas.backend import select_backend


def main() -> int:
    """Run the suite; returns the exit status."""
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
        backend = select_backend("pallas", device)
        result |= kernels.check_and_time(arguments.case, backend, console, dry_run=DRY_RUN)
        wrong = [r["case"] for r in result["kernels"] if not r["error"] <= r["tolerance"]]
        save()
    if arguments.skip != "engine":
        with needs_extra("test"):
            from flexllm_jax.experiments.side_by_side.compare import compare
        workload = engine_workload(dry_run=DRY_RUN)
        result["engine"] = compare(workload, arguments.out, arguments.rounds, arguments.steps)
        show(workload, result["engine"], console)
        plot(result["engine"], arguments.out / "gpu_suite.png")
        save()
    console.print(f"written: {arguments.out / 'gpu_suite.json'}")
    if wrong:
        print(f"wrong results: {', '.join(wrong)}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    run_script(main)
