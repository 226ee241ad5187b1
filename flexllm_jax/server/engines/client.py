"""An engine process as the HTTP process sees it: started, watched, started again, asked.

Everything runs in one asyncio loop. What was asked of an engine that ends is answered with an
error; when it ends without being told to, another is started in its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec
import zmq
import zmq.asyncio

from flexllm_jax.config import Config
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.server.engines.local import LocalEngine
from flexllm_jax.server.engines.protocol import (
    BAD_INPUT,
    Acknowledge,
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
    Trained,
)
from flexllm_jax.server.engines.registry import ServedAdapter
from flexllm_jax.server.engines.training_client import TrainingClient

log = logging.getLogger(__name__)

_LONGEST_WAIT_S = 30.0  # between two attempts to start an engine
_STATS_LATE_S = 5.0  # statistics come several times a second
_WATCHED_EVERY_S = 0.5
_KILLED_S = 2.0  # until a process that was killed is gone
_FIRST_STARTS = 3  # that may be killed before it is held that none can be started


class EngineUnavailable(Exception):
    """The engine is not there (yet, or any more); one line."""


class EngineRefused(ValueError):
    """A call the engine cannot carry out; one line that says why."""


class EngineHost(Protocol):
    """Where an engine runs: a way to start one at a time, and to know of its end.

    `failure` says in one line why an engine could not start, where it did not say so itself on
    stderr. `shares_clock`: its time.monotonic is that of this process.
    """

    shares_clock: bool
    failure: str | None

    def bind(self, sending: zmq.Socket, receiving: zmq.Socket) -> None:
        """Bind the sockets to addresses that the next engine can reach."""
        ...

    async def run(self, config: Config) -> int:
        """Start an engine that connects to them; returns its exit status when it has ended."""
        ...

    def terminate(self) -> None:
        """End an engine that does not serve yet."""
        ...

    def kill(self) -> None:
        """End the engine at once."""
        ...


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
    """Starts an engine process with `config`, keeps it running, and talks to it.

    `state` is "starting" until the engine serves, "ready", or "stopped". The callbacks are called
    in the loop: `on_ready` each time an engine has started, `on_stats` with its statistics,
    `on_lost` when one has ended unasked. `name` tells the engines of a server apart.
    """

    def __init__(self, config: Config, name: str = "0", host: EngineHost | None = None):
        self._config, self.name, self._host = config, name, host or LocalEngine()
        self.state: Literal["starting", "ready", "stopped"] = "starting"
        self.info: Ready | None = None
        self.stats: Stats | None = None
        self.restarts = 0
        self.exit_status: int | None = None  # of an engine that could not start at all
        self.on_ready: list[Callable[[EngineClient], None]] = []
        self.on_stats: list[Callable[[EngineClient, Stats], None]] = []
        self.on_lost: list[Callable[[EngineClient], None]] = []
        self._stats_at = time.monotonic()
        self._context = zmq.asyncio.Context()
        self._commands: zmq.asyncio.Socket | None = None
        self._ended: asyncio.Task[int] | None = None  # of the engine that runs now
        self._generations: dict[int, Generation] = {}
        self._replies: dict[int, asyncio.Future] = {}
        self.training = TrainingClient(self._send)
        self._next_request_id, self._call_ids = 0, itertools.count()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Event)
        self._stop_asked = asyncio.Event()

    # -- the process ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep an engine running until `stop`, or until it turns out that none can be started."""
        wait_s, killed = 1.0, 0
        while not self._stop_asked.is_set():
            began = time.monotonic()
            status = await self._run_once()
            if self._stop_asked.is_set():
                break
            killed += status < 0  # by a signal: it may not have been the engine's fault
            if status == BAD_INPUT or (
                self.info is None and (status >= 0 or killed == _FIRST_STARTS)
            ):
                self.exit_status = status if status > 0 else 1
                break
            log.error("engine %s ended with status %s; starting another", self.name, status)
            for lost in self.on_lost:
                lost(self)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S) if time.monotonic() - began < 60 else 1.0
            self.restarts += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop_asked.wait(), wait_s)
        self.state = "stopped"

    async def _run_once(self) -> int:
        """Run one engine process to its end; returns its exit status."""
        self.state, self.stats, self._stats_at = "starting", None, time.monotonic()
        sending, receiving = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        try:
            for socket in (sending, receiving):
                socket.set_hwm(0)
            self._host.bind(sending, receiving)
            self._commands = sending
            self._ended = asyncio.create_task(self._host.run(self._config))
            tasks = [self._receive(receiving), self._end_if_stuck()]
            tasks = [asyncio.create_task(task) for task in tasks]
            status = await asyncio.shield(self._ended)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            while await receiving.poll(100):
                self._take(self._decoder.decode(await receiving.recv()))
            return status
        finally:
            self._commands = self._ended = None
            if self.state == "ready":
                self.state = "starting"
            self._fail_all()
            sending.close(linger=0)
            receiving.close(linger=0)

    def _fail_all(self) -> None:
        message = "the engine process has ended"
        for request_id, generation in list(self._generations.items()):
            generation.put(Output(request_id, [], error=message))
        self._generations.clear()
        for future in self._replies.values():
            if not future.done():
                future.set_exception(EngineUnavailable(message))
        self._replies.clear()
        self.training.fail_all(EngineUnavailable(message))

    async def stop(self, timeout_s: float) -> bool:
        """End the engine; whether it ended by itself within `timeout_s`."""
        self._stop_asked.set()
        ended = self._ended
        if ended is None:
            return True
        if self.state == "ready":
            self._send(Stop())
        else:
            self._host.terminate()
        try:
            await asyncio.wait_for(asyncio.shield(ended), timeout_s)
        except TimeoutError:
            log.error("engine %s did not stop within %.0f s and is killed", self.name, timeout_s)
            self._host.kill()
            with contextlib.suppress(TimeoutError):  # in a system call that cannot be interrupted
                await asyncio.wait_for(asyncio.shield(ended), _KILLED_S)
            return False
        return True

    @property
    def failure(self) -> str | None:
        """Why no engine could be started, where the engine did not say so on stderr."""
        return self._host.failure

    @property
    def patience_s(self) -> float:
        """How long a call that takes little is waited for."""
        return self._config.server.stuck_after_s

    @property
    def in_flight(self) -> int:
        """Outputs that have been asked for and have not ended."""
        return len(self._generations)

    def problem(self) -> str | None:
        """Why the engine is not healthy, or None."""
        if self.state != "ready":
            return f"the engine is {self.state}"
        limit = self._config.server.stuck_after_s
        late = time.monotonic() - self._stats_at
        if late > min(limit / 2, _STATS_LATE_S):
            return f"the engine process has said nothing for {late:.0f} s"
        return self._stuck()

    def _stuck(self) -> str | None:
        """Why the engine is to be ended and started again, or None."""
        limit, late = self._config.server.stuck_after_s, time.monotonic() - self._stats_at
        if self.state != "ready":
            return None
        if late > limit:
            return f"the engine process has said nothing for {late:.0f} s"
        if self.stats is not None and not self.stats.idle and self.stats.quiet_s > limit:
            return f"the engine has work and has done no step for {self.stats.quiet_s:.0f} s"
        if self.stats is not None and self.stats.call_waits_s > limit:
            return f"calls have waited {self.stats.call_waits_s:.0f} s for others, which do not end"
        return None

    async def _end_if_stuck(self) -> None:
        """An engine that stands still is killed; another one is started then, and jobs go on."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(_WATCHED_EVERY_S)
            if time.monotonic() - before > 4 * _WATCHED_EVERY_S:
                self._stats_at = time.monotonic()  # this process stood still: messages wait
            elif reason := self._stuck():
                log.error("engine %s is killed: %s", self.name, reason)
                self._host.kill()
                return

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
            case Trained():
                self.training.take(event)
            case Stats():
                self.stats, self._stats_at = event, time.monotonic()
                for take in self.on_stats:
                    take(self, event)
            case Ready():
                self.info, self.state, self._stats_at = event, "ready", time.monotonic()
                log.info(
                    "engine %s ready after %.1f s, process %d on %s",
                    *(self.name, event.startup_s, event.pid, event.node),
                )
                for ready in self.on_ready:
                    ready(self)

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
        self._send(Submit(requests, None if self._host.shares_clock else time.monotonic()))
        for request in requests:
            self._generations[request.request_id] = generation
        return generation

    def forget(self, request_ids: Sequence[int], *, cancel: bool) -> None:
        """Send nothing more of requests; `cancel`: the engine shall drop them too."""
        known = [i for i in request_ids if self._generations.pop(i, None) is not None]
        if cancel and known and self.state == "ready":
            self._send(Cancel(known))

    def acknowledge(self, name: str, run: str, number: int) -> None:
        """Tell that facts of a job are written down; an engine that is gone need not know."""
        if self.state == "ready":
            self._send(Acknowledge(name, run, number))

    async def call(self, method: str, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Run a method of `EngineCalls`. EngineRefused: it cannot; EngineUnavailable: no engine, or
        no answer within `timeout_s`."""
        call_id = next(self._call_ids)
        future = asyncio.get_running_loop().create_future()
        self._send(Call(call_id, method, arguments))
        self._replies[call_id] = future
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            message = f"the engine has not answered {method} within {timeout_s:.0f} s"
            raise EngineUnavailable(message) from None
        finally:
            self._replies.pop(call_id, None)
