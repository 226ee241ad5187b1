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

import jax

from flexllm_jax.config.cli import run_script
from flexllm_jax.experiments.gpu.tuning import keep, keys_and_cases, tune
from kernels_pallas.backend import select_backend
from kernels_pallas.cases import KERNELS


def main() -> int:
    """Tune and write; returns the exit status."""
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
        for key, case in keys_and_cases(kernel, dry_run=DRY_RUN).items():
            if arguments.key in key and backend.chip in case.chips:
                best = tune(kernel, key, case, backend, dry_run=DRY_RUN)
                if best is not None and not DRY_RUN:
                    keep(kernel, key, backend.chip, best)
    return 0


if __name__ == "__main__":
    run_script(main)
