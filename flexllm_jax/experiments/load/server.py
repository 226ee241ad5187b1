"""A server in a process of its own, started as a user starts it, and how it is at a moment.

Memory and open files are those of its two processes, of HTTP and of the engine, read from /proc.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2

from flexllm_jax.errors import UserError
from flexllm_jax.experiments.load.client import metric, open_client, read_metrics

_SETTLED_S = 60.0
_TOKENS_OF_JOB = r'flexllm:finetune_tokens_total\{job="(?P<job>.+)",phase="(?P<phase>\w+)"\}'


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
    free_slots: float


class ServerProcess:
    """scripts/serve.py with a configuration, on a free port; its log is `out`/server.log.

    Raises UserError when it ends before it is ready.
    """

    def __init__(self, script: Path, config: Path, overrides: Sequence[str], out: Path):
        self._log_path = out / "server.log"
        self._log = self._log_path.open("w+", encoding="utf-8")
        own = ["server.port=0", f"output_dir={out / 'server'}", "server.log_format=text"]
        command = [sys.executable, str(script), "--config", str(config)]
        for override in [*overrides, *own]:
            command += ["--set", override]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self.url = ""
        try:
            self._wait(self._find_url)
            self.client = open_client(self.url)
            self._wait(self.healthy)
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
                raise UserError(f"the server has ended; see {self._log_path}")
            time.sleep(0.1)

    def healthy(self) -> bool:
        """Whether it says that it is ready."""
        return self.client.get("/health").status_code == 200

    def sample(self, began: float) -> Sample:
        """How it is now."""
        metrics = read_metrics(self.client)
        return Sample(
            at=time.monotonic() - began,
            http_rss=resident_bytes(self.pid),
            engine_rss=resident_bytes(self.engine_pid),
            http_fds=open_files(self.pid),
            engine_fds=open_files(self.engine_pid),
            kv_usage=metric(metrics, "vllm:kv_cache_usage_perc"),
            running=metric(metrics, "vllm:num_requests_running"),
            waiting=metric(metrics, "vllm:num_requests_waiting"),
            finetune_tokens=metric(metrics, "flexllm:finetune_tokens_total"),
            free_slots=metric(metrics, "flexllm:adapter_slots_free"),
        )

    def settled(self, began: float, kv_usage: float = 0.0) -> Sample:
        """A sample once nothing runs any more; after a minute, whatever there is."""
        end = time.monotonic() + _SETTLED_S
        while True:
            time.sleep(1)
            now = self.sample(began)
            idle = now.running == now.waiting == 0 and now.kv_usage <= kv_usage
            if idle or time.monotonic() > end:
                return now

    def stop(self) -> int:
        """End it; its exit status."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        status = self._process.wait()
        self._log.close()
        return status

    def start_job(self, model: str, file: str, suffix: str, **fields: object) -> str:
        """Start a finetuning job on an uploaded file; its id."""
        body = {"model": model, "training_file": file, "suffix": suffix, **fields}
        return self._ask("POST", "/v1/fine_tuning/jobs", json=body)["id"]

    def cancel_job(self, job: str) -> None:
        """Cancel a finetuning job."""
        self._ask("POST", f"/v1/fine_tuning/jobs/{job}/cancel")

    def pause_job(self, job: str) -> None:
        """Let a finetuning job wait."""
        self._ask("POST", f"/v1/fine_tuning/jobs/{job}/pause")

    def resume_job(self, job: str) -> None:
        """Let it go on."""
        self._ask("POST", f"/v1/fine_tuning/jobs/{job}/resume")

    def tokens_of_jobs(self) -> dict[str, dict[str, float]]:
        """Of every job by phase."""
        found: dict[str, dict[str, float]] = {}
        for name, value in read_metrics(self.client):
            if labels := re.fullmatch(_TOKENS_OF_JOB, name):
                found.setdefault(labels["job"], {})[labels["phase"]] = value
        return found

    def upload(self, file: Path) -> str:
        """Upload finetuning rows; the file's id."""
        form = {"purpose": "fine-tune"}
        files = {"file": (file.name, file.read_bytes())}
        return self._ask("POST", "/v1/files", data=form, files=files)["id"]

    def delete_file(self, file: str) -> None:
        """Delete an uploaded file."""
        self._ask("DELETE", f"/v1/files/{file}")

    def _ask(self, method: str, path: str, **body: object) -> dict:
        response = self.client.request(method, path, **body)  # type: ignore[arg-type]
        if response.is_error:
            text = f"{method} {path}: {response.status_code}: {response.text}"
            raise httpx2.HTTPStatusError(text, request=response.request, response=response)
        return response.json()


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def open_files(pid: int) -> int:
    """Open file descriptors of a process."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
