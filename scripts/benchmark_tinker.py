"""Clients of the Tinker API under load, by its unmodified SDK: tokens/s beside a job of the same
rows, interactive requests beside tenants who learn from rewards, many sessions and samples at once.

Starts scripts/serve.py with the given configuration (configs/tinker.yaml) on a free port. Writes
tinker.json. The exit status is 1 when a sample was lost, training through the SDK had less than 0.9
of a job's tokens/s, log-probabilities of samples were not those of training, or memory grew after
the first round of samples.
"""

from __future__ import annotations

import json
import resource
from pathlib import Path

from rich import get_console

from flexllm_jax.config.cli import make_parser, needs_extra, read_config, run_script

SERVE = Path(__file__).with_name("serve.py")
PARTS = ("training", "interactive", "agreement", "many")
APART = 0.02  # log-probabilities of a sampled token, on average: what bfloat16 may make of them
GROWTH = 0.05  # of memory from the first round of samples to the last


def main() -> int:
    """Run; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--turns", type=int, default=3, help="of a job and the SDK (default: 3)")
    parser.add_argument("--steps", type=int, default=24, help="of a turn (default: 24)")
    parser.add_argument("--seconds", type=float, default=60.0, help="interactive (default: 60)")
    parser.add_argument("--sessions", type=int, default=200, help="(default: 200)")
    parser.add_argument("--samples", type=int, default=1000, help="at once (default: 1000)")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-tinker"))
    arguments = parser.parse_args()
    config = read_config(arguments)
    with needs_extra("load"):
        from flexllm_jax.experiments.load.server import ServerProcess
    with needs_extra("test-clients"):
        from flexllm_jax.experiments.load import tinker_clients as clients
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a sample waited for is a connection
    arguments.out.mkdir(parents=True, exist_ok=True)
    shape = clients.Shape(
        turns=arguments.turns,
        steps=arguments.steps,
        seconds=arguments.seconds,
        sessions=arguments.sessions,
        samples=arguments.samples,
    )
    slo = {name: getattr(config.scheduler.slo, name) for name in ("ttft_ms", "tpot_ms")}
    told, problems = {}, []
    server = ServerProcess(SERVE, arguments.config, arguments.overrides, arguments.out)
    try:
        if "training" in arguments.parts:
            told["training"] = found = clients.training_rates(server, shape, arguments.out)
            if found["ratio"] < 0.9:
                problems.append(f"the SDK trains at {found['ratio']:.2f} of a job's tokens/s")
        if "interactive" in arguments.parts:
            told["interactive"] = found = clients.beside_tenants(server, shape, slo)
            if any(each["finished"] < each["requests"] for each in found.values()):
                problems.append("an interactive request was not answered")
        if "agreement" in arguments.parts:
            told["agreement"] = found = clients.agreement(server.url)
            if max(found["compute_logprobs_mean"], found["forward_mean"]) > APART:
                problems.append("log-probabilities of samples are not those of training")
        if "many" in arguments.parts:
            told["many"] = found = clients.many_at_once(server, shape)
            if found["answered"] < found["asked"]:
                problems.append(f"{found['asked'] - found['answered']} samples were lost")
            first, last = found["rounds"][0], found["rounds"][-1]
            for process in ("http_mib", "engine_mib"):
                if last[process] > first[process] * (1 + GROWTH):
                    problems.append(f"{process} grew: {first[process]:.0f}, {last[process]:.0f}")
    finally:
        server.stop()
    told["problems"] = problems
    (arguments.out / "tinker.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    get_console().print_json(data=told)
    return int(bool(problems))


if __name__ == "__main__":
    run_script(main)
