"""The engine process as the HTTP process sees it: started, watched, started again, asked.

Everything runs in one asyncio loop. What was asked of an engine that ends is answered with an
error; when it ends without being told to, another is started in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq
import zmq.asyncio

from flexllm_jax.config import Config
from flexllm_jax.engine.sampling_params import SamplingParams
from flexllm_jax.server.engine_process import BAD_INPUT
from flexllm_jax.server.models import ServedAdapter
from flexllm_jax.server.protocol import (
    Call,
    Cancel,
    Command,
    Event,
    Generate,
    Output,
    Outputs,
    Ready,
    Reply,
    Stats,
    Stop,
    Submit,
)

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 30.0  # between two attempts to start an engine
_STATS_LATE_S = 5.0  # statistics come several times a second


class EngineUnavailable(Exception):
    """The engine is not there (yet, or any more); one line."""


class EngineRefused(ValueError):
    """A call the engine cannot carry out; one line that says why."""


class Generation:
    """Outputs asked for together. Iterating yields (index, when it came, output) until all have
    ended."""

    def __init__(self, client: EngineClient, first_id: int, count: int):
        self._client, self._first_id = client, first_id
        self._unfinished = set(range(first_id, first_id + count))
        self._queue: asyncio.Queue[tuple[float, Output]] = asyncio.Queue()

    def put(self, output: Output) -> None:
        """Called with every output of its requests."""
        self._queue.put_nowait((time.monotonic(), output))

    def drop(self, index: int) -> None:
        """Nothing more of this output is wanted."""
        request_id = self._first_id + index
        if request_id in self._unfinished:
            self._unfinished.discard(request_id)
            self._client.forget([request_id], cancel=True)

    def close(self) -> None:
        """Drop all that have not ended."""
        self._client.forget(sorted(self._unfinished), cancel=True)
        self._unfinished.clear()

    async def __aiter__(self) -> AsyncIterator[tuple[int, float, Output]]:
        while self._unfinished:
            at, output = await self._queue.get()
            if output.request_id not in self._unfinished:
                continue  # dropped while this was on its way
            if output.finish_reason or output.error:
                self._unfinished.discard(output.request_id)
                self._client.forget([output.request_id], cancel=False)
            yield output.request_id - self._first_id, at, output


class EngineClient:
    """Starts the engine process with `config`, keeps it running, and talks to it.

    `state` is "starting" until the engine serves, "ready", or "stopped". The callbacks are called
    in the loop: `on_ready` each time an engine has started, `on_stats` with its statistics,
    `on_lost` when one has ended unasked.
    """

    def __init__(self, config: Config):
        self._config = config
        self.state: Literal["starting", "ready", "stopped"] = "starting"
        self.info: Ready | None = None
        self.stats: Stats | None = None
        self.restarts = 0
        self.exit_status: int | None = None  # of an engine that could not start at all
        self.on_ready: list[Callable[[], None]] = []
        self.on_stats: list[Callable[[Stats], None]] = []
        self.on_lost: list[Callable[[], None]] = []
        self._stats_at = time.monotonic()
        self._context = zmq.asyncio.Context()
        self._commands: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._generations: dict[int, Generation] = {}
        self._replies: dict[int, asyncio.Future] = {}
        self._next_request_id, self._call_ids = 0, itertools.count()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Event)
        self._stop_asked = asyncio.Event()

    # -- the process ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep an engine running until `stop`, or until it turns out that none can be started."""
        wait_s = 1.0
        while not self._stop_asked.is_set():
            began = time.monotonic()
            status = await self._run_once()
            if self._stop_asked.is_set():
                break
            if status == BAD_INPUT or (self.info is None and self.restarts == 0):
                self.exit_status = status or 1
                break
            log.error("the engine process ended with status %s; starting another", status)
            for callback in self.on_lost:
                callback()
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S) if time.monotonic() - began < 60 else 1.0
            self.restarts += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_asked.wait(), wait_s)
        self.state = "stopped"

    async def _run_once(self) -> int:
        """Run one engine process to its end; returns its exit status."""
        self.state, self.stats, self._stats_at = "starting", None, time.monotonic()
        folder = Path(tempfile.mkdtemp(prefix="flexllm-"))  # readable by this user alone
        commands, events = (f"ipc://{folder}/{name}" for name in ("commands", "events"))
        sending, receiving = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        try:
            for socket, address in ((sending, commands), (receiving, events)):
                socket.set_hwm(0)
                socket.bind(address)
            self._commands = sending
            module = "flexllm_jax.server.engine_process"
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, commands, events),
                stdin=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for this process, which tells the engine
            )
            assert process.stdin is not None
            config = json.dumps(self._config.model_dump(mode="json"))
            process.stdin.write(config.encode() + b"\n")  # and stays open: its end ends the engine
            reader = asyncio.create_task(self._receive(receiving))
            status = await process.wait()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            while await receiving.poll(100):
                self._take(self._decoder.decode(await receiving.recv()))
            return status
        finally:
            self._commands = self._process = None
            if self.state == "ready":
                self.state = "starting"
            self._fail_all()
            sending.close(linger=0)
            receiving.close(linger=0)
            shutil.rmtree(folder, ignore_errors=True)

    def _fail_all(self) -> None:
        message = "the engine process has ended"
        for request_id, generation in list(self._generations.items()):
            generation.put(Output(request_id, [], error=message))
        self._generations.clear()
        for future in self._replies.values():
            if not future.done():
                future.set_exception(EngineUnavailable(message))
        self._replies.clear()

    async def stop(self, timeout_s: float) -> bool:
        """End the engine; whether it ended by itself within `timeout_s`."""
        self._stop_asked.set()
        process = self._process
        if process is None:
            return True
        if self.state == "ready":
            self._send(Stop())
        else:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), timeout_s)
        except TimeoutError:
            log.error("the engine did not stop within %.0f s and is killed", timeout_s)
            process.kill()
            await process.wait()
            return False
        return True

    def problem(self) -> str | None:
        """Why the engine is not healthy, or None."""
        if self.state != "ready":
            return f"the engine is {self.state}"
        late = time.monotonic() - self._stats_at
        limit = self._config.server.stuck_after_s
        if late > min(limit, _STATS_LATE_S):
            return f"the engine process has said nothing for {late:.0f} s"
        if self.stats is not None and not self.stats.idle and self.stats.quiet_s > limit:
            return f"the engine has work and has done no step for {self.stats.quiet_s:.0f} s"
        return None

    # -- messages ---------------------------------------------------------------------------------

    async def _receive(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            event = self._decoder.decode(await socket.recv())
            try:
                self._take(event)
            except Exception:
                log.exception("an event of the engine could not be taken in")

    def _take(self, event: Event) -> None:
        match event:
            case Outputs(outputs):
                for output in outputs:
                    generation = self._generations.get(output.request_id)
                    if generation is not None:
                        generation.put(output)
            case Reply(call_id, result, error, invalid):
                future = self._replies.pop(call_id, None)
                if future is None or future.done():
                    return
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception((EngineRefused if invalid else RuntimeError)(error))
            case Stats():
                self.stats, self._stats_at = event, time.monotonic()
                for callback in self.on_stats:
                    callback(event)
            case Ready():
                self.info, self.state = event, "ready"
                log.info("engine ready after %.1f s", event.startup_s)
                for ready in self.on_ready:
                    ready()

    def _send(self, command: Command) -> None:
        if self._commands is None or self.state != "ready":
            raise EngineUnavailable(f"the engine is {self.state}")
        # Without a limit on what is queued, a send never waits: its future is done at once.
        self._commands.send(self._encoder.encode(command))

    # -- what can be asked ------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        n: int,
        adapter: ServedAdapter | None,
        slo_class: str,
        arrival: float,
    ) -> Generation:
        """Ask for `n` outputs of each prompt; index i is output i % n of prompt i // n."""
        count = n * len(prompts)
        first_id = self._next_request_id
        self._next_request_id += count
        name, path = (adapter.engine_name, adapter.path) if adapter else (None, None)
        requests = [
            Generate(first_id + i, prompts[i // n], params, name, path, arrival, i % n, slo_class)
            for i in range(count)
        ]
        generation = Generation(self, first_id, count)
        self._send(Submit(requests))
        for request in requests:
            self._generations[request.request_id] = generation
        return generation

    def forget(self, request_ids: Sequence[int], *, cancel: bool) -> None:
        """Send nothing more of requests; `cancel`: the engine shall drop them too."""
        known = [i for i in request_ids if self._generations.pop(i, None) is not None]
        if cancel and known and self.state == "ready":
            self._send(Cancel(known))

    async def call(self, method: str, **arguments: Any) -> Any:
        """Run a method of `EngineCalls`. EngineRefused: it cannot; EngineUnavailable: no engine."""
        call_id = next(self._call_ids)
        future = asyncio.get_running_loop().create_future()
        self._send(Call(call_id, method, arguments))
        self._replies[call_id] = future
        return await future
