"""Other projects' programs and libraries, unmodified: how each is called, and what its report must
say.

`vllm bench serve`, `guidellm`, `aiperf`, `lm_eval` and `st` (schemathesis) are programs looked up
on PATH; libraries are environments in a folder. Their requirements exclude one another, so each is
in an environment of its own. One that is missing is told and left out.
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

import yaml

from flexllm_jax.experiments.load import library_flows

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


def run_library(library: str, environments: Path, url: str, model: str, out: Path) -> str:
    """How a library's flows go, with the Python of `environments`/`library`: `ok`, `left out`, or
    `FAILED` with those that did not pass. Its log is in `out`."""
    python = environments / library / "bin" / "python"
    if not python.exists():
        return f"left out: there is no {python}"
    log = out / f"{library}.log"
    with log.open("w", encoding="utf-8") as output:
        command = [str(python), "-P", library_flows.__file__, library, url, model]
        ran = subprocess.run(command, stdout=output, stderr=output, cwd=out)
    (*_, last) = log.read_text(encoding="utf-8").splitlines() or ["it said nothing"]
    return f"ok: {last}" if ran.returncode == 0 else f"FAILED: {last}; see {log}"


def outside_clients(url: str, model: str, tokenizer: Path, out: Path) -> Iterator[OutsideClient]:
    """The programs, set up for a server; their reports go to `out`."""
    yield _vllm(url, model, tokenizer, out)
    yield _guidellm(url, model, tokenizer, out)
    yield _aiperf(url, model, tokenizer, out)
    yield _lm_eval(url, model, tokenizer, out)
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


# Tasks of our own, since those that lm-eval has are loaded from a hub.
_TASK = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
_TASKS: tuple[dict[str, Any], ...] = (
    {
        "task": "flows_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": [" Rome", " Lima", " Quito"],
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    },
    {
        "task": "flows_generate",
        "output_type": "generate_until",
        "doc_to_target": "Rome",
        "generation_kwargs": {"until": ["."], "max_gen_toks": OUTPUT},
        "metric_list": [{"metric": "exact_match"}],
    },
)


def _lm_eval(url: str, model: str, tokenizer: Path, out: Path) -> OutsideClient:
    """Log-probabilities of choices, and texts up to a stop string."""
    folder = out / "lm_eval"
    folder.mkdir(exist_ok=True)
    questions = [{"question": f"Question {at}: where does Laura live?"} for at in range(INPUT)]
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in questions), encoding="utf-8")
    for task in _TASKS:
        whole = _TASK | {"dataset_kwargs": {"data_files": {"test": str(rows)}}} | task
        path = folder / f"{task['task']}.yaml"
        path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    named = f"model={model},base_url={url}/v1/completions,num_concurrent={CONCURRENCY}"
    named += f",tokenizer_backend=huggingface,tokenizer={tokenizer}"
    options = ["--model_args", named, "--include_path", str(folder)]
    options += _words(model="local-completions", tasks=",".join(task["task"] for task in _TASKS))
    return OutsideClient("lm_eval", options)
