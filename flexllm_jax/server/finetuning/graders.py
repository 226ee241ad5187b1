"""POST /v1/fine_tuning/alpha/graders/validate and …/run: OpenAI's, to try a grader out.

Graders work in threads and processes of their own. Of several keys, one has as many graders at work
as it leaves to the others.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, get_args

from fastapi import APIRouter, Request
from fastapi.responses import Response

from flexllm_jax.config import Config
from flexllm_jax.config.sections.graders import (
    GraderConfig,
    asked_models,
    nested_deeper,
    read_grader,
)
from flexllm_jax.errors import UserError
from flexllm_jax.graders import Completion, Grade, Grader, Question, Sample, make_grader
from flexllm_jax.graders.grade import ErrorKind
from flexllm_jax.server.engines.registry import ModelRegistry
from flexllm_jax.server.finetuning.schema import RunGrader, ValidateGrader
from flexllm_jax.server.http import sse
from flexllm_jax.server.http.access import Client, Known
from flexllm_jax.server.http.errors import ApiError
from flexllm_jax.server.http.shares import Shares

_AT_ONCE = 16
_MOST_FLOORS = 100
_WITH_DETAILS: dict[ErrorKind, str] = {
    "python_grader_server_error": "python_grader_server_error_type",
    "python_grader_runtime_error": "python_grader_runtime_error_details",
    "model_grader_server_error": "model_grader_server_error_details",
}


class Asker(Protocol):
    """Asks models for a grader, until it is closed."""

    def __call__(self, question: Question) -> Completion:
        """What the model answers."""
        ...

    def close(self) -> None:
        """Ask no more."""


class GraderRuns:
    """Makes and runs the graders of requests.

    Args:
        ask: what asks models in a client's name.
    """

    def __init__(
        self, config: Config, models: ModelRegistry, several: bool, ask: Callable[[Client], Asker]
    ):
        self._settings, self._models, self._ask = config.graders, models, ask
        self._shares = Shares(_AT_ONCE, several)
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="graders")

    async def run(
        self, client: Client, told: dict[str, Any], sample: Sample | None
    ) -> tuple[GraderConfig, Grade | None]:
        """Make a grader, and grade a sample with it. ApiError for what cannot be used."""
        if not self._shares.take(client, 1):
            message = "as many graders as may be are at work for you; wait for one of them"
            raise ApiError(429, message, retry_after_s=5)
        asker = self._ask(client)
        work = self._threads.submit(self._work, client, asker, told, sample)
        work.add_done_callback(lambda _: self._shares.give_back(client, 1))
        try:
            return await asyncio.wrap_future(work)
        except UserError as error:
            raise ApiError(400, str(error), param="grader") from None
        finally:
            asker.close()

    # -- in a thread ------------------------------------------------------------------------------

    def _work(
        self, client: Client, asker: Asker, told: dict[str, Any], sample: Sample | None
    ) -> tuple[GraderConfig, Grade | None]:
        _check_text(told, "grader")
        if sample is not None:
            _check_text([sample.text, sample.item], "model_sample and item")
        config = read_grader(told)
        for field, part in asked_models(config.model_dump()):
            try:
                self._models.resolve(part["model"], client)
            except ApiError as error:
                raise UserError(f"{field}: {error.message}") from None
        grader: Grader = make_grader(config, asker, self._settings)
        return config, None if sample is None else grader.grade([sample])[0]


def _check_text(values: Any, field: str) -> None:
    if nested_deeper(values, _MOST_FLOORS):
        raise UserError(f"{field}: nested deeper than {_MOST_FLOORS}; make it flatter")
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        reason = "there is half a surrogate pair in it, which is no character"
        raise UserError(f"{field}: {reason}; send whole ones") from None


def describe_grade(config: GraderConfig, grade: Grade) -> dict[str, Any]:
    """A grade as OpenAI shows it, where none is 0. `details` is ours: what each error says."""
    errors: dict[str, Any] = {kind: kind in grade.flags for kind in get_args(ErrorKind)}
    errors |= {name: grade.flags.get(kind) for kind, name in _WITH_DETAILS.items()}
    errors["details"] = dict(grade.flags)
    scores = {name: _number(score) for name, score in grade.scores.items()}
    usage = {
        model: {
            "prompt_tokens": used.prompt_tokens,
            "total_tokens": used.prompt_tokens + used.completion_tokens,
            "completion_tokens": used.completion_tokens,
            "cached_tokens": used.cached_tokens,
        }
        for model, used in grade.usage.items()
    }
    metadata = {
        "name": config.name or config.type,
        "type": config.type,
        "errors": errors,
        "execution_time": grade.seconds,
        "scores": scores,
        "token_usage": sum(used["total_tokens"] for used in usage.values()) if usage else None,
        "sampled_model_name": next(iter(usage)) if len(usage) == 1 else None,
    }
    return {
        "reward": _number(grade.reward) or 0.0,
        "metadata": metadata,
        "sub_rewards": scores,
        "model_grader_token_usage_per_model": usage,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no NaN


def routes(runs: GraderRuns) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.post("/v1/fine_tuning/alpha/graders/validate")
    async def validate(request: Request, body: ValidateGrader, client: Known) -> Response:
        async def answer() -> Response:
            await runs.run(client, body.grader, None)
            return sse.json_response({"grader": body.grader})

        return await sse.while_connected(request, answer())

    @router.post("/v1/fine_tuning/alpha/graders/run")
    async def run(request: Request, body: RunGrader, client: Known) -> Response:
        async def answer() -> Response:
            sample = Sample(body.model_sample, body.item or {})
            config, grade = await runs.run(client, body.grader, sample)
            assert grade is not None
            return sse.json_response(describe_grade(config, grade))

        return await sse.while_connected(request, answer())

    return router
