"""Does HTTP load slow the engine's steps? The same prompts, first all in one request, then from
many streaming clients at once.

Asks a server that runs already (scripts/serve.py) and reads its /metrics. Prints, for both, the
mean time of a step on the device; the CPU time that the engine's thread spends on one, and those
threads of its process that talk to the HTTP process; output tokens per second, and the clients'
times to first token. The two loads take turns `--repeat` times and the medians are shown, as other
work on the machine comes and goes.

The CPU times tell what HTTP costs the engine from what it costs the machine: on a host with few
cores, clients, the HTTP process and XLA's threads (with the model on the CPU) compete for them, and
steps take longer though the engine does no more. There, give way to it: `--nice` is for the
clients, and `renice 10 PID` of serve.py is for the HTTP process, whose engine keeps its own.
"""

from __future__ import annotations

import argparse
import os

from rich import get_console

from flexllm_jax.config.cli import needs_extra, run_script


def main() -> int:
    """Run; returns the exit status, 1 if a request failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--nice", type=int, default=10, help="how far the clients give way")
    arguments = parser.parse_args()
    with needs_extra("load"):
        from flexllm_jax.experiments.load.step_cost import compare, cost_table
    os.nice(arguments.nice)
    whole, streams = compare(
        arguments.url,
        arguments.key,
        arguments.clients,
        arguments.prompt_tokens,
        arguments.output_tokens,
        arguments.repeat,
    )
    console = get_console()
    console.print(cost_table(whole, streams))
    console.print("Of a step: ms on the device, and CPU ms of the engine's threads. TTFT: ms.")
    return int(any(load.failed for load in (*whole, *streams)))


if __name__ == "__main__":
    run_script(main)
