"""The engine process: an engine, its loop, and the way in and out for the HTTP process.

Three threads: the engine's own, which alone touches it; the main one, which takes commands and
sends statistics; one that encodes and sends events, so that a step never waits for a socket. What
takes time (data sets, adapter files) is read in others before the engine's is asked. It ends when
told to, on SIGTERM, or when the HTTP process is gone; running jobs write a checkpoint then, all
within `server.grace_s`. A watchdog holds that deadline, and ends it when the main thread stands
still for `server.stuck_after_s`.
"""

from __future__ import annotations

import contextlib
import itertools
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import zmq

from flexllm_jax.config import Config, build_config
from flexllm_jax.config.cli import quiet_libraries
from flexllm_jax.engine.engine import Engine
from flexllm_jax.engine.loop import EngineLoop, EngineStopped
from flexllm_jax.errors import UserError
from flexllm_jax.models.text.tokenizer import load_tokenizer
from flexllm_jax.server.engines.alone import lock_for_engine
from flexllm_jax.server.engines.calls import EngineCalls
from flexllm_jax.server.engines.engine_requests import EngineRequests
from flexllm_jax.server.engines.protocol import (
    BAD_INPUT,
    Acknowledge,
    AdapterState,
    Call,
    Cancel,
    Command,
    Event,
    Ready,
    Reply,
    States,
    Stats,
    Step,
    Stop,
    Submit,
    Train,
)
from flexllm_jax.server.engines.training import EngineTraining
from flexllm_jax.server.engines.watchdog import end_within, stand_down
from flexllm_jax.server.http.logs import use_json

log = logging.getLogger(__name__)

STATS_S = 0.2
_WORKERS = 4  # beside those that start jobs
_ENDS_S = 2.0  # that an earlier server's engine may take beyond its grace time


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
        self._section = config.server
        self._stopping = threading.Event()
        try:
            tokenizer = load_tokenizer(config.model.path)
            self.engine = Engine(config, tokenizer, progress=False)
        except BaseException:
            self._finish_sending()
            raise
        self._workers = ThreadPoolExecutor(
            _WORKERS + config.server.max_running_jobs, thread_name_prefix="call"
        )
        self._compilers = ThreadPoolExecutor(2, thread_name_prefix="structure")
        self._work_ids = itertools.count()
        self._unbegun: dict[int, float] = {}  # since when work waits for a worker
        self.loop = EngineLoop(self.engine, self._after_step)
        self._calls = EngineCalls(config, self.engine, self.loop, tokenizer)
        self._requests = EngineRequests(
            *(self.engine, self.loop, self._calls),
            tell=self._events.put,
            load=self._work,
            compile=self._compilers.submit,
        )
        self._training = EngineTraining(self.loop, self._calls, self._events.put, self._work)
        self._last_step = self._last_idle = time.monotonic()
        self._step_cpu_s = 0.0

    def stop(self) -> None:
        """End: from here on there is a deadline. May be called in any thread."""
        if not self._stopping.is_set():
            end_within(self._section.grace_s)
            self._stopping.set()

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
        self._compilers.submit(self.engine.constraints.matchers.vocabulary)
        decoder = msgspec.msgpack.Decoder(Command)
        next_stats = 0.0
        sys.setswitchinterval(0.001)  # the engine's thread waits no longer for the others
        while self.loop.alive and not self._stopping.is_set():
            if self._commands.poll(int(STATS_S * 1e3)):
                command = decoder.decode(self._commands.recv())
                with contextlib.suppress(EngineStopped):  # it fails: the loop is not alive then
                    self._take(command)
            if time.monotonic() >= next_stats and self.loop.alive:
                next_stats = time.monotonic() + STATS_S
                end_within(self._section.stuck_after_s)
                stats = self._stats()
                if self.loop.alive:  # else jobs may be said to have failed with the engine
                    self._events.put(stats)
                self._calls.forget_ended()
                with contextlib.suppress(EngineStopped):
                    self._requests.go_on()
        end_within(self._section.grace_s)
        failed = not self.loop.alive  # jobs are not to blame, as it seems: the next engine goes on
        self.loop.stop()
        self._workers.shutdown(wait=False, cancel_futures=True)  # some may never return
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._training.close()
        if not failed:
            self._events.put(self._stats())
        self._finish_sending()
        stand_down()
        return int(failed)

    def _take(self, command: Command) -> None:
        match command:
            case Submit(requests, sent):
                if sent is not None:
                    shift = time.monotonic() - sent
                    requests = [
                        msgspec.structs.replace(r, arrival=r.arrival + shift) for r in requests
                    ]
                self._requests.take(requests)
            case Cancel(request_ids):
                self._requests.cancel(request_ids)
            case Call():
                self._work(self._call, command)
            case Acknowledge(name, run, number):
                self._calls.facts.acknowledge(name, run, number)
            case Train():
                self._training.take(command)
            case Stop():
                self.stop()

    def _work(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run a function in a worker."""
        number = next(self._work_ids)
        self._unbegun[number] = time.monotonic()

        def begin() -> None:
            del self._unbegun[number]
            function(*arguments)

        self._workers.submit(begin)

    def _after_step(self) -> None:
        """In the engine's thread."""
        self._last_step = time.monotonic()
        self._requests.tell_tokens()
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
            observed = engine.observations.popleft()
            observations.append(Step(*(getattr(observed, name) for name in Step.__struct_fields__)))
        unbegun = list(self._unbegun.values())
        return Stats(
            idle=self.loop.idle,
            quiet_s=now - max(self._last_step, self._last_idle),
            call_waits_s=now - min(unbegun, default=now),
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
            jobs=self._calls.facts.reports(),
            training=self._training.states(),
            step_cpu_s=self._step_cpu_s,
            message_cpu_s=time.thread_time() + self._sender_cpu_s,
            free_slots=engine.adapters.directory.num_free,
            on_host=engine.versions.num_on_host,
            spilled=engine.versions.spilled,
            returned=engine.versions.returned,
            states=self._states(),
        )

    def _states(self) -> States | None:
        scheduler, sizes = self.engine.scheduler, self.engine.runner.sizes
        if not sizes.recurrent:
            return None
        own = scheduler.pool.snapshots
        counts = (own.used, len(own.slots), own.saved, own.hits, own.evicted) if own else (0,) * 5
        return States(scheduler.num_running, sizes.rows, *counts)

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
        context.term()  # waits so long until all is sent

    def _finish_sending(self) -> None:
        self._commands.close(linger=0)
        self._events.put(None)
        self._sender.join()


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
        process.stop()

    threading.Thread(target=watch_parent, name="parent", daemon=True).start()
    try:
        with lock_for_engine(config.output_dir, config.server.grace_s + _ENDS_S):
            process = EngineProcess(config, commands, events)
            signal.signal(signal.SIGTERM, lambda *_: process.stop())
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
