"""An engine in a Ray actor: on whichever machine of the cluster has the devices for it.

Ray places the actor, gives it its GPUs and tells of its end; commands and events go straight to it,
over the sockets that an engine on this machine has too, here over TCP. They are encrypted (CURVE)
with a key made for each engine, which reaches it through Ray: nobody else can connect.
"""

# pyright: reportMissingImports=false
# Ray is an extra.
from __future__ import annotations

import asyncio
import logging
import signal
from typing import Any

import ray
import zmq
from ray.exceptions import RayActorError, RayError

from flexllm_jax.config import Config, build_config
from flexllm_jax.config.cli import quiet_libraries
from flexllm_jax.errors import UserError
from flexllm_jax.server.engines.process import EngineProcess
from flexllm_jax.server.engines.protocol import BAD_INPUT
from flexllm_jax.server.http.logs import use_json

log = logging.getLogger(__name__)

_FREED_S = 30.0  # until an actor that was killed is gone


class EngineActor:
    """The process of one engine, from its start to its end."""

    def run(
        self, tree: dict[str, Any], commands: str, events: str, key: bytes
    ) -> tuple[int, str | None]:
        """Serve until told to stop; returns the exit status, and why it could not start."""
        quiet_libraries()
        config = build_config(tree, "ray")
        if config.server.log_format == "json":
            use_json()
        try:
            process = EngineProcess(config, commands, events, key)
        except UserError as error:
            return BAD_INPUT, str(error)
        return process.run(), None


class RayEngine:
    """An `EngineHost`. An actor with the same name, of a server that has ended, is ended first: two
    engines would write each other's checkpoints."""

    shares_clock = False

    def __init__(self, name: str, namespace: str, num_cpus: float, num_gpus: float):
        self.failure: str | None = None
        self._name, self._namespace = name, namespace
        self._resources = {"num_cpus": num_cpus, "num_gpus": num_gpus}
        self._addresses: list[str] = []
        self._key = b""
        self._actor: Any = None  # a handle, while there is one
        self._killed = False

    def bind(self, sending: zmq.Socket, receiving: zmq.Socket) -> None:
        """Bind the sockets to addresses that the next engine can reach."""
        self._key, secret = zmq.curve_keypair()
        self._addresses = []
        for socket in (sending, receiving):
            socket.curve_server = True
            socket.curve_secretkey = secret
            socket.bind(f"tcp://{ray.util.get_node_ip_address()}:*")
            self._addresses.append(socket.getsockopt_string(zmq.LAST_ENDPOINT))

    async def run(self, config: Config) -> int:
        """Start an engine that connects to them; returns its exit status when it has ended."""
        self._killed = False
        if not await self._free_name():
            self.failure = f"{self._name} of an earlier server does not end: see `ray list actors`"
            return 1
        if self._killed:
            return 1
        actor = self._actor = (
            ray.remote(EngineActor)
            .options(
                name=self._name,
                namespace=self._namespace,
                max_restarts=0,  # the client starts another, when it has told what was lost
                **self._resources,
            )
            .remote()
        )
        try:
            status, self.failure = await actor.run.remote(
                config.model_dump(mode="json"), *self._addresses, self._key
            )
        except RayError as error:  # the actor has died, or what it runs has failed
            if not self._killed:
                log.error("%s: %s", self._name, error)
                self.failure = f"{self._name}: {type(error).__name__}; the log tells more"
            return -signal.SIGKILL if isinstance(error, RayActorError) else 1
        finally:
            self.kill()
            self._actor = None
        return status

    async def _free_name(self) -> bool:
        """Whether no other actor has the name any more."""
        for _ in range(int(_FREED_S / 0.1)):
            try:
                ray.kill(ray.get_actor(self._name, self._namespace))
            except ValueError:  # there is none
                return True
            await asyncio.sleep(0.1)
        return False

    def terminate(self) -> None:
        """End an engine that does not serve yet."""
        self.kill()

    def kill(self) -> None:
        """End the engine at once."""
        self._killed = True
        if self._actor is not None:
            ray.kill(self._actor)
