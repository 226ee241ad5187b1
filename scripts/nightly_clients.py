"""Every night: load generators that are too heavy for continuous integration, unmodified, against a
server started as a user starts it, then a load of many clients beside finetuning jobs.

`vllm bench serve`, `guidellm`, `aiperf` and `st` (schemathesis) are programs looked up on PATH.
Their requirements exclude one another, so install each in an environment of its own, as `pipx
install` does. One that is missing is told and left out. The exit status is 1 when a client failed a
request or counted other tokens than it asked for.

    python scripts/nightly_clients.py --config configs/serve.yaml --out runs/nightly
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load_server import RunningServer
from rich import get_console

from flexllm_jax.config.cli import make_parser, read_config, run_script

REQUESTS, CONCURRENCY, INPUT, OUTPUT = 100, 8, 64, 32
_LOAD = Path(__file__).resolve().parent / "load_server.py"


@dataclass(frozen=True)
class Client:
    """A program, its arguments, and what its report (JSON) says: requests done, output tokens."""

    name: str
    arguments: list[str]
    report: Path | None = None
    read: Callable[[dict[str, Any]], tuple[float, float]] | None = None


def _clients(url: str, model: str, tokenizer: Path, out: Path) -> list[Client]:
    def words(**options: object) -> list[str]:
        pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
        return [word for pair in pairs for word in pair]

    vllm = words(
        backend="openai",
        base_url=url,
        model=model,
        tokenizer=tokenizer,
        dataset_name="random",
        random_input_len=INPUT,
        random_output_len=OUTPUT,
        num_prompts=REQUESTS,
        max_concurrency=CONCURRENCY,
        result_dir=out,
        result_filename="vllm.json",
    )
    guidellm = words(
        backend=f"kind=openai_http,target={url},model={model}",
        profile=f"kind=concurrent,streams={CONCURRENCY}",
        constraint=f"kind=max_requests,count={REQUESTS}",
        data=f"kind=synthetic_text,prompt_tokens={INPUT},output_tokens={OUTPUT}",
        tokenizer=f"kind=huggingface_auto,model={tokenizer}",
    )
    guidellm += words(output="kind=console") + words(output=f"kind=json,path={out}/guidellm.json")
    aiperf = words(
        model=model,
        url=url,
        endpoint_type="chat",
        tokenizer=tokenizer,
        concurrency=CONCURRENCY,
        request_count=REQUESTS,
        isl=INPUT,
        osl=OUTPUT,
        extra_inputs="ignore_eos:true",
        ui="none",
        output_artifact_dir=out / "aiperf",
    )
    # What depends on more than a request's form may be refused: a model's length, a file's content.
    fuzzed = words(exclude_checks="positive_data_acceptance", max_examples=30, warnings="off")
    return [
        Client(
            "vllm",
            ["bench", "serve", "--ignore-eos", "--save-result", "--disable-tqdm", *vllm],
            out / "vllm.json",
            lambda told: (told["completed"], told["total_output_tokens"]),
        ),
        Client(
            "guidellm",
            ["run", "--disable-progress", *guidellm],
            out / "guidellm.json",
            _read_guidellm,
        ),
        Client(
            "aiperf",
            ["profile", "--streaming", "--use-server-token-count", *aiperf],
            out / "aiperf" / "profile_export_aiperf.json",
            lambda told: (told["request_count"]["avg"], told["output_sequence_length"]["sum"]),
        ),
        Client("st", ["run", f"{url}/openapi.json", *fuzzed]),
    ]


def _read_guidellm(told: dict[str, Any]) -> tuple[float, float]:
    metrics = told["benchmarks"][0]["metrics"]
    tokens = metrics["output_token_count"]["successful"]
    return metrics["request_totals"]["successful"], tokens["total_sum"]


def _run(client: Client, out: Path) -> str:
    """How it went: `ok`, or what is wrong."""
    program = shutil.which(client.name)
    if program is None:
        return "left out: there is no such program on PATH"
    log = out / f"{client.name}.log"
    with log.open("w") as output:
        command = [program, *client.arguments]
        status = subprocess.run(command, stdout=output, stderr=output, cwd=out).returncode
    if status != 0:
        return f"FAILED: exit status {status}; see {log}"
    if client.report is None or client.read is None:
        return "ok"
    done, tokens = client.read(json.loads(client.report.read_text()))
    if (done, tokens) != (REQUESTS, REQUESTS * OUTPUT):
        wanted = f"{REQUESTS} and {REQUESTS * OUTPUT}"
        return f"FAILED: {done:.0f} requests and {tokens:.0f} tokens, not {wanted}; see {log}"
    return f"ok: {done:.0f} requests, {tokens:.0f} tokens"


def main() -> int:
    """Run; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/nightly"))
    parser.add_argument("--no-load", action="store_true", help="leave load_server.py out")
    arguments: argparse.Namespace = parser.parse_args()
    config = read_config(arguments)
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    console, failed = get_console(), False
    server = RunningServer(arguments, out)
    try:
        model = json.loads(server.get("/v1/models")[1])["data"][0]["id"]
        for client in _clients(server.url, model, config.model.path.absolute(), out):
            told = _run(client, out)
            failed |= told.startswith("FAILED")
            console.print(f"{client.name}: {told}", soft_wrap=True, highlight=False)
        if server.get("/health")[0] != 200:
            failed = True
            console.print("FAILED: the server is not healthy after that")
    finally:
        server.stop()
    if not arguments.no_load:
        command = [sys.executable, str(_LOAD), "--config", str(arguments.config)]
        for override in [*arguments.overrides, "finetune.floor=0.2"]:
            command += ["--set", override]
        failed |= subprocess.run([*command, "--out", str(out / "load")]).returncode != 0
    return int(failed)


if __name__ == "__main__":
    run_script(main)
