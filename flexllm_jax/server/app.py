"""The HTTP application: its parts, and which path leads where."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flexllm_jax.config import Config
from flexllm_jax.models.tokenizer import load_tokenizer
from flexllm_jax.server import (
    adapters_routes,
    dashboard,
    errors,
    files,
    jobs_routes,
    openapi,
    sse,
)
from flexllm_jax.server.access import Admission, ApiKeys, Known
from flexllm_jax.server.chat import chat
from flexllm_jax.server.completions import complete
from flexllm_jax.server.dashboard import Dashboard
from flexllm_jax.server.database import Database
from flexllm_jax.server.engine_client import EngineClient
from flexllm_jax.server.engines import Engines
from flexllm_jax.server.errors import ApiError
from flexllm_jax.server.files import FileStore
from flexllm_jax.server.inference import Inference
from flexllm_jax.server.inference_schema import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    dump_tools,
)
from flexllm_jax.server.jobs import JobManager
from flexllm_jax.server.logs import AccessLog
from flexllm_jax.server.metrics import ServerMetrics
from flexllm_jax.server.models import ModelRegistry
from flexllm_jax.server.text import TextCodec

_DISCARDED_BYTES = 64 * 2**20  # of a body that is too large, so that its sender reads the answer


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
        self.engines.on_lost.append(self.metrics.engine_lost)
        folder = config.output_dir.absolute() / "server"
        folder.mkdir(parents=True, exist_ok=True)
        url = config.server.database or f"sqlite:///{folder / 'server.sqlite'}"
        self.database = Database(url)
        self.files = FileStore(folder / "files", self.database, config.server)
        self.jobs = JobManager(
            config,
            self.database,
            self.files,
            self.engines,
            self.models,
            self.metrics,
            load_tokenizer(config.model.path),  # one of its own, for the thread that validates
        )
        self.dashboard = Dashboard(
            config, self.engines, self.models, self.metrics, self.database, self.jobs
        )
        self.app = _make_app(self)

    def begin_drain(self) -> None:
        """Admit nothing more."""
        self.admission.draining = self.jobs.closing = True

    def _engine_started(self, engine: EngineClient) -> None:
        assert engine.info is not None
        self.models.max_model_len = engine.info.max_model_len
        self.metrics.engine_started(engine)


def _make_app(server: Server) -> FastAPI:
    app = FastAPI(
        title="flexllm_jax", version=version("flexllm_jax"), docs_url=None, redoc_url=None
    )
    errors.install(app)
    app.add_middleware(BodyLimit, limit_of=server_limits(server.config))
    app.add_middleware(AccessLog)

    app.state.keys = server.keys
    _add_inference(app, server)
    _add_status(app, server)
    app.include_router(files.routes(server.files))
    allowed = server.config.server.adapter_dirs
    app.include_router(adapters_routes.routes(allowed, server.engines, server.models))
    app.include_router(dashboard.routes(server.dashboard))
    app.include_router(jobs_routes.routes(server.config, server.database, server.jobs))
    openapi.describe(app, with_keys=server.keys.needed)
    return app


def _add_inference(app: FastAPI, server: Server) -> None:
    inference, codec = server.inference, server.codec

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest, client: Known) -> Response:
        return await complete(request, body, client, inference)

    @app.post("/v1/chat/completions")
    async def chat_completions(
        request: Request, body: ChatCompletionRequest, client: Known
    ) -> Response:
        return await chat(request, body, client, inference)

    @app.get("/v1/models")
    async def models(client: Known) -> Response:
        return sse.json_response({"object": "list", "data": server.models.describe_all(client)})

    @app.get("/v1/models/{name:path}")
    async def model(name: str, client: Known) -> Response:
        return sse.json_response(server.models.describe(name, client))

    @app.delete("/v1/models/{name:path}")
    async def delete_model(name: str, client: Known) -> Response:
        server.models.describe(name, client)  # 404 for one that there is not
        raise ApiError(400, "models cannot be deleted here", param="model")

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest, client: Known) -> Response:
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give exactly one of prompt and messages", param="prompt")
        limit = server.config.server.max_body_bytes  # tokens; what the body allows
        if body.messages is not None:
            generation = body.add_generation_prompt
            text = await codec.render(
                body.messages, dump_tools(body.tools), add_generation_prompt=generation
            )
        else:
            text = body.prompt or ""
        special = body.add_special_tokens
        special = body.messages is None if special is None else special
        tokens = await codec.encode(text, limit, add_special_tokens=special)
        names = codec.backend.id_to_token
        return sse.json_response(
            {
                "count": len(tokens),
                "max_model_len": server.models.max_model_len,
                "tokens": tokens,
                "token_strs": [names(t) for t in tokens] if body.return_token_strs else None,
            }
        )

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest, client: Known) -> Response:
        known = server.engines.info.vocab_size if server.engines.info else len(codec.tokenizer)
        if outside := [token for token in body.tokens if token >= known]:
            message = f"tokens: got {outside[0]}; the vocabulary has ids 0 to {known - 1}"
            raise ApiError(400, message, param="tokens")
        return sse.json_response({"prompt": codec.decode(body.tokens)})

    @app.get("/tokenizer_info")
    async def tokenizer_info(client: Known) -> Response:
        tokenizer = codec.tokenizer
        return sse.json_response(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": len(tokenizer),
                "bos_token": tokenizer.bos_token,
                "eos_token": tokenizer.eos_token,
                "pad_token": tokenizer.pad_token,
                "unk_token": tokenizer.unk_token,
                "chat_template": tokenizer.chat_template,
            }
        )


def _add_status(app: FastAPI, server: Server) -> None:
    @app.get("/health")
    async def health() -> Response:
        problem = "the server is shutting down" if server.admission.draining else None
        problem = problem or server.engines.problem()
        if problem:
            raise ApiError(503, problem, retry_after_s=5)
        return sse.json_response({"status": "ok"})

    @app.get("/version")
    async def show_version() -> Response:
        return sse.json_response({"version": version("flexllm_jax")})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.render(), media_type="text/plain; version=0.0.4")


def server_limits(config: Config) -> Callable[[Scope], int]:
    """Largest body of a request, bytes."""
    section = config.server

    def limit_of(scope: Scope) -> int:
        is_upload = scope["path"] == "/v1/files"
        # A form is a little larger than the file in it.
        return section.max_upload_bytes + 65536 if is_upload else section.max_body_bytes

    return limit_of


class BodyLimit:
    """Refuses bodies beyond a limit, whether they say their length or not."""

    def __init__(self, app: ASGIApp, limit_of: Callable[[Scope], int]):
        self.app, self.limit_of = app, limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request (ASGI)."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit, seen = self.limit_of(scope), 0
        message = f"the body is larger than {limit} bytes: send less at once"
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > limit:
            await _discard(receive)
            await ApiError(413, message).response()(scope, receive, send)
            return

        async def counted() -> Message:
            nonlocal seen
            part = await receive()
            seen += len(part.get("body", b""))
            if seen > limit:
                await _discard(receive)
                raise HTTPException(413, message)
            return part

        await self.app(scope, counted, send)


async def _discard(receive: Callable[[], Awaitable[Any]]) -> None:
    discarded = 0
    while discarded < _DISCARDED_BYTES:
        part = await receive()
        discarded += len(part.get("body", b""))
        if not part.get("more_body"):
            return
