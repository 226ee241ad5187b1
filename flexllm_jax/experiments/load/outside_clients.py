"""Other projects' load generators, unmodified: how each is called, and what its report must say.

`vllm bench serve`, `guidellm`, `aiperf` and `st` (schemathesis) are programs looked up on PATH.
Their requirements exclude one another, so each is in an environment of its own. One that is missing
is told and left out.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REQUESTS, CONCURRENCY, INPUT, OUTPUT = 100, 8, 64, 32


@dataclass(frozen=True)
class OutsideClient:
    """A program, its arguments, and what its report (JSON) says: requests done, output tokens."""

    name: str
    arguments: list[str]
    report: Path | None = None
    read: Callable[[dict[str, Any]], tuple[float, float]] | None = None

    def run(self, out: Path) -> str:
        """How it went: `ok`, `left out`, or `FAILED` with what is wrong. Its log is in `out`."""
        program = shutil.which(self.name)
        if program is None:
            return "left out: there is no such program on PATH"
        log = out / f"{self.name}.log"
        with log.open("w", encoding="utf-8") as output:
            command = [program, *self.arguments]
            status = subprocess.run(command, stdout=output, stderr=output, cwd=out).returncode
        if status != 0:
            return f"FAILED: exit status {status}; see {log}"
        if self.report is None or self.read is None:
            return "ok"
        done, tokens = self.read(json.loads(self.report.read_text(encoding="utf-8")))
        if (done, tokens) != (REQUESTS, REQUESTS * OUTPUT):
            wanted = f"{REQUESTS} and {REQUESTS * OUTPUT}"
            return f"FAILED: {done:.0f} requests and {tokens:.0f} tokens, not {wanted}; see {log}"
        return f"ok: {done:.0f} requests, {tokens:.0f} tokens"


def run_recipes(tests: Path, out: Path) -> str:
    """How tinker-cookbook's recipes go with a server of their own, and the SDK's checks: tests in
    `tests`. `ok`, `left out`, or `FAILED`; the log is in `out`."""
    if importlib.util.find_spec("tinker_cookbook") is None:
        return "left out: tinker-cookbook is not installed (tests/server/tinker/test_recipes.py)"
    log = out / "tinker.log"
    with log.open("w", encoding="utf-8") as output:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += [str(tests / name) for name in ("test_sdk.py", "test_recipes.py")]
        ran = subprocess.run(command, stdout=output, stderr=output, cwd=tests.parents[2])
    last = log.read_text(encoding="utf-8").splitlines()[-1]
    return f"ok: {last}" if ran.returncode == 0 else f"FAILED: {last}; see {log}"


def outside_clients(url: str, model: str, tokenizer: Path, out: Path) -> Iterator[OutsideClient]:
    """The programs, set up for a server; their reports go to `out`."""
    yield _vllm(url, model, tokenizer, out)
    yield _guidellm(url, model, tokenizer, out)
    yield _aiperf(url, model, tokenizer, out)
    # What depends on more than a request's form may be refused: a model's length, a file's content.
    fuzzed = _words(exclude_checks="positive_data_acceptance", max_examples=30, warnings="off")
    yield OutsideClient("st", ["run", f"{url}/openapi.json", *fuzzed])


def _words(**options: object) -> list[str]:
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in options.items()]
    return [word for pair in pairs for word in pair]


def _vllm(url: str, model: str, tokenizer: Path, out: Path) -> OutsideClient:
    options = _words(
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
    return OutsideClient(
        "vllm",
        ["bench", "serve", "--ignore-eos", "--save-result", "--disable-tqdm", *options],
        out / "vllm.json",
        lambda told: (told["completed"], told["total_output_tokens"]),
    )


def _guidellm(url: str, model: str, tokenizer: Path, out: Path) -> OutsideClient:
    options = _words(
        backend=f"kind=openai_http,target={url},model={model}",
        profile=f"kind=concurrent,streams={CONCURRENCY}",
        constraint=f"kind=max_requests,count={REQUESTS}",
        data=f"kind=synthetic_text,prompt_tokens={INPUT},output_tokens={OUTPUT}",
        tokenizer=f"kind=huggingface_auto,model={tokenizer}",
    )
    options += _words(output="kind=console")
    options += _words(output=f"kind=json,path={out}/guidellm.json")

    def read(told: dict[str, Any]) -> tuple[float, float]:
        metrics = told["benchmarks"][0]["metrics"]
        tokens = metrics["output_token_count"]["successful"]
        return metrics["request_totals"]["successful"], tokens["total_sum"]

    arguments = ["run", "--disable-progress", *options]
    return OutsideClient("guidellm", arguments, out / "guidellm.json", read)


def _aiperf(url: str, model: str, tokenizer: Path, out: Path) -> OutsideClient:
    options = _words(
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
    return OutsideClient(
        "aiperf",
        ["profile", "--streaming", "--use-server-token-count", *options],
        out / "aiperf" / "profile_export_aiperf.json",
        lambda told: (told["request_count"]["avg"], told["output_sequence_length"]["sum"]),
    )
