"""First contact with a GPU: does everything run, is it right, and how fast is it?

Three phases, each with a JSON file in --out that is written after every measurement: `smoke` (2
minutes: rates, a tiny engine with XLA's kernels and with ours), `kernels` (a minute and a half: a
dozen calls at the shapes of Llama-3.1-8B), `engine` (five minutes: the engine at that shape, random
weights). No checkpoint is needed. `--toy` goes through the same on a CPU; its times mean nothing.
"""

import argparse
import os
import sys
from pathlib import Path

if "--toy" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"
# JAX's default is three quarters; CUDA graphs, cuBLAS and modules lie outside of its pool.
os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")

import jax
from llama_8b import HF_CONFIG

from flexllm_jax.compile.buckets import use_persistent_cache
from flexllm_jax.experiments import first_contact


def main() -> int:
    """Run a phase."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("phase", choices=("smoke", "kernels", "engine"))
    parser.add_argument("--toy", action="store_true", help="on a CPU, at toy sizes")
    parser.add_argument("--out", type=Path, default=Path("runs/first_contact"))
    parser.add_argument("--label", default="", help="added to the file's name")
    parser.add_argument("--match", default="", help="kernels: only names that contain this")
    parser.add_argument("--saved", default="inputs", help="engine: finetune.saved")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/flexllm_jax").expanduser(),
        help="of compiled programs and of what XLA found by trying kernels out",
    )
    arguments = parser.parse_args()
    if not arguments.toy and jax.devices()[0].platform not in ("gpu", "cuda"):
        parser.error(f"JAX sees no GPU but {jax.devices()}: install its CUDA plugin, or use --toy")
    use_persistent_cache(arguments.cache)
    name = arguments.phase + arguments.label
    notes = first_contact.Notes(arguments.out / f"{name}.json", command=sys.argv, toy=arguments.toy)
    if arguments.phase == "smoke":
        first_contact.smoke(notes, HF_CONFIG, arguments.cache)
    elif arguments.phase == "kernels":
        first_contact.kernels(notes, toy=arguments.toy, match=arguments.match)
    else:
        first_contact.engine(
            notes, HF_CONFIG, arguments.cache, toy=arguments.toy, saved=arguments.saved
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
