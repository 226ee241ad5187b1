"""What the application takes of the Tinker API. Importing it needs the libraries of the extra."""

from __future__ import annotations

from fastapi import APIRouter

from flexllm_jax.server.tinker.metrics import TinkerMetrics, shown
from flexllm_jax.server.tinker.rest_routes import rest_routes
from flexllm_jax.server.tinker.routes import routes
from flexllm_jax.server.tinker.service import TinkerService

__all__ = ["TinkerMetrics", "TinkerService", "routers", "shown"]


def routers(tinker: TinkerService) -> list[APIRouter]:
    """All routes under /api/v1."""
    return [routes(tinker), rest_routes(tinker)]
