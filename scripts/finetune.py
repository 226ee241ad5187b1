"""Finetune adapters, without serving; writes each in PEFT's format, and report.json, report.png.

Every step is as large as it can be whatever the clock says, so that a run is deterministic, also
one that was stopped and resumed. Ctrl-C stops cleanly: jobs write a checkpoint that the next run
goes on from.
"""

from __future__ import annotations

import math

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
from flexllm_jax.launch.progress import ProgressDisplay
from flexllm_jax.launch.run import Run, prepare
from flexllm_jax.launch.summary import conclude


def main() -> int:
    """Run; returns the exit status."""
    config = read_config(make_parser(__doc__).parse_args())
    if not config.finetune.jobs:
        raise ConfigError("finetune.jobs: there is no job; add one")
    finetune = config.finetune.model_copy(update={"idle_step_ms": math.inf})
    config = config.model_copy(update={"finetune": finetune, "workload": None})
    if config.parallel.process_id:
        return follow(config)
    check_output_dir(config.output_dir)
    inputs = prepare(config)
    progress = message_console()
    progress.print(f"starting {config.model.path}: loading, compiling, profiling")
    llm = LLM.from_config(config, progress=shows_progress())
    run, interrupted = Run(llm, []), False
    try:
        progress.print(f"ready after {llm.engine.startup_s:.1f} s")
        run = Run.start(llm, inputs)
        with ProgressDisplay() as display:
            run.watch(display)
    except KeyboardInterrupt:
        interrupted = True
        progress.print("stopping: jobs write checkpoints; the next run goes on from them")
    finally:
        run.close()
    return conclude(run, interrupted=interrupted)


if __name__ == "__main__":
    run_script(main)
