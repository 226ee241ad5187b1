"""Paths of checkpoints: tinker://RUN/KIND/NAME."""

from __future__ import annotations

import re
from typing import NamedTuple

from flexllm_jax.server.tinker.protocol.schema import NAME

STATE, SAMPLER, EXTERNAL = "weights", "sampler_weights", "external_weights"
TYPES = {STATE: "training", SAMPLER: "sampler", EXTERNAL: "external"}
SERVED = "adapters"  # in the place of a run: what the server has under a name of its own
_PREFIX = "tinker://"


class TinkerPath(NamedTuple):
    """The parts of a path."""

    run_id: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{_PREFIX}{self.run_id}/{self.kind}/{self.name}"


def parse(text: str) -> TinkerPath:
    """The parts of a path; ValueError that says what one looks like."""
    parts = text.removeprefix(_PREFIX).split("/")
    if not text.startswith(_PREFIX) or len(parts) != 3 or parts[1] not in TYPES or not all(parts):
        shown = text if len(text) <= 300 else text[:297] + "..."
        raise ValueError(
            f"path: got {shown!r}; must be tinker://RUN/KIND/NAME, with KIND one of "
            f"{', '.join(TYPES)}"
        )
    return TinkerPath(*parts)


def check_name(name: str | None) -> str:
    """The name of a checkpoint to be written; ValueError."""
    if name is None or not re.fullmatch(NAME, name) or name in (".", ".."):
        shown = repr(name) if name is None or len(name) <= 100 else repr(name[:97] + "...")
        raise ValueError(
            f"path: got {shown}; must be a name of 1 to 255 letters, digits, `.`, `_`, `-`"
        )
    return name
