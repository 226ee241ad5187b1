"""What only one process may use at a time: folders, locked as long as it lives.

A lock is the kernel's (`flock`): it is gone with its process, however that ends. The file says
which process has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import IO

from flexllm_jax.config import ConfigError

log = logging.getLogger(__name__)

_SERVER, _ENGINE, _SOCKETS = "server.lock", "engine.lock", "lock"
_PREFIX = "flexllm-"
_ENGINE_MODULE = "flexllm_jax.server.engines.process"


def lock(path: Path) -> IO[str] | None:
    """Take a lock, held until the file is closed; None when another process has it."""
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def _holder(path: Path) -> int | None:
    """The process that says it has a lock."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def lock_for_server(output_dir: Path, wait_s: float = 0.0) -> IO[str]:
    """`output_dir` for one server; ConfigError when another uses it, `wait_s` from now still."""
    path, give_up = output_dir / _SERVER, time.monotonic() + wait_s
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        while (file := lock(path)) is None and time.monotonic() < give_up:
            time.sleep(0.05)
    except OSError as error:
        raise ConfigError(
            f"output_dir: {output_dir} cannot be written ({error.strerror}): let this user write "
            f"there, or choose another"
        ) from None
    if file is None:
        raise ConfigError(
            f"output_dir: {output_dir} is used by another server (process {_holder(path)}): stop "
            f"it, or choose another"
        )
    return file


def lock_for_engine(output_dir: Path, wait_s: float) -> IO[str]:
    """`output_dir` for one engine. One of a server that has ended ends by itself within `wait_s`,
    or is killed: it stands still. Two would write each other's checkpoints."""
    output_dir.mkdir(parents=True, exist_ok=True)
    path, give_up = output_dir / _ENGINE, time.monotonic() + wait_s
    while (file := lock(path)) is None:
        if time.monotonic() > give_up:
            holder = _holder(path)
            if holder is None or not _is_engine(holder):
                raise ConfigError(
                    f"output_dir: {output_dir} is used by another program (process {holder}): "
                    f"stop it, or choose another"
                )
            log.error("process %d, an earlier server's engine, does not end: killed", holder)
            with contextlib.suppress(ProcessLookupError):
                os.kill(holder, signal.SIGKILL)
            give_up = time.monotonic() + wait_s
        time.sleep(0.05)
    return file


def _is_engine(pid: int) -> bool:
    try:
        return _ENGINE_MODULE.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


class SocketFolder:
    """A private folder for sockets, short enough for their addresses; folders of processes that
    were killed are removed."""

    def __init__(self) -> None:
        file = None
        while file is None:  # another process that tidies up may have come between
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))  # readable by this user alone
            file = lock(self.path / _SOCKETS)
        self._lock = file
        for other in self.path.parent.glob(_PREFIX + "*/" + _SOCKETS):
            with contextlib.suppress(OSError):  # another user's
                file = lock(other)
                if file is not None:
                    shutil.rmtree(other.parent, ignore_errors=True)
                    file.close()

    def remove(self) -> None:
        """It is not used any more."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()
