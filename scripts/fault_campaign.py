"""Disturb a server at random for rounds on end: is anything lost, do jobs end as undisturbed ones?

Starts scripts/serve.py with the given configuration on a free port and makes two jobs on it in
peace. Then each round makes the same jobs again beside streams of requests, while processes are
killed, stopped and told to end, jobs are paused and cancelled, and the disk is full or the database
locked: at start-up, during uploads, validation, training, checkpoints and publishing. After each
round every job has to have the losses, events, checkpoints, adapter and answers of the quiet one,
bit for bit. A seed and a round's number decide its faults. The exit status is 1 when something is
lost or differs. Needs no root.

    python scripts/fault_campaign.py --config configs/serve.yaml --seed 7 --rounds 10
    python scripts/fault_campaign.py --config configs/serve.yaml --seed 7 --first 3 --rounds 1
"""

from __future__ import annotations

from pathlib import Path

from rich import get_console

from flexllm_jax.config.cli import make_parser, needs_extra, read_config, run_script

SERVE = Path(__file__).with_name("serve.py")


def main() -> int:
    """Run; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--faults", type=int, default=3, help="of each round")
    parser.add_argument("--training-file", type=Path, default=Path("runs/demo-world/train.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    arguments = parser.parse_args()
    read_config(arguments)
    with needs_extra("load"):
        from flexllm_jax.experiments.faults.report import table
        from flexllm_jax.experiments.faults.run import run_campaign
    report = run_campaign(
        SERVE,
        arguments.config,
        arguments.overrides,
        arguments.out,
        arguments.seed,
        range(arguments.first, arguments.first + arguments.rounds),
        arguments.faults,
        arguments.training_file,
    )
    console = get_console()
    console.print(table(report), markup=False, highlight=False, soft_wrap=True)
    for problem in report["problems"]:
        console.print(f"WRONG: {problem}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(report['problems'])} problems in {report['rounds']} rounds")
    return int(bool(report["problems"]))


if __name__ == "__main__":
    run_script(main)
