"""A campaign from its seed to its report, with a line for every fault as it comes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexllm_jax.config import load_config
from flexllm_jax.config.cli import message_console
from flexllm_jax.experiments.faults.campaign import OVERRIDES, Campaign
from flexllm_jax.experiments.faults.report import make_report, write
from flexllm_jax.experiments.faults.work import rows

TRAINING_FILE = Path("runs/demo-world/train.jsonl")
_ROWS = 60


def run_campaign(
    script: Path,
    config: Path,
    overrides: Sequence[str],
    out: Path,
    seed: int,
    numbers: Sequence[int],
    faults: int = 3,
    training_file: Path = TRAINING_FILE,
) -> dict[str, Any]:
    """Rounds `numbers` of `seed` on a server that `script` (serve.py) starts; the report.

    Raises ConfigError for a configuration that cannot be used.
    """
    load_config(config, [*OVERRIDES, *overrides]).require_inputs()
    data = rows(training_file.read_text(encoding="utf-8"), _ROWS)
    out.mkdir(parents=True, exist_ok=True)
    console, began = message_console(), time.monotonic()
    campaign, rounds, wrong = Campaign(script, config, overrides, out, data, console), [], []
    try:
        console.print("jobs on a quiet server")
        campaign.quiet()
        for place, number in enumerate(numbers, 1):
            console.print(f"round {number} ({place} of {len(numbers)}), seed {seed}")
            done = campaign.run(seed, number, faults)
            rounds.append(done)
            for text in done.problems:
                console.print(f"  WRONG: {text}", markup=False)
            console.print(
                f"  {done.seconds:.0f} s, {done.finished} requests finished, {done.cut} cut"
            )
        wrong = campaign.check()
    finally:
        wrong += campaign.stop()
    report = make_report(seed, rounds, wrong, time.monotonic() - began)
    write(report, out)
    return report
