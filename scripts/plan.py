"""Plan an engine on a GPU that is not there: does it fit, how fast is it, how many are needed?

The memory is planned by the engine's own planner, step times are predicted from the chip's data
sheet and what the engine reached on an H100, and the load is simulated with the engine's own
scheduler beside a job that never ends. Of the model only config.json is read. Prints tables, and
writes plan.json and plan.png in --out. Exit status 1 when it does not fit.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from rich.console import Console

from flexllm_jax.config import ConfigError
from flexllm_jax.config.cli import (
    check_output_dir,
    make_parser,
    message_console,
    read_config,
    run_script,
)
from flexllm_jax.experiments.planning.engine import CHIPS
from flexllm_jax.experiments.planning.load import Job
from flexllm_jax.experiments.planning.make import choose_requests, make_plan
from flexllm_jax.experiments.planning.report import plot_plan, print_plan


def main() -> int:
    """Plan, print, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--chip", choices=sorted(CHIPS), required=True, help="the GPU")
    parser.add_argument("--trace", type=Path, help="requests, in place of the configuration's")
    parser.add_argument(
        "--rate",
        type=float,
        help="requests per second: the trace's thinned or replayed by several at once, or of chats "
        "that are made up where there is none",
    )
    parser.add_argument(
        "--budget-gb", type=float, help="memory of each device that it may use: cache.budget_gb"
    )
    parser.add_argument(
        "--target", type=float, default=0.99, help="share of requests within their objective"
    )
    parser.add_argument(
        "--sequence-tokens", type=float, default=1000.0, help="mean length of the job's sequences"
    )
    parser.add_argument("--out", type=Path, help="default: runs/plan/CONFIG-CHIP")
    arguments = parser.parse_args()
    for name, most in (("rate", 1e6), ("target", 1.0), ("sequence_tokens", 1e6)):
        value = getattr(arguments, name)
        if value is not None and not 0 < value <= most:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: got {value:g}; must be above 0 and at most {most:,.0f}")
    if arguments.budget_gb is not None:
        arguments.overrides.append(f"cache.budget_gb={arguments.budget_gb}")
    config = read_config(arguments)
    out = arguments.out or Path("runs/plan") / f"{arguments.config.stem}-{arguments.chip}"
    check_output_dir(out, "--out")
    told = message_console()
    plan = make_plan(
        arguments.config.stem,
        config,
        arguments.chip,
        choose_requests(config, arguments.trace, arguments.rate),
        job=Job(arguments.sequence_tokens),
        target=arguments.target,
        progress=lambda engines: told.print(f"simulating {engines} engines", style="dim"),
    )
    print_plan(plan, Console(width=None if sys.stdout.isatty() else 110))
    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_text(json.dumps(plan.as_dict(), indent=1) + "\n", encoding="utf-8")
    plot_plan(plan, out / "plan.png")
    print(f"written: {out}/plan.json, plan.png")
    return int(not plan.engine.fits)


if __name__ == "__main__":
    run_script(main)
