"""First contact with a GPU: does everything run, is it right, and how fast?

Phases of a minute or two, each with a JSON file in --out that is written after every measurement:
`smoke` (the device's rates, tiny engines with XLA's kernels and with ours), `kernels` (a dozen
calls at the shapes of Llama-3.1-8B), `engine` (the engine at that shape), `serve` (one of --config
with many adapters, requests of a trace beside a job, rollouts), `peers` (transformers and PEFT).
Weights are random: no checkpoint is needed. `--dry-run` goes through the same on a CPU; its times
mean nothing.
"""

import argparse
import os
import sys
from pathlib import Path

if "--dry-run" in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from flexllm_jax.compile.buckets import use_persistent_cache
from flexllm_jax.config.cli import needs_extra, run_script
from flexllm_jax.experiments.gpu import first_contact, serving, speed
from flexllm_jax.experiments.gpu.measure import Notes

PARTS = {"smoke": first_contact.SMOKE, "engine": speed.PARTS, "serve": serving.PARTS}


def main() -> int:
    """Run a phase."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("phase", choices=("smoke", "kernels", "engine", "serve", "peers"))
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/first_contact"))
    parser.add_argument("--label", default="", help="added to the file's name")
    parser.add_argument("--match", default="", help="kernels: only names that contain this")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="engine, serve: override a field of the configuration; may be repeated",
    )
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        help=", ".join(f"{phase}: some of {','.join(parts)}" for phase, parts in PARTS.items()),
    )
    parser.add_argument("--config", type=Path, default=Path("configs/llama3.1-8b.yaml"))
    parser.add_argument("--trace", type=Path, help="serve: requests in place of the workload's")
    parser.add_argument("--rates", default="1,3,5,20", help="serve: requests per second")
    parser.add_argument("--seconds", type=float, default=30.0, help="serve: of requests, a rate")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/flexllm_jax").expanduser(),
        help="of compiled programs and of what XLA found by trying kernels out",
    )
    arguments = parser.parse_args()
    phase, dry_run = arguments.phase, arguments.dry_run
    parts = arguments.parts or PARTS.get(phase, ())
    if unknown := set(parts) - set(PARTS.get(phase, ())):
        parser.error(f"--parts: {phase} has no {sorted(unknown)[0]}, only {PARTS.get(phase, ())}")
    if not dry_run and jax.devices()[0].platform not in ("gpu", "cuda"):
        parser.error("JAX finds no GPU here: use --dry-run")
    use_persistent_cache(arguments.cache)
    file = arguments.out / f"{phase}{'-' * bool(arguments.label)}{arguments.label}.json"
    notes = Notes(file, command=sys.argv, dry_run=dry_run)
    own = {"dry_run": dry_run, "overrides": arguments.set, "parts": parts}
    if phase == "smoke":
        first_contact.smoke(notes, arguments.cache, dry_run=dry_run, parts=parts)
    elif phase == "kernels":
        first_contact.kernels(notes, dry_run=dry_run, match=arguments.match)
    elif phase == "engine":
        speed.engine(notes, arguments.cache, **own)
    elif phase == "peers":
        with needs_extra("test"):
            from flexllm_jax.experiments.gpu.peers import peers
        peers(notes, dry_run=dry_run)
    else:
        rates = [float(rate) for rate in arguments.rates.split(",")]
        load = {"trace": arguments.trace, "rates": rates, "seconds": arguments.seconds}
        serving.serve(notes, arguments.cache, arguments.config, **own, **load)
    return 0


if __name__ == "__main__":
    run_script(main)
