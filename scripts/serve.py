"""Serve a model and finetune adapters over HTTP, with OpenAI's interfaces.

Stops on Ctrl-C or SIGTERM: requests finish, running jobs write a checkpoint that the next start
goes on from.
"""

from __future__ import annotations

from flexllm_jax.config.cli import (
    check_output_dir,
    make_parser,
    needs_extra,
    read_config,
    run_script,
)


def main() -> int:
    """Serve; returns the exit status."""
    config = read_config(make_parser(__doc__).parse_args())
    if config.parallel.process_id:
        from flexllm_jax.engine.device.processes import follow

        return follow(config)
    check_output_dir(config.output_dir)
    with needs_extra("server"):
        from flexllm_jax.server.run import run
    return run(config)


if __name__ == "__main__":
    run_script(main)
