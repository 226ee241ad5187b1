"""The HTTP application: its parts put together, and what the server says of itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Literal

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from pydantic import BaseModel
from sqlalchemy import select

from flexllm_jax.config import Config, ConfigError
from flexllm_jax.models.text.tokenizer import load_tokenizer
from flexllm_jax.server.batches import answers as batches_answers
from flexllm_jax.server.batches import routes as batches_routes
from flexllm_jax.server.batches.runner import BatchRunner
from flexllm_jax.server.dashboard import dashboard
from flexllm_jax.server.dashboard.dashboard import Dashboard
from flexllm_jax.server.database import Database, JobRow
from flexllm_jax.server.engines.client import EngineClient
from flexllm_jax.server.engines.engines import Engines
from flexllm_jax.server.engines.registry import ModelRegistry
from flexllm_jax.server.finetuning import answers as finetuning_answers
from flexllm_jax.server.finetuning import files, graders
from flexllm_jax.server.finetuning import routes as jobs_routes
from flexllm_jax.server.finetuning.files import FileStore
from flexllm_jax.server.finetuning.graders import GraderRuns
from flexllm_jax.server.finetuning.jobs import JobManager
from flexllm_jax.server.finetuning.loaded_adapters import LoadedAdapters
from flexllm_jax.server.finetuning.models import FinetunedModels
from flexllm_jax.server.http import errors, openapi, sse
from flexllm_jax.server.http.access import Admission, ApiKeys
from flexllm_jax.server.http.body_limit import BodyLimit, body_limits
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.logs import AccessLog
from flexllm_jax.server.inference import adapters_routes
from flexllm_jax.server.inference import answers as inference_answers
from flexllm_jax.server.inference import routes as inference_routes
from flexllm_jax.server.inference.asking import Asking
from flexllm_jax.server.inference.messages import answer as messages_answer
from flexllm_jax.server.inference.messages import routes as messages_routes
from flexllm_jax.server.inference.requests import Inference
from flexllm_jax.server.inference.responses import routes as responses_routes
from flexllm_jax.server.inference.responses.running import Responses
from flexllm_jax.server.inference.responses.store import ResponseStore
from flexllm_jax.server.inference.text import TextCodec
from flexllm_jax.server.metrics import ServerMetrics
from flexllm_jax.server.uploads import routes as uploads_routes
from flexllm_jax.server.uploads.store import UploadStore
from flexllm_jax.version import __version__


class Server:
    """What the routes share. Raises ConfigError for what cannot be used."""

    def __init__(self, config: Config, engines: Engines | None = None):
        self.config = config
        self.keys = ApiKeys(config.server)
        self.codec = TextCodec(load_tokenizer(config.model.path))
        self.models = ModelRegistry(config)
        self.metrics = ServerMetrics(config, self.models.base)
        self.admission = Admission(config.server)
        self.engines = engines or Engines([EngineClient(config)])
        self.inference = Inference(
            config, self.engines, self.codec, self.models, self.admission, self.metrics
        )
        self.engines.on_ready.append(self._engine_started)
        self.engines.on_stats.append(self.metrics.take)
        if self.metrics.traces is not None:
            self.engines.on_stats.append(self.metrics.traces.take)
        self.engines.on_lost.append(self.metrics.engine_lost)
        folder = config.output_dir.absolute() / "server"
        folder.mkdir(parents=True, exist_ok=True)
        url = config.server.database or f"sqlite:///{folder / 'server.sqlite'}"
        tinker = _tinker_parts() if config.server.tinker.enabled else None  # its tables, too
        self.database = Database(url)
        store = ResponseStore(self.database, config.server.response_ttl_s)
        self.responses = Responses(self.inference, store)
        self.files = FileStore(folder / "files", self.database, config.server, self.keys.several)
        self.uploads = UploadStore(folder / "uploads", self.files, several=self.keys.several)
        self.jobs = JobManager(
            config,
            self.database,
            self.files,
            self.engines,
            self.models,
            self.metrics,
            load_tokenizer(config.model.path),  # one of its own, for the thread that validates
        )
        self.graders = GraderRuns(
            config, self.models, self.keys.several, lambda client: Asking(self.inference, client)
        )
        self.tinker = tinker and tinker.TinkerService(
            config,
            self.database,
            self.engines,
            self.models,
            self.keys,
            self.admission,
            self.inference,
        )
        if tinker is not None:
            self.metrics.registry.register(tinker.TinkerMetrics(self.tinker))
        self.dashboard = Dashboard(
            config,
            self.engines,
            self.models,
            self.metrics,
            self.database,
            self.jobs,
            tinker and partial(tinker.shown, self.tinker),
        )
        self.batches = BatchRunner(config, self.database, self.files, self.keys)
        self._owners: dict[str, str | None] = {}  # of jobs that are in the metrics
        self.app = _make_app(self)

    async def metrics_seen(self, authorization: str | None) -> Callable[[str], bool] | None:
        """Which jobs and adapters are in the metrics that somebody reads: those of its key; without
        one, where keys are needed, adapters of the configuration. None: all. ApiError 401."""
        if authorization is None and self.keys.needed:
            return {adapter.name for adapter in self.config.adapters.preload}.__contains__
        client = self.keys.client(authorization)
        if client.sees_all:
            return None
        if new := self.metrics.jobs - self._owners.keys():
            query = select(JobRow.id, JobRow.owner).where(JobRow.id.in_(new))
            rows = await self.database.run(lambda s: [(r[0], r[1]) for r in s.execute(query)])
            known = self._owners | dict(rows)
            self._owners = {job: known[job] for job in self.metrics.jobs if job in known}
        owners = dict(self._owners)
        for adapter in self.models.adapters.values():
            owners[adapter.name] = owners[adapter.engine_name] = adapter.owner
        return lambda name: name in owners and client.may_see(owners[name])

    async def start(self) -> None:
        """Go on with what an earlier process left."""
        await self.jobs.start()
        if self.tinker is not None:
            await self.tinker.start()
        await self.batches.start(self.app)
        self.inference.structures.start()
        await self.responses.store.begin()

    def begin_drain(self) -> None:
        """Admit nothing more."""
        self.admission.draining = self.jobs.closing = True
        self.batches.stop()

    def _engine_started(self, engine: EngineClient) -> None:
        assert engine.info is not None
        self.models.max_model_len = engine.info.max_model_len
        self.metrics.engine_started(engine)


def _tinker_parts() -> ModuleType:
    """The Tinker API, whose libraries are an extra's; ConfigError without them."""
    try:
        return import_module("flexllm_jax.server.tinker.parts")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"server.tinker.enabled: {error.name} is not installed: "
            f"pip install 'flexllm_jax[tinker]', or set it to false"
        ) from None


