"""An engine in a process of its own on this machine; its sockets are in a private folder."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys

import zmq

from flexllm_jax.config import Config
from flexllm_jax.server.engines.alone import SocketFolder


class LocalEngine:
    """An `EngineHost`: `process.py` as a child, which ends when this process does."""

    shares_clock = True
    failure = None  # the engine says it on stderr, which is that of this process

    def __init__(self) -> None:
        self._folder: SocketFolder | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._addresses: tuple[str, ...] = ()
        self._terminated = False

    def bind(self, sending: zmq.Socket, receiving: zmq.Socket) -> None:
        """Bind the sockets to addresses that the next engine can reach."""
        self._folder = SocketFolder()
        names = ("commands", "events")
        self._addresses = tuple(f"ipc://{self._folder.path}/{name}" for name in names)
        for socket, address in zip((sending, receiving), self._addresses, strict=True):
            socket.bind(address)

    async def run(self, config: Config) -> int:
        """Start an engine that connects to them; returns its exit status when it has ended."""
        try:
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "flexllm_jax.server.engines.process", *self._addresses),
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for this process, which tells the engine
            )
            if self._terminated:  # while it was being started
                process.terminate()
            assert process.stdin is not None
            tree = json.dumps(config.model_dump(mode="json"))
            process.stdin.write(tree.encode() + b"\n")  # and stays open: its end ends the engine
            return await process.wait()
        finally:
            self._process = None
            if self._folder is not None:
                self._folder.remove()

    def terminate(self) -> None:
        """End an engine that does not serve yet."""
        self._terminated = True
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def kill(self) -> None:
        """End the engine at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
