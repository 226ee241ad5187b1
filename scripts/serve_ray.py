"""Serve a model with several engines behind one endpoint, on Ray: scripts/serve.py, replicated.

Starts a Ray cluster on this machine, or joins the one at `ray.address`. Stops on Ctrl-C or SIGTERM,
as scripts/serve.py does.
"""

from __future__ import annotations

import os

from flexllm_jax.config.cli import (
    check_output_dir,
    make_parser,
    needs_extra,
    read_config,
    run_script,
)

_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",  # lines of several engines may well look alike
    "RAY_worker_niceness": "0",  # engines are what the machine is for; Ray's default is 15
}


def main() -> int:
    """Serve; returns the exit status."""
    config = read_config(make_parser(__doc__).parse_args())
    check_output_dir(config.output_dir)
    for name, value in _RAY.items():  # Ray reads them when it is imported
        os.environ.setdefault(name, value)
    with needs_extra("ray"):
        from flexllm_jax.server.ray_serve import run
    return run(config)


if __name__ == "__main__":
    run_script(main)
