"""One engine over several processes, each with its own devices: process 0 leads, the others follow.

Process 0 runs the engine, which calls its runner. Here that is a `Leader`, which sends every call
to the other processes before it makes it; their runners do the same in the same order, so that the
collectives in the programs meet. Arrays of the device are never sent: in a message they are the
numbers of results of earlier calls. Nothing is sent back, so a step waits for no other process but
in its collectives.

A process that is lost ends all others at once, as a collective without it never ends: jobs resume
from their checkpoints when all are started again.
"""

import itertools
import logging
import os
import pickle
import queue
import secrets
import signal
import socket
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, NoReturn, cast

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all

from flexllm_jax.config import Config, ConfigError
from flexllm_jax.engine.device.runner import Runner

log = logging.getLogger(__name__)

# The methods of a runner that use its devices.
CALLS = (
    "put",
    "forward",
    "sample",
    "prompt_logprobs",
    "write_history",
    "write_pages",
    "copy_slot",
    "write_adapter",
    "copy_adapter",
    "read_adapter",
    "to_host",
    "new_job_state",
    "begin_backward",
    "clear_finetune",
    "score_unit",
    "loss_unit",
    "layer_unit",
    "commit",
    "read_logprobs",
    "optimizer_step",
    "copy_state",
)
LOST = 70  # exit status of a process that ends because another did
_KEY_BYTES = 32
_OWN_FIELDS = {"process_id", "output_dir"}  # in which the processes' configurations may differ


def make_runner(config: Config, *, progress: bool = True) -> Runner:
    """The runner of an engine; in process 0 of several, one that leads the others.

    In those this does not return: they follow process 0, and exit when it has ended.
    """
    parallel = config.parallel
    if parallel.num_processes == 1:
        return Runner(config, progress=progress)
    if parallel.process_id:
        raise SystemExit(follow(config))
    ending = threading.Event()
    followers = _call_followers(config, ending)
    return cast(Runner, Leader(Runner(config, progress=progress), followers, ending))


def follow(config: Config) -> int:
    """Do as process 0 does until it ends; returns the exit status.

    SIGINT and SIGTERM are left to process 0. ConfigError when the configurations differ.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parallel = config.parallel
    leader = _find_leader(config)
    name = f"process {parallel.process_id} of {parallel.num_processes}"
    log.info("%s: follows process 0", name)
    calls: queue.SimpleQueue[tuple] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(leader, calls), name="leader", daemon=True).start()
    runner = Runner(config, progress=False)
    arrays = _Results(runner.params)
    log.info("%s: ready", name)
    while call := calls.get():
        method, arguments, named, released = call
        arrays.release(released)
        arguments, named = arrays.replace_numbers((arguments, named))
        arrays.add(getattr(runner, method)(*arguments, **named))
    log.info("%s: process 0 has ended", name)
    jax.distributed.shutdown()
    return 0


class Leader:
    """A runner, and those of the other processes: has all that `runner` has.

    Only one thread at a time may call it.
    """

    def __init__(self, runner: Runner, followers: list[Connection], ending: threading.Event):
        """`ending` is set once the others may go."""
        self._runner, self._followers, self._ending = runner, followers, ending
        self._results = _Numbers(runner.params)
        for method in CALLS:
            setattr(self, method, self._leading(method))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def _leading(self, method: str) -> Callable:
        own = getattr(self._runner, method)

        def call(*arguments: Any, **named: Any) -> Any:
            self._send(
                (method, *self._results.number((arguments, named)), self._results.forgotten())
            )
            result = own(*arguments, **named)
            self._results.add(result)
            return result

        return call

    def _send(self, call: tuple) -> None:
        message = pickle.dumps(call, pickle.HIGHEST_PROTOCOL)
        for process_id, follower in enumerate(self._followers, start=1):
            try:
                follower.send_bytes(message)
            except OSError:
                _end(f"process {process_id} of {len(self._followers) + 1} is gone")

    def close(self) -> None:
        """Let all processes end."""
        self._ending.set()
        self._send(())
        self._runner.close()
        jax.distributed.shutdown()


# -- arrays as numbers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Number:
    """An array in a message: the how-manieth of all arrays that calls returned."""

    value: int


class _Numbers:
    """The leader's side: arrays are numbered while they live."""

    def __init__(self, first: Any):
        self._count = itertools.count()
        self._by_id: dict[int, int] = {}
        self._forgotten: deque[int] = deque()  # any thread may drop the last reference
        self.add(first)

    def add(self, result: Any) -> None:
        for leaf in jax.tree.leaves(result):
            if isinstance(leaf, jax.Array):
                number = next(self._count)
                self._by_id[id(leaf)] = number
                weakref.finalize(leaf, self._forget, id(leaf), number).atexit = False

    def _forget(self, key: int, number: int) -> None:
        if self._by_id.get(key) == number:
            del self._by_id[key]
        self._forgotten.append(number)

    def forgotten(self) -> list[int]:
        """Numbers of arrays that are gone, each once."""
        return [self._forgotten.popleft() for _ in range(len(self._forgotten))]

    def number(self, tree: Any) -> Any:
        def encode(leaf: Any) -> Any:
            return _Number(self._by_id[id(leaf)]) if isinstance(leaf, jax.Array) else leaf

        return jax.tree.map(encode, tree)


