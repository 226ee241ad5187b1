"""A server that is made to fail: scripts/serve.py, started again and again in one folder.

Nothing here needs root. A full disk is a limit of file size (RLIMIT_FSIZE) of both processes while
they run: whatever would grow a file beyond it fails, as on a full disk, with another errno.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

from flexllm_jax.errors import UserError
from flexllm_jax.experiments.load.client import open_client

_READY_S = 180.0
_ENGINE = b"flexllm_jax.server.engines.process"  # of its command line
_SMALL = 2048  # bytes: a disk that has no room for more


class FaultyServer:
    """The server, and how to disturb it. `out`: for its log, and for a new folder of its own."""

    def __init__(self, script: Path, config: Path, overrides: Sequence[str], out: Path):
        self.folder = Path(tempfile.mkdtemp(prefix="server-", dir=out))
        self.log_path = self.folder.with_suffix(".log")
        port = _free_port()
        own = [f"server.port={port}", f"output_dir={self.folder}", "server.log_format=text"]
        self._command = [sys.executable, str(script), "--config", str(config)]
        for override in [*overrides, *own]:
            self._command += ["--set", override]
        self.url = f"http://127.0.0.1:{port}"
        self.client = open_client(self.url)
        self._process: subprocess.Popen | None = None
        self.statuses: list[int] = []  # of every end

    @property
    def pid(self) -> int:
        """Of the HTTP process."""
        assert self._process is not None
        return self._process.pid

    @property
    def engine_pid(self) -> int | None:
        """None: there is none at this moment."""
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            for child in map(int, children):
                if _ENGINE in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
        return None

    @property
    def alive(self) -> bool:
        """Whether the HTTP process runs."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, if it has ended; it is not ready yet."""
        if self.alive:
            return
        if self._process is not None:
            self.statuses.append(self._process.wait())
        # Through a pipe: a log in a file would count as one that the server writes.
        with self.log_path.open("ab") as log:
            writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        self._process = subprocess.Popen(self._command, stdout=writer.stdin, stderr=writer.stdin)
        assert writer.stdin is not None
        writer.stdin.close()
        self._writer = writer

    def recover(self) -> float:
        """Start it if it has ended, and wait until it serves; the seconds that takes. UserError
        when it does not."""
        began = time.monotonic()
        while time.monotonic() - began < _READY_S:
            self.start()
            with contextlib.suppress(httpx2.HTTPError):
                if self.client.get("/health", timeout=5.0).status_code == 200:
                    return time.monotonic() - began
            time.sleep(0.1)
        raise UserError(f"the server is not healthy after {_READY_S:g} s; see {self.log_path}")

    def signal(self, process: str, number: signal.Signals) -> bool:
        """Send `http` or `engine` a signal; whether there was such a process."""
        pid = self.pid if process == "http" else self.engine_pid
        if pid is None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def wait_end(self, timeout_s: float) -> int:
        """The exit status of what is to end by itself."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def stop(self) -> int:
        """End it in order; its exit status."""
        assert self._process is not None
        if self.alive:
            self.signal("http", signal.SIGTERM)
        status = self._process.wait()
        self._writer.wait()
        self.client.close()
        return status

    @contextmanager
    def stopped(self, process: str) -> Iterator[bool]:
        """A process that stands still meanwhile; it may be killed by the other."""
        pid = self.pid if process == "http" else self.engine_pid
        found = pid is not None and self.signal(process, signal.SIGSTOP)
        try:
            yield found
        finally:
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @contextmanager
    def full_disk(self) -> Iterator[bool]:
        """No file grows meanwhile."""
        pids = [pid for pid in (self.pid, self.engine_pid) if pid is not None]
        before = {}
        try:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (_SMALL, hard))
                    before[pid] = soft, hard
            yield bool(before)
        finally:
            for pid, limits in before.items():
                with contextlib.suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)

    @contextmanager
    def locked_database(self) -> Iterator[bool]:
        """Another program has it meanwhile."""
        path = self.folder / "server" / "server.sqlite"
        other = sqlite3.connect(path, isolation_level=None, timeout=30.0)
        try:
            other.execute("BEGIN IMMEDIATE")
            yield True
        finally:
            other.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_until(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.01) -> bool:
    """Whether it comes to hold in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(every_s)
    return True
