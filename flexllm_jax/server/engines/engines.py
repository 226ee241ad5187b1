"""The engines of a server, one or several, as one: requests and adapters go through here.

A request goes where its adapter's requests go, unless that engine is much busier than the others
(`scheduler.simulation.fleet.AdapterAffinity`, which the simulator measures); one without an adapter
goes to the least loaded. An adapter is a folder that all engines see: an engine loads it when a
request brings its path, so what one has trained all serve. An engine that has ended, or does not
answer, gets nothing new until it is back.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.server.engines.client import EngineClient, EngineUnavailable, Generation
from flexllm_jax.server.engines.protocol import Ready, Stats
from flexllm_jax.server.engines.registry import ServedAdapter
from scheduler.request import Request
from scheduler.simulation.fleet import AdapterAffinity


class Engines:
    """Engines that serve the same model; their callbacks are those of all of them."""

    def __init__(self, members: Sequence[EngineClient]):
        self.members = tuple(members)
        self.on_ready: list[Callable[[EngineClient], None]] = []
        self.on_stats: list[Callable[[EngineClient, Stats], None]] = []
        self.on_lost: list[Callable[[EngineClient], None]] = []
        self._router = AdapterAffinity()
        for member in self.members:
            member.on_ready, member.on_stats = self.on_ready, self.on_stats
            member.on_lost = self.on_lost

    # -- all of them ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep all engines running until `stop`, or until it turns out that one cannot start."""
        tasks = [asyncio.create_task(member.run()) for member in self.members]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if self.exit_status is not None:
            await self.stop(timeout_s=1.0)
        await asyncio.gather(*tasks)

    async def stop(self, timeout_s: float) -> bool:
        """End all engines; whether all ended by themselves within `timeout_s`."""
        return all(await asyncio.gather(*(member.stop(timeout_s) for member in self.members)))

    @property
    def exit_status(self) -> int | None:
        """Of an engine that could not start at all."""
        statuses = [member.exit_status for member in self.members]
        return next((status for status in statuses if status is not None), None)

    @property
    def failure(self) -> str | None:
        """Why one could not start, if it did not say so on stderr."""
        return next((member.failure for member in self.members if member.failure), None)

    @property
    def state(self) -> Literal["starting", "ready", "stopped"]:
        """Ready when one is."""
        states = {member.state for member in self.members}
        return next(s for s in ("ready", "starting", "stopped") if s in states)

    @property
    def info(self) -> Ready | None:
        """What a request must fit: that of the engine with the fewest KV pages."""
        known = [member.info for member in self.members if member.info is not None]
        return min(known, key=lambda info: info.num_pages, default=None)

    def problem(self) -> str | None:
        """Why the server is not healthy: no engine serves, or one is stuck. One that is started
        again is none of it while another serves."""
        if self.state != "ready":
            return f"the engine is {self.state}"
        for member in self.members:
            if member.state == "ready" and (problem := member.problem()):
                return problem if len(self.members) == 1 else f"engine {member.name}: {problem}"
        return None

    # -- one of them ------------------------------------------------------------------------------

    def usable(self) -> list[EngineClient]:
        """Those that serve and answer; if none does, those that serve."""
        ready = [member for member in self.members if member.state == "ready"]
        return [member for member in ready if member.problem() is None] or ready

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        n: int,
        adapter: ServedAdapter | None,
        slo_class: str,
        arrival: float,
    ) -> Generation:
        """`EngineClient.generate` of the engine whose model the adapter was saved from, or else of
        one that the router chooses."""
        usable = self.usable()
        if not usable:
            raise EngineUnavailable(f"the engine is {self.state}")
        load = [member.in_flight if member in usable else math.inf for member in self.members]
        name = adapter.engine_name if adapter else None
        member = next((m for m in usable if name in m.training.samplers), None)
        if member is None:
            request = Request("", (), params.max_tokens, arrival, cache_salt=name)
            member = self.members[self._router.choose(request, np.array(load, float))]
        return member.generate(prompts, params, n, adapter, slo_class, arrival)

    def least_trained(self) -> EngineClient:
        """The engine for a new model that is trained by calls: the one with the fewest, of these
        the one with the fewest requests. EngineUnavailable when none serves."""
        usable = self.usable()
        if not usable:
            raise EngineUnavailable(f"the engine is {self.state}")
        return min(usable, key=lambda m: (len(m.training.models), m.in_flight))

    async def load_adapter(self, name: str, path: str) -> None:
        """Load a folder in every engine, so that none serves an older version of the name.

        EngineRefused: one cannot, and then none keeps it; EngineUnavailable: there is none. An
        engine that starts later loads it when it is asked for.
        """
        answers = await self._call_all("load_adapter", name=name, path=path)
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        if errors:
            await self._call_all("unload_adapter", name=name)
            raise errors[0]

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter in every engine that serves."""
        answers = await self._call_all("unload_adapter", name=name)
        for error in answers:
            if isinstance(error, Exception):
                raise error

    async def _call_all(self, method: str, **arguments: Any) -> list[Any]:
        """Results and errors of those that serve, and go on doing so; EngineUnavailable: none."""
        ready = [member for member in self.members if member.state == "ready"]
        calls = [member.call(method, member.patience_s, **arguments) for member in ready]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        missing = [answer for answer in answers if isinstance(answer, EngineUnavailable)]
        answers = [answer for answer in answers if not isinstance(answer, EngineUnavailable)]
        if not answers:
            raise missing[0] if missing else EngineUnavailable(f"the engine is {self.state}")
        return answers
