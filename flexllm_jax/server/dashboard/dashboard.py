"""The dashboard: one page, and the stream of snapshots that keeps it current.

The page asks nobody but this server. Each snapshot is everything the page shows; of loss curves
only what is new to this viewer is sent.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from importlib.resources import files as package_files
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response
from sqlalchemy import select
from sqlalchemy.orm import Session

from flexllm_jax.config import Config
from flexllm_jax.server.database import Database, EventRow, JobRow
from flexllm_jax.server.engines.client import EngineClient
from flexllm_jax.server.engines.engines import Engines
from flexllm_jax.server.engines.protocol import States, Stats, Step
from flexllm_jax.server.engines.registry import ModelRegistry
from flexllm_jax.server.finetuning.jobs import JobManager
from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Client, Known
from flexllm_jax.server.metrics import ServerMetrics

_PERIOD_S = 1.0
_WINDOW_S = 5.0  # over which tokens per second are counted
_HISTORY = 120  # periods of tokens per second, for a viewer that comes
_SHOWN_JOBS = 30
_SHOWN_ADAPTERS = 100  # those on the device first
_SHOWN_POINTS = 300  # of a loss curve, at first
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_KINDS = {
    "decode": "decode_tokens",
    "prefill": "prefill_tokens",
    "finetune": "forward_tokens",
}


class Dashboard:
    """What the page shows. `tinker`: what a client sees of the Tinker API, where it is on."""

    def __init__(
        self,
        config: Config,
        engines: Engines,
        models: ModelRegistry,
        metrics: ServerMetrics,
        database: Database,
        jobs: JobManager,
        tinker: Callable[[Client], dict[str, Any]] | None = None,
    ):
        self._tinker = tinker
        self._config, self._engines, self._models = config, engines, models
        self._metrics, self._database, self.jobs = metrics, database, jobs
        self._steps: deque[tuple[float, Step]] = deque()
        self._history: deque[dict[str, float]] = deque(maxlen=_HISTORY)
        self._next_sample = 0.0
        engines.on_stats.append(self._take)

    def _take(self, engine: EngineClient, stats: Stats) -> None:
        now = time.monotonic()
        self._steps.extend((now, step) for step in stats.steps)
        while self._steps and self._steps[0][0] < now - _WINDOW_S:
            self._steps.popleft()
        if now >= self._next_sample:
            self._next_sample = now + _PERIOD_S
            self._history.append(self._tokens_per_s())

    def _tokens_per_s(self) -> dict[str, float]:
        since = time.monotonic() - _WINDOW_S
        steps = [step for at, step in self._steps if at >= since]
        return {
            kind: sum(getattr(step, field) for step in steps) / _WINDOW_S
            for kind, field in _KINDS.items()
        }

    def _classes(self) -> list[dict[str, Any]]:
        """Latencies of the last requests by class, ms, beside the objectives."""
        scheduler = self._config.scheduler
        shown = []
        for name, slo in {"standard": scheduler.slo, **scheduler.slo_classes}.items():
            recent = [r for r in self._metrics.recent if r.slo == name]
            shown.append(
                {
                    "name": name,
                    "requests": len(recent),
                    "attainment": sum(r.met for r in recent) / len(recent) if recent else None,
                    "ttft_ms": _percentiles([r.ttft_s for r in recent]),
                    "tpot_ms": _percentiles([r.tpot_s for r in recent if r.tpot_s is not None]),
                    "ttft_limit_ms": slo.ttft_ms,
                    "tpot_limit_ms": slo.tpot_ms,
                }
            )
        return shown

    def snapshot(self, jobs: list[dict[str, Any]], client: Client) -> dict[str, Any]:
        """Everything on the page that a client may see; `jobs` come from the database."""
        stats = [engine.stats for engine in self._engines.members if engine.stats]
        versions: dict[str, int] = {}
        users: dict[str, int] = {}
        for loaded in (adapter for each in stats for adapter in each.adapters):
            versions[loaded.name] = max(versions.get(loaded.name, 0), loaded.version)
            users[loaded.name] = users.get(loaded.name, 0) + loaded.users
        adapters = []
        newest = [a for a in self._models.adapters.values() if client.may_see(a.owner)][::-1]
        newest.sort(key=lambda adapter: adapter.engine_name not in versions)
        for adapter in newest[:_SHOWN_ADAPTERS]:
            adapters.append(
                {
                    "name": adapter.name,
                    "version": versions.get(adapter.engine_name),
                    "users": users.get(adapter.engine_name, 0),
                }
            )
        for job in jobs:
            known = self.jobs.report_of(job["id"])
            job["tokens_per_s"] = known.tokens_per_s if known else None
            job["eta_s"] = known.eta_s if known else None
        return {
            "model": self._models.base,
            "problem": self._engines.problem(),
            "tokens_per_s": self._tokens_per_s(),
            "classes": self._classes(),
            "pages_used": sum(each.pages_used for each in stats),
            "num_pages": sum(each.num_pages for each in stats),
            "states": _sum_states([each.states for each in stats if each.states]),
            "running": sum(each.num_running for each in stats),
            "waiting": sum(each.num_waiting for each in stats),
            "jobs": jobs,
            "adapters": adapters,
            "tinker": None if self._tinker is None else self._tinker(client),
        }

    async def snapshots(self, client: Client) -> AsyncGenerator[bytes]:
        """Snapshots for one viewer, as events, until the server stops."""
        seen, version = 0, -1
        history: list[dict[str, float]] | None = list(self._history)
        jobs: list[dict[str, Any]] = []

        def read(session: Session) -> tuple[list[dict[str, Any]], int]:
            return _read_jobs(session, seen, client)

        while not self.jobs.closing:
            if version != self.jobs.version:
                version = self.jobs.version
                jobs, seen = await self._database.run(read)
            snapshot = self.snapshot(jobs, client)
            if history is not None:
                snapshot["history"], history = history, None
            yield sse.event(snapshot)
            for job in jobs:
                job["points"] = []  # they are told once
            await asyncio.sleep(_PERIOD_S)


def _read_jobs(session: Session, seen: int, client: Client) -> tuple[list[dict[str, Any]], int]:
    """The newest jobs with the points of their loss curves after event `seen`; the last event."""
    newest = select(JobRow).where(client.visible(JobRow.owner)).order_by(JobRow.number.desc())
    rows = list(session.scalars(newest.limit(_SHOWN_JOBS)))
    jobs = {
        row.id: {
            "id": row.id,
            "status": row.status,
            "name": row.fine_tuned_model or row.request.get("suffix") or row.id,
            "step": row.step,
            "total_steps": row.total_steps,
            "error": row.error["message"] if row.error else None,
            "points": [],
            "curve": None,  # what they are of, if new
            "metrics": {},  # the last of each, if new
        }
        for row in rows
    }
    query = select(EventRow.number, EventRow.job_id, EventRow.data)
    query = query.where(EventRow.number > seen, EventRow.type == "metrics")
    for number, job_id, data in session.execute(query.order_by(EventRow.number)):
        seen = max(seen, number)
        if job_id not in jobs or not data:
            continue
        curve = "train_reward" if "train_reward" in data else "train_loss"
        measured = {k: v for k, v in data.items() if k not in ("step", "total_steps", curve)}
        jobs[job_id]["metrics"] |= measured
        if curve in data:
            jobs[job_id]["curve"] = curve
            jobs[job_id]["points"].append([data["step"], data[curve]])
    for job in jobs.values():
        points = job["points"]
        stride = math.ceil(len(points) / _SHOWN_POINTS)
        if stride > 1:
            job["points"] = points[::-stride][::-1]  # the last point is always there
    return list(jobs.values()), seen


def _sum_states(states: list[States]) -> dict[str, int] | None:
    """Slots of recurrent state in use, and all of them; None for a model without."""
    if not states:
        return None
    return {
        "used": sum(each.requests + each.snapshots for each in states),
        "slots": sum(each.request_slots + each.snapshot_slots for each in states),
        "snapshots": sum(each.snapshots for each in states),
    }


def _percentiles(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    p50, p99 = np.percentile(np.array(seconds) * 1e3, [50, 99])
    return {"p50": float(p50), "p99": float(p99)}


def routes(dashboard: Dashboard) -> APIRouter:
    """The page, which anybody may have, and its data, which needs a key where there are keys."""
    router = APIRouter(include_in_schema=False)  # for people
    page = (
        package_files("flexllm_jax.server.dashboard")
        .joinpath("dashboard.html")
        .read_text(encoding="utf-8")
    )
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}

    @router.get("/dashboard")
    async def show() -> Response:
        return HTMLResponse(page, headers=headers)

    @router.get("/dashboard/events")
    async def events(client: Known) -> Response:
        return sse.EventStream(dashboard.snapshots(client))

    return router
