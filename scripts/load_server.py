"""Load a server for minutes while finetuning jobs train: is a request lost, does anything leak?

Starts scripts/serve.py with the given configuration on a free port, two jobs over its API, and many
clients that stream one completion after the other; a few go away amid a stream, and at first a
thousand files are uploaded at once. Every request has to end in a finish or in an HTTP error; one
that is refused (429, 503) is sent again after Retry-After. Writes report.json and report.png. The
exit status is 1 when something was lost, failed or leaked. More clients than the device can serve
leave no time for finetuning unless `finetune.floor` sets some aside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich import get_console
from rich.table import Table

from flexllm_jax.config.cli import make_parser, read_config, run_script

_SERVE = Path(__file__).resolve().parent / "serve.py"
_OUTCOMES = ("finished", "left", "refused", "failed", "lost")
_LONGEST_S = 300.0  # that a client waits for the next event; then its request is lost
_GROWTH = 0.05  # of resident memory from the second to the last quarter; more is a leak
_SPARE_FDS = 4  # a process may open a few on first use: a database connection, a log
_WHOLE_S, _SAMPLE_S, _LINE_S = 60.0, 1.0, 5.0


@dataclass(frozen=True)
class Sample:
    """The server at a moment; seconds from the load's start, bytes of resident memory."""

    at: float
    http_rss: int
    engine_rss: int
    http_fds: int
    engine_fds: int
    kv_usage: float
    running: float
    waiting: float
    finetune_tokens: float


@dataclass
class Request:
    """A request as its client saw it. `at`: seconds from the load's start; `tpot_s`: the mean."""

    at: float
    outcome: str = "lost"
    why: str = ""
    ttft_s: float | None = None
    tpot_s: float | None = None
    tokens: int = 0


class RunningServer:
    """scripts/serve.py in a process of its own."""

    def __init__(self, arguments: argparse.Namespace, out: Path):
        self._log = (out / "server.log").open("w+", encoding="utf-8")
        own = ["server.port=0", f"output_dir={out / 'server'}", "server.log_format=text"]
        command = [sys.executable, str(_SERVE), "--config", str(arguments.config)]
        for override in [*arguments.overrides, *own]:
            command += ["--set", override]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self._log_path = out / "server.log"
        self.url = ""
        try:
            self._wait(self._find_url)
            self._wait(lambda: self.get("/health")[0] == 200)
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            self.engine_pid = int(children[0])
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Of the HTTP process."""
        return self._process.pid

    def _find_url(self) -> bool:
        _, found, rest = self._log_path.read_text(encoding="utf-8").partition("listening on ")
        self.url = rest.split()[0] if found and rest.split() else ""
        return bool(self.url)

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._process.poll() is not None:
                raise SystemExit(f"load_server.py: the server has ended; see {self._log_path}")
            time.sleep(0.1)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def sample(self, began: float) -> Sample:
        """How it is now."""
        lines = [line.rsplit(" ", 1) for line in self.get("/metrics")[1].splitlines()]

        def metric(name: str) -> float:
            return sum(float(v) for k, v in lines if k == name or k.startswith(name + "{"))

        def open_files(pid: int) -> int:
            return len(list(Path(f"/proc/{pid}/fd").iterdir()))

        return Sample(
            at=time.monotonic() - began,
            http_rss=_resident(self.pid),
            engine_rss=_resident(self.engine_pid),
            http_fds=open_files(self.pid),
            engine_fds=open_files(self.engine_pid),
            kv_usage=metric("vllm:kv_cache_usage_perc"),
            running=metric("vllm:num_requests_running"),
            waiting=metric("vllm:num_requests_waiting"),
            finetune_tokens=metric("flexllm:finetune_tokens_total"),
        )

    def stop(self) -> int:
        """End it; its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        status = self._process.wait()
        self._log.close()
        return status


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