class _Results:
    """A follower's side: the arrays of all calls that the leader still has."""

    def __init__(self, first: Any):
        self._count = itertools.count()
        self._arrays: dict[int, jax.Array] = {}
        self.add(first)

    def add(self, result: Any) -> None:
        for leaf in jax.tree.leaves(result):
            if isinstance(leaf, jax.Array):
                self._arrays[next(self._count)] = leaf

    def release(self, numbers: list[int]) -> None:
        for number in numbers:
            del self._arrays[number]

    def replace_numbers(self, tree: Any) -> Any:
        def decode(leaf: Any) -> Any:
            return self._arrays[leaf.value] if isinstance(leaf, _Number) else leaf

        return jax.tree.map(decode, tree)


# -- connections ----------------------------------------------------------------------------------


def _join(config: Config) -> str:
    """Join the other processes; returns the leader's host."""
    parallel = config.parallel
    address = cast(str, parallel.coordinator_address)
    # A CPU may run programs at once that do not wait for each other: collectives would mix them up.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(address, parallel.num_processes, parallel.process_id)
    except RuntimeError as error:
        raise ConfigError(
            f"parallel.coordinator_address={address}: process {parallel.process_id} of "
            f"{parallel.num_processes} found no others ({str(error).splitlines()[0]}); start all "
            f"of them with the same address, HOST:PORT of process 0"
        ) from None
    return address.rpartition(":")[0]


def _call_followers(config: Config, ending: threading.Event) -> list[Connection]:
    """Process 0's connections to the others, in the order of their numbers."""
    host, key = _join(config), secrets.token_bytes(_KEY_BYTES)
    count = config.parallel.num_processes
    own = config.model_dump(mode="json")
    with Listener((host, 0), backlog=count, authkey=key) as listener:
        port = listener.address[1]
        broadcast_one_to_all(np.frombuffer(key + int(port).to_bytes(4, "big"), np.uint8))
        found: dict[int, Connection] = {}
        while len(found) < count - 1:
            connection = listener.accept()
            _keep_alive(connection)
            process_id, theirs = connection.recv()
            found[process_id] = connection
            if field := _first_difference(own, theirs):
                connection.send(field)
                raise ConfigError(
                    f"{field} of process {process_id} differs from that of process 0: start all "
                    f"with the same configuration"
                )
            connection.send(None)
    for process_id, connection in found.items():
        name = f"process {process_id} of {count}"
        threading.Thread(
            target=_watch, args=(connection, name, ending), name=name, daemon=True
        ).start()
    return [found[process_id] for process_id in sorted(found)]


def _find_leader(config: Config) -> Connection:
    """A follower's connection to process 0."""
    host = _join(config)
    secret = bytes(broadcast_one_to_all(np.zeros(_KEY_BYTES + 4, np.uint8)))
    port = int.from_bytes(secret[_KEY_BYTES:], "big")
    connection = Client((host, port), authkey=secret[:_KEY_BYTES])
    _keep_alive(connection)
    connection.send((config.parallel.process_id, config.model_dump(mode="json")))
    if field := connection.recv():
        raise ConfigError(
            f"{field} differs from that of process 0: start all with the same configuration"
        )
    return connection


def _first_difference(own: Any, theirs: Any, path: str = "") -> str | None:
    """The first field in which two configurations differ but may not."""
    if not isinstance(own, dict) or not isinstance(theirs, dict):
        return None if own == theirs else path
    for name in own:
        if name not in _OWN_FIELDS:
            where = f"{path}.{name}" if path else name
            if found := _first_difference(own[name], theirs.get(name), where):
                return found
    return None


def _keep_alive(connection: Connection) -> None:
    """Send at once, and notice within 20 seconds when the other machine is gone."""
    with socket.socket(fileno=os.dup(connection.fileno())) as own:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 20_000)


def _watch(connection: Connection, name: str, ending: threading.Event) -> None:
    """In process 0: notice that a follower is gone."""
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        if not ending.is_set():
            _end(f"{name} is gone")


def _receive(leader: Connection, calls: queue.SimpleQueue) -> None:
    """In a follower: take calls as they come, and notice that process 0 is gone."""
    try:
        while call := pickle.loads(leader.recv_bytes()):
            calls.put(call)
    except (EOFError, OSError):
        _end("process 0 is gone")
    calls.put(())


def _end(reason: str) -> NoReturn:
    """End this process at once: its other threads may wait in a collective for ever."""
    log.critical(
        "%s: the engine ends; start all processes again, jobs resume from their checkpoints", reason
    )
    os._exit(LOST)
