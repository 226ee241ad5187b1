"""First contact with a GPU: does everything run, is it right, and how fast is it?

Three phases of a minute or two, each with a JSON file in --out that is written after every
measurement: `smoke` (the device's rates, a tiny engine with XLA's kernels and with ours), `kernels`
(a dozen calls at the shapes of Llama-3.1-8B), `engine` (the engine at that shape, random weights).
No checkpoint is needed. `--dry-run` goes through the same on a CPU; its times mean nothing.
"""

import argparse
import os
import sys
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from flexllm_jax.compile.buckets import use_persistent_cache
from flexllm_jax.config.cli import run_script
from flexllm_jax.experiments.gpu import first_contact
from flexllm_jax.experiments.gpu.measure import Notes


def main() -> int:
    """Run a phase."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("phase", choices=("smoke", "kernels", "engine"))
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/first_contact"))
    parser.add_argument("--label", default="", help="added to the file's name")
    parser.add_argument("--match", default="", help="kernels: only names that contain this")
    parser.add_argument("--saved", default="attention", help="engine: finetune.saved")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/flexllm_jax").expanduser(),
        help="of compiled programs and of what XLA found by trying kernels out",
    )
    arguments = parser.parse_args()
    if not arguments.dry_run and jax.devices()[0].platform not in ("gpu", "cuda"):
        parser.error("JAX finds no GPU here: use --dry-run")
    use_persistent_cache(arguments.cache)
    file = arguments.out / f"{arguments.phase}{arguments.label}.json"
    notes, dry_run = Notes(file, command=sys.argv, dry_run=arguments.dry_run), arguments.dry_run
    if arguments.phase == "smoke":
        first_contact.smoke(notes, arguments.cache, dry_run=dry_run)
    elif arguments.phase == "kernels":
        first_contact.kernels(notes, dry_run=dry_run, match=arguments.match)
    else:
        first_contact.engine(notes, arguments.cache, dry_run=dry_run, saved=arguments.saved)
    return 0


if __name__ == "__main__":
    run_script(main)
