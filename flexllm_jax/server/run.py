"""Runs the server from start to a clean end.

SIGTERM and Ctrl-C stop it in order: nothing new is admitted, requests finish, running jobs write a
checkpoint, the engine ends; all within `server.grace_s`. A second signal ends it at once, and a
watchdog does when something hangs. `output_dir` is one server's at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import cast

import uvicorn

from flexllm_jax.config import Config, ConfigError
from flexllm_jax.server.app import Server
from flexllm_jax.server.engines.alone import lock_for_server
from flexllm_jax.server.engines.watchdog import end_within
from flexllm_jax.server.http.connections import BoundedConnection, Waiting
from flexllm_jax.server.http.logs import use_json
from flexllm_jax.trackers import kinds as trackers

log = logging.getLogger(__name__)

_HANGS_S = 5.0  # beyond the grace time: then something hangs
_FOR_WRITING_S = 0.5  # of the grace time, for what the engine said at its end
_OTHER_FILES = 256  # beside connections, and a file for each upload
FOR_REQUESTS = 0.6  # of the grace time; the rest is for the engine's end


class _HttpServer(uvicorn.Server):
    """uvicorn without handlers of its own: it would raise the signal again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(config: Config) -> socket.socket:
    """The socket to serve from; ConfigError when the address cannot be had."""
    host, port = config.server.host, config.server.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # in Linux: a peer that takes nothing is dropped
        limit_ms = int(config.server.stalled_after_s * 1e3)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, limit_ms)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        raise ConfigError(
            f"server.port: {host}:{port} cannot be listened on ({error.strerror}): choose another "
            f"server.host or server.port"
        ) from None
    return listener


def log_address(host: str, port: int) -> None:
    """Tell where the server is."""
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)


def check(config: Config) -> None:
    """ConfigError for what makes no sense in a server."""
    config.require_inputs()
    trackers.require(config.trackers)
    if config.finetune.jobs:
        raise ConfigError("finetune.jobs: the server takes jobs over HTTP; remove them here")
    needed = config.server.max_running_jobs + 2
    if config.adapters.slots < needed:
        raise ConfigError(
            f"adapters.slots: got {config.adapters.slots}; slot 0 is `no adapter`, every running "
            f"job needs one, and its result another: set it to {needed} or more, or lower "
            f"server.max_running_jobs"
        )
    if config.workload:
        raise ConfigError("workload: the server takes requests over HTTP; remove it")


def run(config: Config) -> int:
    """Serve until a signal; returns the exit status."""
    check(config)
    if config.ray.replicas > 1:
        raise ConfigError(
            f"ray.replicas: got {config.ray.replicas}; this starts one engine: use "
            f"scripts/serve_ray.py or set it to 1"
        )
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every client is an open file
    if hard != resource.RLIM_INFINITY and hard < 2 * config.server.max_connections + _OTHER_FILES:
        log.warning(
            "this process may have %d open files, too few for server.max_connections (%d): raise "
            "the limit (ulimit -n) or lower it",
            *(hard, config.server.max_connections),
        )
    if config.server.log_format == "json":
        use_json()
    with lock_for_server(config.output_dir):
        listener = listen(config)
        server = Server(config)
        return asyncio.run(_serve(server, listener))


def http_server(server: Server) -> uvicorn.Server:
    """What speaks HTTP for the application, within the limits of its section."""
    section = server.config.server
    connection = partial(BoundedConnection, waiting=Waiting(section))
    return _HttpServer(
        uvicorn.Config(
            server.app,
            http=cast(type[asyncio.Protocol], connection),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=section.keep_alive_s,  # type: ignore[arg-type]  # for call_later
            timeout_graceful_shutdown=max(1, int(section.grace_s * FOR_REQUESTS)),
        )
    )


async def _serve(server: Server, listener: socket.socket) -> int:
    section, http = server.config.server, http_server(server)
    stop_by: float | None = None

    def stop() -> None:
        nonlocal stop_by
        if stop_by is None:
            log.info("stopping: requests finish, jobs write checkpoints")
            stop_by = time.monotonic() + section.grace_s
            server.begin_drain()
            http.should_exit = True
        else:
            http.force_exit = True

    loop = asyncio.get_running_loop()

    signals = 0

    def begin_to_stop(*_: object) -> None:
        # Not `loop.add_signal_handler`: the deadline holds even if the loop stands still.
        nonlocal signals
        signals += 1
        if signals == 1:
            end_within(section.grace_s + _HANGS_S)
        loop.call_soon_threadsafe(stop)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, begin_to_stop)
    await server.start()
    engines = asyncio.create_task(server.engines.run())
    engines.add_done_callback(lambda _: setattr(http, "should_exit", True))
    log_address(*listener.getsockname()[:2])
    await http.serve(sockets=[listener])
    left = section.grace_s if stop_by is None else stop_by - time.monotonic()
    end_within(left + _HANGS_S)  # it holds for the end of Python, too, which waits for threads
    if server.tinker is not None:
        await server.tinker.close(left / 2)
    clean = await server.engines.stop(max(1.0, left - _FOR_WRITING_S))
    await engines
    await server.jobs.close(_FOR_WRITING_S)
    await server.responses.close()
    server.inference.structures.close()
    if server.engines.exit_status is not None:
        return server.engines.exit_status
    return 0 if clean else 1
