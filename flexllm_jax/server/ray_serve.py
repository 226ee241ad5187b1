"""Several engines behind one endpoint: a Ray Serve application.

Its one deployment is the server's FastAPI app as it is, with the database, the files and the jobs
in one replica; Ray Serve's proxy stands before it and starts another if it dies. Each engine is a
Ray actor with devices of its own, which the app starts, watches and talks to
(`engines/ray_actor.py`). The engines are actors and not a second deployment, because it matters
which one is asked: a job is paused where it runs, a request goes where its adapter is. Adapters and
checkpoints are folders in `output_dir`, which all machines of the cluster must see under the same
path.
"""

# pyright: reportMissingImports=false
# Ray is an extra.
from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from flexllm_jax.config import Config, ConfigError, build_config
from flexllm_jax.config.cli import quiet_libraries
from flexllm_jax.server.app import Server
from flexllm_jax.server.engines.alone import lock_for_server
from flexllm_jax.server.engines.client import EngineClient
from flexllm_jax.server.engines.engines import Engines
from flexllm_jax.server.engines.protocol import BAD_INPUT
from flexllm_jax.server.engines.ray_actor import RayEngine
from flexllm_jax.server.http.logs import use_json
from flexllm_jax.server.run import FOR_REQUESTS, check, listen, log_address

log = logging.getLogger(__name__)

APP = "flexllm"
_UNLIMITED = 1_000_000  # requests; the app itself admits and refuses
_FOR_WRITING_S = 0.5  # for what engines said at their end
_ANSWER_S = 20.0  # until a deployment is held to be gone
_QUIET = {"enable_access_log": False, "log_level": "WARNING"}  # Ray Serve's own logs


class Ingress:
    """What the script asks of the deployment, besides the HTTP interfaces."""

    app: FastAPI

    @property
    def _lifetime(self) -> Lifetime:
        return self.app.state.lifetime

    async def ended(self) -> tuple[int, str | None] | None:
        """The exit status, and why, when the engines could not be started; None as long as they
        run."""
        engines = self._lifetime.server.engines
        return None if engines.exit_status is None else (engines.exit_status, engines.failure)

    async def stop(self) -> bool:
        """`Lifetime.stop`."""
        return await self._lifetime.stop()


