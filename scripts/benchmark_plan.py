"""How long the scheduler takes to plan a step, by the number of running requests.

All requests decode, with contexts of 500 tokens, beside a finetuning microbatch; the median of
many steps, in milliseconds of this thread's time. The targets are 1 ms at 256 requests and 5 ms at
4,096.
"""

import argparse

from rich.console import Console
from rich.table import Table

from flexllm_jax.config.cli import run_script
from flexllm_jax.experiments.plan_time import plan_ms


def main() -> int:
    """Measure and print; returns the exit status."""
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    table = Table(title="planning a step", title_justify="left")
    for heading in ("running requests", "plan, ms", "complete, ms"):
        table.add_column(heading, justify="right")
    for requests in (16, 256, 1024, 4096):
        plan, complete = plan_ms(requests)
        table.add_row(f"{requests:,}", f"{plan:.2f}", f"{complete:.2f}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    run_script(main)
