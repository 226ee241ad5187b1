"""What a GPU did under load beside what the planner would have said, without a GPU.

Reads the `serve.json` of `gpu_first_contact.py serve`, plans the same engine and simulates the same
requests; give the options that it was measured with. Prints a table, and writes `predicted.json`
and `serving.png` beside it.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from rich.console import Console

from flexllm_jax.config import ConfigError, load_config
from flexllm_jax.config.cli import run_script
from flexllm_jax.experiments.gpu.report import plot, predict, table


def read(file: Path, option: str) -> dict[str, Any]:
    """A file of JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}: {file}: {error}; give a file that was measured") from None


def main() -> int:
    """Predict what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--serve", type=Path, default=Path("docs/results/gpu/serve.json"))
    parser.add_argument(
        "--paper",
        type=Path,
        default=Path("docs/results/paper_rows/results.json"),
        help="of `benchmark.py --config configs/benchmarks/paper_rows.yaml`, for the plot",
    )
    parser.add_argument("--config", type=Path, default=Path("configs/llama3.1-8b.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--trace", type=Path, help="requests in place of the workload's")
    parser.add_argument("--seconds", type=float, default=30.0, help="of requests, a rate")
    arguments = parser.parse_args()
    measured, paper = read(arguments.serve, "--serve"), read(arguments.paper, "--paper")
    own = {"trace": arguments.trace, "seconds": arguments.seconds, "overrides": arguments.set}
    rows = predict(measured, arguments.config, **own)
    Console().print(table(rows))
    out = arguments.serve.parent
    noted = {name: {"predicted": p, "measured": m} for name, p, m in rows}
    (out / "predicted.json").write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
    model = load_config(arguments.config, arguments.set).model.path.name
    same = [row for row in paper["paper_rows"]["rows"] if row["model"] == model]
    plot(rows, same, out / "serving.png")
    print(f"written: {out / 'predicted.json'}, {out / 'serving.png'}")
    return 0


if __name__ == "__main__":
    run_script(main)
