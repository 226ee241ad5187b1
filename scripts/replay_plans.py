"""Plan the steps of a plans.jsonl again (`--set log.plans=true` writes one) and compare.

Prints how many steps were planned as they are in the log, and the first that were not: none, unless
the scheduler has changed since.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from scheduler.plan_log import replay

_SHOWN = 5


def main() -> int:
    """Replay the log; 1 when a plan differs, 2 when the file is no log."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("log", type=Path, help="plans.jsonl of a run")
    path: Path = parser.parse_args().log
    console, steps, different = Console(), 0, 0
    try:
        for logged, planned in replay(path):
            steps += 1
            if logged != planned:
                different += 1
                if different <= _SHOWN:
                    console.print(f"step {logged['step']}\n  logged  {logged}\n  planned {planned}")
    except (OSError, ValueError) as error:
        print(f"replay_plans.py: {error}", file=sys.stderr)
        return 2
    console.print(f"{path}: {steps - different} of {steps} steps planned as logged")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