class Lifetime:
    """The server from the replica's start to its end."""

    def __init__(self, config: Config):
        self._grace_s = config.server.grace_s
        # Ray Serve starts another replica before the one that it replaces has ended.
        self._lock = lock_for_server(config.output_dir, self._grace_s + _ANSWER_S)
        section = config.ray
        hosts = [
            RayEngine(f"{APP} engine {i}", APP, section.cpus_per_replica, num_gpus(config))
            for i in range(section.replicas)
        ]
        members = [EngineClient(config, str(i), host) for i, host in enumerate(hosts)]
        self.server = Server(config, Engines(members))
        self._stopping: asyncio.Task[bool] | None = None

    @contextlib.asynccontextmanager
    async def __call__(self, app: FastAPI) -> AsyncIterator[None]:
        """The application's lifespan."""
        await self.server.start()
        running = asyncio.create_task(self.server.engines.run())
        try:
            yield
        finally:
            await self.stop()
            await running
            await self.server.jobs.close(_FOR_WRITING_S)
            await self.server.responses.close()
            self.server.inference.structures.close()
            self._lock.close()

    async def stop(self) -> bool:
        """Admit nothing more, let requests finish and jobs write checkpoints, end the engines;
        whether all ended by themselves within `server.grace_s`."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        return await asyncio.shield(self._stopping)

    async def _stop(self) -> bool:
        began = time.monotonic()
        self.server.begin_drain()
        while self.server.admission.in_flight:
            if time.monotonic() - began > self._grace_s * FOR_REQUESTS:
                break
            await asyncio.sleep(0.05)
        left = self._grace_s - (time.monotonic() - began)
        if self.server.tinker is not None:
            await self.server.tinker.close(left / 2)
            left = self._grace_s - (time.monotonic() - began)
        return await self.server.engines.stop(max(1.0, left - 0.5))


def num_gpus(config: Config) -> float:
    """GPUs of an engine: those given, or one a device of the model where the cluster has any."""
    if config.ray.gpus_per_replica is not None:
        return config.ray.gpus_per_replica
    return float(config.parallel.tp) if ray.cluster_resources().get("GPU") else 0.0


def application(config: Config) -> Application:
    """The Ray Serve application; Ray must be initialized."""
    tree = _absolute(config.model_dump(mode="python"))

    def build() -> FastAPI:  # in the replica
        quiet_libraries()
        config = build_config(tree, "ray")
        if config.server.log_format == "json":
            use_json()
        lifetime = Lifetime(config)
        app = lifetime.server.app
        app.state.lifetime, app.router.lifespan_context = lifetime, lifetime
        return app

    deployment = serve.deployment(
        serve.ingress(build)(Ingress),
        name="server",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_UNLIMITED,
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=config.server.grace_s,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=_QUIET,
    )
    return deployment.bind()


def _absolute(tree: Any) -> Any:
    """The same configuration for a process that may have been started in another folder."""
    if isinstance(tree, dict):
        return {key: _absolute(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_absolute(value) for value in tree]
    return str(tree.absolute()) if isinstance(tree, Path) else tree


# -- the script -----------------------------------------------------------------------------------


def run(config: Config) -> int:
    """Start or join a cluster, serve until a signal; returns the exit status."""
    check(config)
    if config.parallel.num_processes > 1:
        raise ConfigError(
            f"parallel.num_processes: got {config.parallel.num_processes}; on Ray an engine is one "
            f"process with parallel.tp devices of one machine: set it to 1"
        )
    if config.log.plans and config.ray.replicas > 1:
        raise ConfigError(
            "log.plans: engines would write one plans.jsonl together; set it to false"
        )
    if config.server.log_format == "json":
        use_json()
    lock_for_server(config.output_dir).close()
    Server(config).database.close()  # what cannot be used is told before anything is started
    with listen(config) as listener:
        host, port = listener.getsockname()[:2]
    stopping = threading.Event()
    _start_ray(config)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: _stop(stopping))
        _check_resources(config)
        options = {"host": host, "port": port, "keep_alive_timeout_s": 75}
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location="HeadOnly", http_options=options, logging_config=_QUIET)
        handle = serve.run(application(config), name=APP, route_prefix="/")
        log_address(host, port)
        try:
            return _watch(handle, stopping, config.server.grace_s)
        finally:
            serve.delete(APP)
    finally:
        ray.shutdown()


def _start_ray(config: Config) -> None:
    section = config.ray
    options: dict[str, Any] = {"address": section.address}
    if section.address is None:
        options = {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": section.object_store_bytes,
        }
    try:
        if section.address is not None and section.address != "auto":
            host, _, port = section.address.rpartition(":")
            socket.create_connection((host, int(port)), _ANSWER_S).close()  # Ray tries for minutes
        ray.init(**options, namespace=APP, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"ray.address: {section.address} cannot be joined ({' '.join(str(error).split())}): "
            f"start a cluster with `ray start --head`, give its token in RAY_AUTH_TOKEN if it wants"
            f" one, or set it to null"
        ) from None


def _check_resources(config: Config) -> None:
    count, has = config.ray.replicas, ray.cluster_resources()
    for field, kind, each in (
        ("cpus_per_replica", "CPU", config.ray.cpus_per_replica),
        ("gpus_per_replica", "GPU", num_gpus(config)),
    ):
        needed, there = count * each, has.get(kind, 0.0)
        if needed > there:
            message = (
                f"ray.replicas: {count} with {each:g} {kind}s each need {needed:g}, the cluster "
                f"has {there:g}: lower ray.replicas or ray.{field}"
            )
            if config.ray.address is None:
                raise ConfigError(message)
            log.warning("%s, or add machines", message)


def _stop(stopping: threading.Event) -> None:
    if stopping.is_set():
        raise KeyboardInterrupt  # a second signal ends it at once
    log.info("stopping: requests finish, jobs write checkpoints")
    stopping.set()


def _watch(handle: DeploymentHandle, stopping: threading.Event, grace_s: float) -> int:
    """Wait for a signal, or for engines that cannot be started; returns the exit status."""
    while not stopping.wait(0.5):
        try:
            ended = handle.ended.remote().result(timeout_s=_ANSWER_S)
        except (RayError, RayServeException, TimeoutError) as error:
            log.error("the server does not answer: %s", " ".join(str(error).split()))
            continue  # Ray Serve starts another
        if ended is not None:
            status, failure = ended
            reason = failure or "an engine could not be started"
            if status == BAD_INPUT:
                raise ConfigError(reason)
            log.error("%s", reason)
            return status
    clean = handle.stop.remote().result(timeout_s=grace_s + _ANSWER_S)
    return 0 if clean else 1