def _make_app(server: Server) -> FastAPI:
    app = FastAPI(title="flexllm_jax", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_middleware(
        BodyLimit,
        keys=server.keys,
        section=server.config.server,
        limit_of=body_limits(server.config),
    )
    if origins := server.config.server.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(AccessLog)

    app.state.keys = server.keys
    finetuned = FinetunedModels(server.database, server.models, server.engines)
    app.include_router(inference_routes.routes(server.inference, finetuned.delete))
    app.include_router(messages_routes.routes(server.inference))
    app.include_router(responses_routes.routes(server.inference, server.responses))
    _add_status(app, server)
    app.include_router(files.routes(server.files))
    app.include_router(uploads_routes.routes(server.uploads))
    allowed = server.config.server.adapter_dirs
    loaded = LoadedAdapters(server.database, server.models, allowed)
    loaded.restore()
    app.include_router(adapters_routes.routes(allowed, server.engines, server.models, loaded.keep))
    app.include_router(dashboard.routes(server.dashboard))
    app.include_router(jobs_routes.routes(server.config, server.database, server.jobs))
    app.include_router(graders.routes(server.graders))
    app.include_router(batches_routes.routes(server.database, server.files, server.batches))
    if server.tinker is not None:
        for router in _tinker_parts().routers(server.tinker):
            app.include_router(router)
    floors = inference_answers, messages_answer, responses_routes, finetuning_answers
    floors += batches_answers, uploads_routes
    answers = {key: value for floor in floors for key, value in floor.ANSWERS.items()} | _ANSWERS
    openapi.describe(app, answers, with_keys=server.keys.needed)
    return app


def _add_status(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Response:
        problem = "the server is shutting down" if server.admission.draining else None
        problem = problem or server.engines.problem() or server.database.problem()
        if problem:
            raise ApiError(503, problem, retry_after_s=5)
        return sse.json_response({"status": "ok"})

    @app.get("/ping")
    @app.post("/ping")
    async def ping() -> Response:
        return await health()

    @app.get("/load")
    async def load() -> Response:
        return sse.json_response({"server_load": server.admission.in_flight})

    @app.get("/version")
    async def show_version() -> Response:
        return sse.json_response({"version": __version__})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        sees = await server.metrics_seen(request.headers.get("authorization"))
        return Response(server.metrics.render(sees), media_type="text/plain; version=0.0.4")


class Health(BaseModel):
    """GET /health."""

    status: Literal["ok"]


class Load(BaseModel):
    """GET /load: outputs that are being generated, or wait."""

    server_load: int


class Version(BaseModel):
    """GET /version."""

    version: str


_ANSWERS: openapi.Answers = {
    ("get", "/health"): ([Health], (503,)),
    ("get", "/ping"): ([Health], (503,)),
    ("post", "/ping"): ([Health], (503,)),
    ("get", "/load"): ([Load], ()),
    ("get", "/version"): ([Version], ()),
    ("get", "/metrics"): ([openapi.TEXT], (401,)),
}
