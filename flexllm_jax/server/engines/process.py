"""The engine process: an engine, its loop, and the way in and out for the HTTP process.

Three threads: the engine's own, which alone touches it; the main one, which takes commands and
sends statistics; one that encodes and sends events, so that a step never waits for a socket. What
takes time (data sets, adapter files) is read in others before the engine's is asked. It ends when
told to, on SIGTERM, or when the HTTP process is gone; running jobs write a checkpoint then.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO

import msgspec
import zmq
from llguidance import LLMatcher

from flexllm_jax.config import Config, build_config
from flexllm_jax.config.cli import quiet_libraries
from flexllm_jax.engine.engine import Engine
from flexllm_jax.engine.loop import EngineLoop, EngineStopped, NewRequest, RequestFuture
from flexllm_jax.engine.request import RequestState
from flexllm_jax.errors import UserError
from flexllm_jax.models.tokenizer import load_tokenizer
from flexllm_jax.server.engines.calls import EngineCalls
from flexllm_jax.server.engines.protocol import (
    BAD_INPUT,
    AdapterState,
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
    Step,
    Stop,
    Submit,
)
from flexllm_jax.server.http.logs import use_json

log = logging.getLogger(__name__)

STATS_S = 0.2

Numbered = dict[int, NewRequest]  # by the client's number


class EngineProcess:
    """Answers commands from `commands`, and sends events to `events` (ZeroMQ addresses). With a
    `server_key` they are encrypted, and only who knows the key can connect."""

    def __init__(self, config: Config, commands: str, events: str, server_key: bytes | None = None):
        context = zmq.Context()
        if server_key is not None:  # options of a context are those of its sockets
            context.curve_serverkey = server_key
            context.curve_publickey, context.curve_secretkey = zmq.curve_keypair()
        self._commands = context.socket(zmq.PULL)
        self._commands.set_hwm(0)
        self._commands.connect(commands)
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._sender_cpu_s = 0.0
        self._sender = threading.Thread(target=self._send, args=(context, events), name="events")
        self._sender.start()
        self.stopping = threading.Event()
        # The engine's thread alone uses these: by the engine's number, and by the client's.
        self._active: dict[str, tuple[int, RequestFuture]] = {}
        self._futures: dict[int, RequestFuture] = {}
        self._loading: dict[str, Numbered] = {}  # by adapter: requests that wait for it
        self._compiling: set[int] = set()  # requests whose structure is not compiled yet
        try:
            tokenizer = load_tokenizer(config.model.path)
            self.engine = Engine(config, tokenizer, progress=False)
        except BaseException:
            self._finish_sending()
            raise
        self.loop = EngineLoop(self.engine, self._after_step)
        self._calls = EngineCalls(config, self.engine, self.loop, tokenizer)
        self._workers = ThreadPoolExecutor(4, thread_name_prefix="call")
        self._compilers = ThreadPoolExecutor(2, thread_name_prefix="structure")
        self._last_step = self._last_idle = time.monotonic()
        self._step_cpu_s = 0.0

    def run(self) -> int:
        """Serve until told to stop; returns the exit status."""
        runner, config = self.engine.runner, self.engine.config
        self._events.put(
            Ready(
                max_model_len=runner.sizes.max_model_len,
                vocab_size=runner.model.vocab_size,
                eos_token_ids=list(self.engine.end_token_ids),
                num_pages=runner.num_pages,
                page_size=runner.sizes.page_size,
                adapter_slots=config.adapters.slots,
                startup_s=self.engine.startup_s,
                pid=os.getpid(),
                node=socket.gethostname(),
            )
        )
        # Before a request needs it; of a tokenizer without one, that request is told.
        self._compilers.submit(self.engine.matchers.vocabulary)
        decoder = msgspec.msgpack.Decoder(Command)
        next_stats = 0.0
        sys.setswitchinterval(0.001)  # the engine's thread waits no longer for the others
        while self.loop.alive and not self.stopping.is_set():
            if self._commands.poll(int(STATS_S * 1e3)):
                command = decoder.decode(self._commands.recv())
                with contextlib.suppress(EngineStopped):  # it fails: the loop is not alive then
                    self._take(command)
            if time.monotonic() >= next_stats and self.loop.alive:
                next_stats = time.monotonic() + STATS_S
                self._events.put(self._stats())
        failed = not self.loop.alive  # jobs are not to blame, as it seems: the next engine goes on
        self.loop.stop()
        self._workers.shutdown(cancel_futures=True)
        self._compilers.shutdown(wait=False, cancel_futures=True)
        if not failed:
            self._events.put(self._stats())
        self._finish_sending()
        return int(failed)

    def _take(self, command: Command) -> None:
        match command:
            case Submit(requests, sent):
                if sent is not None:
                    shift = time.monotonic() - sent
                    requests = [
                        msgspec.structs.replace(r, arrival=r.arrival + shift) for r in requests
                    ]
                self._prepare(requests)
            case Cancel(request_ids):
                self.loop.post(lambda: self._cancel(request_ids))
            case Call():
                self._workers.submit(self._call, command)
            case Stop():
                self.stopping.set()

    def _prepare(self, requests: Sequence[Generate]) -> None:
        """Hand requests to the engine's thread, which has no time for what can be done here; their
        structure, which this thread has no time for, is compiled in another."""
        first = requests[0]  # a message is about one adapter and one structure
        if first.params.structured_outputs is None:
            numbered = _number(requests, [None] * len(requests))
            self.loop.post(partial(self._submit, numbered, first.adapter, first.adapter_path))
        else:
            self.loop.post(partial(self._compiling.update, [r.request_id for r in requests]))
            self._compilers.submit(self._compile, requests)

    def _compile(self, requests: Sequence[Generate]) -> None:
        """In a worker: what compiles is queued, or refused; unless it is cancelled by then."""
        first, numbers = requests[0], [r.request_id for r in requests]
        structure = first.params.structured_outputs
        try:
            matchers = self.engine.matchers.match_all(structure, len(requests))
        except Exception as error:
            invalid, text = isinstance(error, ValueError), " ".join(str(error).split())
            self.loop.post(partial(self._compiling.difference_update, numbers))
            self._refuse(numbers, text, invalid)
            return
        numbered = _number(requests, matchers)

        def submit() -> None:
            if left := {n: r for n, r in numbered.items() if n in self._compiling}:
                self._compiling.difference_update(left)
                self._submit(left, first.adapter, first.adapter_path)

        self.loop.post(submit)

    # -- requests, in the engine's thread ---------------------------------------------------------

    def _submit(self, requests: Numbered, adapter: str | None, path: str | None) -> None:
        if adapter and path and not self._calls.is_loaded(adapter):
            if adapter not in self._loading:
                self._loading[adapter] = {}
                self._workers.submit(self._load, adapter, path)
            self._loading[adapter] |= requests
        else:
            self._add(requests)

    def _load(self, adapter: str, path: str) -> None:
        """In a worker: load an adapter; then what waited for it is queued, or refused."""
        try:
            self._calls.load_adapter(adapter, path)
        except Exception as error:
            invalid, text = isinstance(error, ValueError), " ".join(str(error).split())
            self.loop.post(lambda: self._refuse(self._loading.pop(adapter), text, invalid))
        else:
            self.loop.post(lambda: self._add(self._loading.pop(adapter)))

    def _refuse(self, request_ids: Iterable[int], error: str, invalid: bool) -> None:
        outputs = [Output(number, [], error=error, invalid=invalid) for number in request_ids]
        self._events.put(Outputs(outputs))

    def _add(self, requests: Numbered) -> None:
        try:
            self._queue(requests)
        except Exception as error:
            log.exception("requests were not queued")
            self._refuse(requests, repr(error), invalid=False)

    def _queue(self, requests: Numbered) -> None:
        for number, future in zip(requests, self.loop.add(list(requests.values())), strict=True):
            if future.done() and (error := future.exception()):
                self._refuse([number], str(error), invalid=True)
            else:
                self._active[future.state.request_id] = (number, future)
                self._futures[number] = future

    def _cancel(self, request_ids: Sequence[int]) -> None:
        self._compiling.difference_update(request_ids)
        for waiting in self._loading.values():
            for number in request_ids:
                waiting.pop(number, None)
        for request_id in request_ids:
            future = self._futures.pop(request_id, None)
            if future is not None:
                self._active.pop(future.state.request_id, None)
                self.loop.drop(future, "cancelled by the client")

    def _after_step(self) -> None:
        """Tell the tokens that the step brought."""
        self._last_step = time.monotonic()
        outputs = []
        for state in self.engine.progressed:
            active = self._active.get(state.request_id)
            if active is None:
                continue
            request_id = active[0]
            first = len(state.output) == 1
            outputs.append(
                Output(
                    request_id,
                    state.output[-1:],
                    logprobs=state.logprobs[-1:],
                    prompt_logprobs=(state.prompt_logprobs or None) if first else None,
                    finish_reason=state.finish_reason,
                    queued_s=_queued_s(state) if first else None,
                    cached_tokens=state.cached_tokens if first else 0,
                    error=state.error,
                    invalid=state.error is not None,  # its structure was too much
                )
            )
            if state.finished:
                del self._active[state.request_id], self._futures[request_id]
        if outputs:
            self._events.put(Outputs(outputs))
        self._step_cpu_s = time.thread_time()

    # -- everything else --------------------------------------------------------------------------

    def _call(self, call: Call) -> None:
        """Run a call in a worker; it asks the engine's thread for what only that may do."""
        try:
            result = getattr(self._calls, call.method)(**call.arguments)
        except ValueError as error:  # AdapterError, DatasetError, ConfigError, ... are of this kind
            reply = Reply(call.call_id, error=" ".join(str(error).split()), invalid=True)
        except Exception as error:
            log.exception("%s failed", call.method)
            reply = Reply(call.call_id, error=repr(error))
        else:
            reply = Reply(call.call_id, result)
        self._events.put(reply)

    def _stats(self) -> Stats:
        engine, now = self.engine, time.monotonic()
        if self.loop.idle:
            self._last_idle = now
        pool, observations = engine.scheduler.pool, []
        while engine.observations:
            o = engine.observations.popleft()
            observations.append(
                Step(
                    o.decode_tokens,
                    o.prefill_tokens,
                    o.forward_tokens,
                    o.backward_units,
                    o.preempted,
                    o.measured_s,
                    o.predicted_s,
                )
            )
        return Stats(
            idle=self.loop.idle,
            quiet_s=now - max(self._last_step, self._last_idle),
            num_running=engine.scheduler.num_running,
            num_waiting=engine.scheduler.num_waiting,
            pages_used=pool.num_pages - pool.num_free,
            num_pages=pool.num_pages,
            prefix_queries=pool.queries * pool.page_size,
            prefix_hits=pool.hits * pool.page_size,
            recompiles=engine.runner.compilations.count,
            steps=observations,
            adapters=[
                AdapterState(p.name, p.version, p.users)
                for p in list(engine.adapters.directory.current.values())
            ],
            jobs=self._calls.job_reports(),
            step_cpu_s=self._step_cpu_s,
            message_cpu_s=time.thread_time() + self._sender_cpu_s,
        )

    def _send(self, context: zmq.Context, address: str) -> None:
        """The thread that sends events, in order."""
        sender = context.socket(zmq.PUSH)
        sender.set_hwm(0)
        sender.connect(address)
        encoder = msgspec.msgpack.Encoder()
        while (event := self._events.get()) is not None:
            sender.send(encoder.encode(event))
            self._sender_cpu_s = time.thread_time()
        sender.close(linger=2000)

    def _finish_sending(self) -> None:
        self._events.put(None)
        self._sender.join()


