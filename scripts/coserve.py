"""Replay a workload while finetuning, on one engine; writes report.json, report.png and adapters.

Ends when every request is answered and every job is done. Ctrl-C stops cleanly: jobs write a
checkpoint that the next run goes on from, and unfinished requests count as failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich import get_console
from rich.markup import escape

from flexllm_jax import LLM
from flexllm_jax.config import ConfigError
from flexllm_jax.config.cli import (
    check_output_dir,
    make_parser,
    message_console,
    read_config,
    run_script,
    shows_progress,
)
from flexllm_jax.engine.device.processes import follow
from flexllm_jax.launch.answers import answer_greedily, encode_prompts
from flexllm_jax.launch.progress import ProgressDisplay
from flexllm_jax.launch.run import Run, prepare
from flexllm_jax.launch.summary import conclude

ANSWER_TOKENS = 64


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--stop-jobs-with-workload",
        action="store_true",
        help="stop when every request is answered; jobs write a checkpoint instead of finishing",
    )
    parser.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="PROMPT",
        help="answer PROMPT before and after finetuning, and show both; may be repeated",
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Run; returns the exit status."""
    arguments = parse()
    config = read_config(arguments)
    if config.workload is None:
        raise ConfigError("workload: required field is missing; add it, or run scripts/finetune.py")
    if config.parallel.process_id:
        return follow(config)
    check_output_dir(config.output_dir)
    inputs = prepare(config)
    questions = encode_prompts(arguments.ask, inputs, ANSWER_TOKENS, "--ask")
    console, progress = get_console(), message_console()
    progress.print(f"starting {config.model.path}: loading, compiling, profiling")
    llm = LLM.from_config(config, progress=shows_progress())
    run, answers, interrupted = Run(llm, []), {}, False
    try:
        progress.print(f"ready after {llm.engine.startup_s:.1f} s")
        answers["before"] = answer_greedily(llm, questions, ANSWER_TOKENS)
        run = Run.start(llm, inputs)
        with ProgressDisplay() as display:
            run.watch(display, wait_for_jobs=not arguments.stop_jobs_with_workload)
        run.note_end()
        served = set(llm.adapters)
        for job in run.jobs:
            if job.name in served:
                adapted = answer_greedily(llm, questions, ANSWER_TOKENS, job.name)
                answers[f"after, {job.name}"] = adapted
    except KeyboardInterrupt:
        interrupted = True
        progress.print("stopping: jobs write checkpoints, unfinished requests fail")
    finally:
        run.close()
    status = conclude(run, interrupted=interrupted)
    for i, prompt in enumerate(arguments.ask):
        console.print(f"\n[bold]{escape(prompt)}[/bold]")
        for when, texts in answers.items():
            console.print(f"  {when}: {texts[i]}", markup=False, highlight=False)
    return status


if __name__ == "__main__":
    run_script(main)
