"""Load a server for minutes while finetuning jobs train: is a request lost, does anything leak?

Starts scripts/serve.py with the given configuration on a free port, two jobs over its API, and many
clients that stream one completion after the other; a few go away amid a stream, and at first a
thousand files are uploaded at once. Every request has to end in a finish or in an HTTP error; one
that is refused (429, 503) is sent again after Retry-After. Writes report.json and report.png. The
exit status is 1 when something was lost, failed or leaked. More clients than the device can serve
leave no time for finetuning unless `finetune.floor` sets some aside.
"""

from __future__ import annotations

from pathlib import Path

from flexllm_jax.config.cli import make_parser, needs_extra, read_config, run_script

SERVE = Path(__file__).with_name("serve.py")


def main() -> int:
    """Run; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--jobs", type=int, default=2, help="that learn from rows (default: 2)")
    parser.add_argument("--training-file", type=Path, default=Path("runs/demo-world/train.jsonl"))
    parser.add_argument("--reinforcement-jobs", type=int, default=0, help="(default: 0)")
    parser.add_argument("--prompts", type=Path, default=Path("runs/demo-world/questions.jsonl"))
    parser.add_argument("--turn-seconds", type=float, default=0.0, help="jobs pause in every other")
    parser.add_argument("--slo", default="standard", help="the requests' class of service")
    parser.add_argument("--uploads", type=int, default=1000, help="files sent at once, at first")
    parser.add_argument("--leaving", type=float, default=0.05, help="share that goes amid a stream")
    for name, limits in (("prompt", (8, 96)), ("output", (8, 64))):
        parser.add_argument(f"--{name}-tokens", type=int, nargs=2, default=limits)
    parser.add_argument("--out", type=Path, default=Path("runs/load-server"))
    arguments = parser.parse_args()
    read_config(arguments)
    with needs_extra("load"):
        from flexllm_jax.experiments.load.generator import LoadShape
        from flexllm_jax.experiments.load.run import Jobs, run_load
    shape = LoadShape(
        clients=arguments.clients,
        seconds=arguments.seconds,
        leaving=arguments.leaving,
        prompt_tokens=tuple(arguments.prompt_tokens),
        output_tokens=tuple(arguments.output_tokens),
        uploads=arguments.uploads,
        slo=arguments.slo,
    )
    jobs = Jobs(
        arguments.jobs,
        arguments.training_file,
        arguments.reinforcement_jobs,
        arguments.prompts,
        arguments.turn_seconds,
    )
    report = run_load(
        SERVE,
        arguments.config,
        arguments.overrides,
        arguments.out,
        shape,
        jobs,
    )
    return int(bool(report["problems"]))


if __name__ == "__main__":
    run_script(main)