def _number(requests: Sequence[Generate], matchers: Sequence[LLMatcher | None]) -> Numbered:
    return {
        r.request_id: NewRequest(
            tuple(r.prompt), r.params, r.adapter, r.arrival, r.seed_offset, r.slo_class, matcher
        )
        for r, matcher in zip(requests, matchers, strict=True)
    }


def _queued_s(state: RequestState) -> float | None:
    return None if state.started_at is None else max(0.0, state.started_at - state.arrival)


def lock_folder(folder: Path) -> IO[str]:
    """Wait until no other engine uses `folder`: two would write each other's checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / "engine.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.warning("another engine uses %s: waiting for its end", folder)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def main() -> int:
    """Run an engine as the HTTP process asks: addresses as arguments, configuration on stdin.

    Stdin stays open as long as the HTTP process lives.
    """
    quiet_libraries()
    commands, events = sys.argv[1:]
    config = build_config(json.loads(sys.stdin.readline()), "stdin")
    if config.server.log_format == "json":
        use_json()
    process: EngineProcess | None = None

    def watch_parent() -> None:
        sys.stdin.read()
        if process is None:
            os._exit(1)  # still starting: there is nothing to save
        process.stopping.set()

    threading.Thread(target=watch_parent, name="parent", daemon=True).start()
    try:
        with lock_folder(config.output_dir):
            process = EngineProcess(config, commands, events)
            signal.signal(signal.SIGTERM, lambda *_: process.stopping.set())
            return process.run()
    except UserError as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return BAD_INPUT


if __name__ == "__main__":
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # threads of libraries must not hold up the end