@dataclass
class Load:
    """The clients, and what became of their requests."""

    url: str
    model: str
    clients: int
    seconds: float
    leaving: float
    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]
    files: int
    began: float = field(default_factory=time.monotonic)
    requests: list[Request] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    uploads_s: float = 0.0
    in_flight: int = 0

    async def run(self) -> None:
        """All clients, until the time is over and their last requests have ended."""
        clients = (self._client(seed) for seed in range(self.clients))
        await asyncio.gather(self._upload_all(), *clients)

    async def _client(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        end = self.began + self.seconds
        while time.monotonic() < end:
            length, wanted = (
                int(random.integers(low, high + 1))
                for low, high in (self.prompt_tokens, self.output_tokens)
            )
            body = {
                "model": self.model,
                "prompt": random.integers(3, 200, length).tolist(),
                "max_tokens": wanted,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            leaves_after = int(random.integers(wanted)) if random.random() < self.leaving else None
            while (pause_s := await self._ask(body, leaves_after)) is not None:
                if time.monotonic() + pause_s >= end:
                    break
                await asyncio.sleep(pause_s)

    async def _post(
        self, path: str, kind: str, data: bytes
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        address = self.url.removeprefix("http://")
        host, port = address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
        head += f"Content-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        return reader, writer

    async def _upload(self, number: int) -> str:
        """Upload a small file; its id, or else what went wrong."""
        field = '--x\r\nContent-Disposition: form-data; name="'
        form = f'{field}purpose"\r\n\r\nfine-tune\r\n'
        form += f'{field}file"; filename="{number}.jsonl"\r\n\r\n'
        form += '{"prompt": "a", "completion": "b"}\n' * 100 + "\r\n--x--\r\n"
        writer = None
        try:
            kind = "multipart/form-data; boundary=x"
            reader, writer = await self._post("/v1/files", kind, form.encode())
            status, _ = await _head(reader)
            answer = await asyncio.wait_for(reader.read(), _LONGEST_S)
            return json.loads(answer)["id"] if status == 200 else f"{status}: {answer.decode()}"
        except (OSError, EOFError, TimeoutError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            if writer is not None:
                writer.close()

    async def _upload_all(self) -> None:
        """All at once."""
        began = time.monotonic()
        self.uploads = await asyncio.gather(*(self._upload(i) for i in range(self.files)))
        self.uploads_s = time.monotonic() - began

    async def _ask(self, body: dict[str, Any], leaves_after: int | None) -> float | None:
        """Send a request and read its stream; seconds to wait if it is refused."""
        request = Request(time.monotonic() - self.began)
        self.in_flight += 1
        pause_s, writer = None, None
        try:
            data = json.dumps(body).encode()
            reader, writer = await self._post("/v1/completions", "application/json", data)
            status, headers = await _head(reader)
            if status == 200:
                await self._read(reader, request, body["max_tokens"], leaves_after)
            elif "retry-after" in headers:
                request.outcome, pause_s = "refused", float(headers["retry-after"])
            else:
                answer = await asyncio.wait_for(reader.read(2000), _LONGEST_S)
                request.outcome, request.why = "failed", f"{status}: {answer.decode()}"
        except (OSError, EOFError, TimeoutError) as error:
            request.why = f"{type(error).__name__}: {error}"
        finally:
            self.in_flight -= 1
            if writer is not None:
                writer.close()
        self.requests.append(request)
        return pause_s

    async def _read(
        self, reader: asyncio.StreamReader, request: Request, wanted: int, leaves_after: int | None
    ) -> None:
        """The events of a stream; what is between them is the framing of chunks."""
        began = self.began + request.at
        first = last = None
        event = b""
        while True:
            line = await _line(reader)
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                break
            if line.startswith(b'data: {"error"'):
                request.outcome, request.why = "failed", line.decode().strip()
                return
            event, now = line, time.monotonic()
            if b'"choices":[]' in event:
                continue
            request.tokens += 1
            first, last = first or now, now
            if leaves_after is not None and request.tokens > leaves_after:
                request.outcome = "left"
                return
        counted = json.loads(event.removeprefix(b"data: "))["usage"]["completion_tokens"]
        if first is None or last is None or not counted == request.tokens == wanted:
            told = f"{request.tokens} tokens and a count of {counted}, not {wanted}"
            request.outcome, request.why = "failed", told
            return
        request.outcome, request.ttft_s = "finished", first - began
        if request.tokens > 1:
            request.tpot_s = (last - first) / (request.tokens - 1)


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    status = int((await _line(reader)).split()[1])
    headers = {}
    while line := (await _line(reader)).strip():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    return status, headers


async def _line(reader: asyncio.StreamReader) -> bytes:
    """A line; EOFError at the end, TimeoutError when none comes."""
    line = await asyncio.wait_for(reader.readline(), _LONGEST_S)
    if not line:
        raise EOFError("the connection was closed amid an answer")
    return line


async def watch(server: RunningServer, load: Load, samples: list[Sample]) -> None:
    """Sample the server and tell how it goes, until cancelled."""
    console, told = get_console(), 0.0
    while True:
        samples.append(now := await asyncio.to_thread(server.sample, load.began))
        if now.at - told >= _LINE_S:
            told = now.at
            counts = Counter(request.outcome for request in load.requests)
            console.print(
                f"{now.at:5.0f} s  {load.in_flight} in flight, {now.running:.0f} running  "
                + "  ".join(f"{counts[name]} {name}" for name in _OUTCOMES)
                + f"  KV {now.kv_usage:.0%}  {now.finetune_tokens:.0f} tokens finetuned  "
                f"{now.http_rss / 2**20:.0f} + {now.engine_rss / 2**20:.0f} MiB  "
                f"{now.http_fds} + {now.engine_fds} fds",
                soft_wrap=True,
                highlight=False,
            )
        await asyncio.sleep(_SAMPLE_S)


async def measure(server: RunningServer, load: Load) -> list[Sample]:
    """Run the load; the samples meanwhile."""
    samples: list[Sample] = []
    watcher = asyncio.create_task(watch(server, load, samples))
    load.began = time.monotonic()
    await load.run()
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)
    return samples


def settled(server: RunningServer, began: float, kv_usage: float = 0.0) -> Sample:
    """A sample once nothing runs any more; after a minute, whatever there is."""
    end = time.monotonic() + _WHOLE_S
    while True:
        time.sleep(1)
        now = server.sample(began)
        idle = now.running == now.waiting == 0 and now.kv_usage <= kv_usage
        if idle or time.monotonic() > end:
            return now


def percentiles(values: list[float]) -> dict[str, float] | None:
    """p50, p90 and p99 in milliseconds."""
    if not values:
        return None
    found = np.percentile(np.array(values) * 1e3, [50, 90, 99])
    return dict(zip(("p50", "p90", "p99"), map(float, found), strict=True))


def quarter(samples: list[Sample], seconds: float, number: int, name: str) -> float:
    """The median of a quantity in a quarter of the load."""
    low, high = seconds * number / 4, seconds * (number + 1) / 4
    values = [getattr(s, name) for s in samples if low <= s.at <= high]
    return float(np.median(values)) if values else float("nan")


def make_report(
    load: Load, samples: list[Sample], before: Sample, after: Sample, slo: dict[str, float]
) -> dict[str, Any]:
    """What is written; `problems` is empty when all went well."""
    counts = Counter(request.outcome for request in load.requests)
    done = [r for r in load.requests if r.outcome == "finished"]
    ttft = [r.ttft_s for r in done if r.ttft_s is not None]
    tpot = [r.tpot_s for r in done if r.tpot_s is not None]
    in_time = {
        "ttft": [s * 1e3 <= slo["ttft_ms"] for s in ttft],
        "tpot": [s * 1e3 <= slo["tpot_ms"] for s in tpot],
        "both": [
            (r.ttft_s or 0) * 1e3 <= slo["ttft_ms"] and (r.tpot_s or 0) * 1e3 <= slo["tpot_ms"]
            for r in done
        ],
    }
    wall_s = max(samples[-1].at, load.seconds)
    problems = [
        f"{counts[outcome]} requests {outcome}" for outcome in ("failed", "lost") if counts[outcome]
    ]
    kept = {file for file in load.uploads if file.startswith("file-")}
    if len(kept) < load.files:
        problems.append(f"{load.files - len(kept)} of {load.files} uploads failed")
    if after.kv_usage > before.kv_usage:
        problems.append(f"{after.kv_usage:.1%} of the KV pages are still in use")
    for process in ("http", "engine"):
        was, now = (getattr(s, f"{process}_fds") for s in (before, after))
        if now > was + _SPARE_FDS:
            problems.append(f"{process}: {now} file descriptors, {was} before the load")
        second, last = (quarter(samples, load.seconds, q, f"{process}_rss") for q in (1, 3))
        if last > second * (1 + _GROWTH):
            problems.append(
                f"{process}: memory grew from {second / 2**20:.0f} MiB in the second quarter to "
                f"{last / 2**20:.0f} in the last"
            )
    trained = [s.finetune_tokens for s in samples if s.at <= load.seconds]
    if trained[-1] == trained[len(trained) // 4]:
        problems.append("no job trained after the first quarter: raise finetune.floor")
    return {
        "clients": load.clients,
        "seconds": load.seconds,
        "requests": {
            "sent": len(load.requests),
            **{name: counts[name] for name in _OUTCOMES},
        },
        "uploads": {"kept": len(kept), "seconds": load.uploads_s},
        "why": Counter(
            [r.why for r in load.requests if r.why] + [u for u in load.uploads if u not in kept]
        ).most_common(10),
        "output_tokens_per_s": sum(r.tokens for r in load.requests) / wall_s,
        "finetune_tokens_per_s": trained[-1] / load.seconds,
        "ttft_ms": percentiles(ttft),
        "tpot_ms": percentiles(tpot),
        "slo": slo,
        "attainment": {name: float(np.mean(met)) if met else None for name, met in in_time.items()},
        "before": asdict(before),
        "after_warm_up": {
            name: quarter(samples, load.seconds, 1, name) for name in list(asdict(before))[1:]
        },
        "last_quarter": {
            name: quarter(samples, load.seconds, 3, name) for name in list(asdict(before))[1:]
        },
        "after": asdict(after),
        "problems": problems,
    }


def draw(load: Load, samples: list[Sample], slo: dict[str, float], file: Path) -> None:
    """The load over time: requests, latencies, memory, file descriptors and pages."""
    matplotlib.use("agg")
    figure = Figure(figsize=(9, 13), layout="constrained")
    axes = figure.subplots(6, 1, sharex=True)
    at = np.array([s.at for s in samples])

    def line(axis: Any, values: list[float], label: str) -> None:
        axis.plot(at, values, label=label, linewidth=1.3)

    line(axes[0], [s.running for s in samples], "running")
    line(axes[0], [s.waiting for s in samples], "waiting")
    axes[0].set_ylabel("requests")
    done = [r for r in load.requests if r.outcome == "finished"]
    for axis, name in ((axes[1], "ttft"), (axes[2], "tpot")):
        points = [(r.at, v * 1e3) for r in done if (v := getattr(r, f"{name}_s")) is not None]
        if points:
            axis.plot(*np.array(points).T, ".", markersize=2, label="a request")
        axis.axhline(slo[f"{name}_ms"], color="#b0332f", linewidth=1, linestyle="--", label="SLO")
        axis.set_ylabel(f"{name.upper()}, ms")
    line(axes[3], [s.http_rss / 2**20 for s in samples], "HTTP process")
    line(axes[3], [s.engine_rss / 2**20 for s in samples], "engine process")
    axes[3].set_ylabel("resident MiB")
    line(axes[4], [s.http_fds for s in samples], "HTTP process")
    line(axes[4], [s.engine_fds for s in samples], "engine process")
    axes[4].set_ylabel("open files")
    line(axes[5], [s.kv_usage * 100 for s in samples], "KV pages")
    axes[5].set_ylabel("in use, %")
    axes[5].set_xlabel("seconds")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(file, dpi=130)


def show(report: dict[str, Any]) -> None:
    """The report on the console."""
    table = Table("", "before", "2nd quarter", "last quarter", "after")
    for name in ("http_rss", "engine_rss", "http_fds", "engine_fds", "kv_usage"):
        values = [report[k][name] for k in ("before", "after_warm_up", "last_quarter", "after")]
        shown = [f"{v / 2**20:.0f} MiB" if "rss" in name else f"{v:.4g}" for v in values]
        table.add_row(name, *shown)
    console = get_console()
    console.print(table)
    for name in ("requests", "uploads", "ttft_ms", "tpot_ms", "attainment"):
        values = report[name] or {}
        parts = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
        console.print(f"{name}: {', '.join(parts)}", highlight=False)
    for name in ("output_tokens_per_s", "finetune_tokens_per_s"):
        console.print(f"{name}: {report[name]:.0f}", highlight=False)
    for why, count in report["why"]:
        console.print(f"{count} x {why}", highlight=False)
    console.print("problems: " + ("; ".join(report["problems"]) or "none"), highlight=False)


def main() -> int:
    """Run; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--jobs", type=int, default=2, help="finetuning jobs (default: 2)")
    parser.add_argument("--training-file", type=Path, default=Path("runs/demo-world/train.jsonl"))
    parser.add_argument("--uploads", type=int, default=1000, help="files sent at once, at first")
    parser.add_argument("--leaving", type=float, default=0.05, help="share that goes amid a stream")
    for name, limits in (("prompt", (8, 96)), ("output", (8, 64))):
        parser.add_argument(f"--{name}-tokens", type=int, nargs=2, default=limits)
    parser.add_argument("--out", type=Path, default=Path("runs/load-server"))
    arguments = parser.parse_args()
    objectives = read_config(arguments).scheduler.slo
    slo = {"ttft_ms": objectives.ttft_ms, "tpot_ms": objectives.tpot_ms}
    try:
        from openai import OpenAI
    except ModuleNotFoundError:
        raise SystemExit("load_server.py: openai is not installed: pip install openai") from None
    arguments.out.mkdir(parents=True, exist_ok=True)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # every client is an open file
    server = RunningServer(arguments, arguments.out)
    try:
        api = OpenAI(base_url=server.url + "/v1", api_key="none")
        model = api.models.list().data[0].id
        load = Load(
            server.url,
            model,
            arguments.clients,
            arguments.seconds,
            arguments.leaving,
            arguments.prompt_tokens,
            arguments.output_tokens,
            arguments.uploads,
        )
        rows = api.files.create(file=arguments.training_file, purpose="fine-tune")
        api.completions.create(model=model, prompt="a", max_tokens=4)
        before = settled(server, load.began)
        fields = {"lora_rank": 8, "learning_rate": 1e-3, "batch_tokens": 512, "max_steps": 100_000}
        jobs = [
            api.fine_tuning.jobs.create(
                model=model, training_file=rows.id, suffix=f"load-{i}", extra_body=fields
            )
            for i in range(arguments.jobs)
        ]
        samples = asyncio.run(measure(server, load))
        for job in jobs:
            api.fine_tuning.jobs.cancel(job.id)
        for file in load.uploads:
            if file.startswith("file-"):
                api.files.delete(file)
        api.close()
        after = settled(server, load.began, before.kv_usage)
    finally:
        status = server.stop()
    report = make_report(load, samples, before, after, slo)
    if status != 0:
        report["problems"].append(f"the server ended with status {status}")
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(load, samples, slo, arguments.out / "report.png")
    show(report)
    return int(bool(report["problems"]))


if __name__ == "__main__":
    run_script(main)
