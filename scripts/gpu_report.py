"""What a GPU did under load beside what the planner would have said, without a GPU.

Reads the `serve.json` of `gpu_first_contact.py serve`, plans the same engine and simulates the same
requests; give the options that it was measured with. Prints a table, and writes `predicted.json`
and `serving.png` beside it.
"""

import argparse
import json
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

from rich.console import Console

from flexllm_jax.config.cli import run_script
from flexllm_jax.config.fields import ConfigError
from flexllm_jax.experiments.gpu.report import plot, predict, table


def main() -> int:
    """Predict what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--serve", type=Path, default=Path("docs/results/gpu/serve.json"))
    parser.add_argument("--config", type=Path, default=Path("configs/llama3.1-8b.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--trace", type=Path, help="requests in place of the workload's")
    parser.add_argument("--seconds", type=float, default=30.0, help="of requests, a rate")
    arguments = parser.parse_args()
    try:
        measured = json.loads(arguments.serve.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--serve: {arguments.serve}: {error}; give a serve.json") from None
    own = {"trace": arguments.trace, "seconds": arguments.seconds, "overrides": arguments.set}
    rows = predict(measured, arguments.config, **own)
    Console().print(table(rows))
    out = arguments.serve.parent
    noted = {name: {"predicted": p, "measured": m} for name, p, m in rows}
    (out / "predicted.json").write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
    plot(rows, out / "serving.png")
    print(f"written: {out / 'predicted.json'}, {out / 'serving.png'}")
    return 0


if __name__ == "__main__":
    run_script(main)
