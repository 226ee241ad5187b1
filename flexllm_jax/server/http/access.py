"""Who may use the server, and how much: API keys, limits of each, and limits of all together.

Files, jobs and adapters belong to the key that made them. Where there are several keys, each sees
its own, and what belongs to nobody: preloaded adapters, and what was made without keys.

A limit refuses early (status 429 with Retry-After): what is admitted fits in memory and is served.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import yaml
from fastapi import Depends, Request
from sqlalchemy import ColumnElement, or_, true
from sqlalchemy.orm import InstrumentedAttribute

from flexllm_jax.config import ApiKey, ConfigError, ServerSection, build_config
from flexllm_jax.server.http.errors import ApiError

OWN_CLIENT = "flexllm_jax.client"  # in a scope that the server makes: whose request it is


@dataclass
class Client:
    """The owner of a key, or everybody where there are none.

    Tokens are paid from a bucket of a minute's worth that fills at a constant rate.
    """

    name: str
    max_in_flight: int | None = None
    tokens_per_minute: int | None = None
    storage_bytes: int | None = None
    owner: str | None = None  # what it makes belongs to; None: to nobody
    sees_all: bool = True
    in_flight: int = 0
    tokens: float = field(init=False)
    filled_at: float = field(default_factory=time.monotonic)

    def __post_init__(self):
        self.tokens = float(self.tokens_per_minute or 0)

    def may_see(self, owner: str | None) -> bool:
        """Whether what belongs to `owner` is there for it."""
        return self.sees_all or owner is None or owner == self.owner

    def visible(self, column: InstrumentedAttribute[str | None]) -> ColumnElement[bool]:
        """`may_see` in a query, of a table's owners."""
        return true() if self.sees_all else or_(column.is_(None), column == self.owner)

    def refill(self, now: float) -> None:
        """Add what has come since the last time."""
        limit = self.tokens_per_minute or 0
        self.tokens = min(limit, self.tokens + (now - self.filled_at) * limit / 60)
        self.filled_at = now


class ApiKeys:
    """The keys of a configuration. Comparing takes the same time whichever key is given."""

    def __init__(self, section: ServerSection):
        keys = list(section.api_keys)
        if section.api_keys_file is not None:
            keys += _read_keys(section)
        self._everybody = None if keys else Client("everybody")
        alone = len(keys) == 1
        self._clients = [
            (
                _digest(key.key),
                Client(
                    key.name,
                    key.requests_in_flight,
                    key.tokens_per_minute,
                    key.storage_bytes,
                    owner=key.name,
                    sees_all=alone or key.admin,
                ),
            )
            for key in keys
        ]

    @property
    def needed(self) -> bool:
        """Whether a request needs a key."""
        return self._everybody is None

    @property
    def several(self) -> bool:
        """Whether one key may shut out another."""
        return len(self._clients) > 1

    def client_of(self, headers: Mapping[str, str]) -> Client:
        """The client of a request, which has its key in Authorization, or in X-Api-Key as Anthropic
        has it; ApiError 401."""
        authorization = headers.get("authorization")
        if authorization is None and (key := headers.get("x-api-key")) is not None:
            authorization = f"Bearer {key}"
        return self.client(authorization)

    def client(self, authorization: str | None) -> Client:
        """The client of an Authorization header; ApiError 401."""
        if self._everybody is not None:
            return self._everybody
        scheme, _, key = (authorization or "").partition(" ")
        given, found = _digest(key.strip()), None
        for digest, client in self._clients:
            if hmac.compare_digest(digest, given):
                found = client
        if found is None or scheme.lower() != "bearer":
            message = "no valid API key: send `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key")
        return found

    def of_owner(self, owner: str | None) -> Client:
        """The client whose things are `owner`'s; one without rights to others' if it has no key any
        more."""
        known = (client for _, client in self._clients if client.owner == owner)
        nobody = self._everybody or Client(owner or "nobody", owner=owner, sees_all=False)
        return next(known, nobody)


async def known_client(request: Request) -> Client:
    """The client of a request to an app whose state has `keys`; ApiError 401."""
    keys: ApiKeys = request.app.state.keys
    client = request.scope.get(OWN_CLIENT) or keys.client_of(request.headers)
    request.state.client_name = client.name  # for the log
    return client


Known = Annotated[Client, Depends(known_client)]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read_keys(section: ServerSection) -> list[ApiKey]:
    path = section.api_keys_file
    assert path is not None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"server.api_keys_file: {path} cannot be read: {reason}") from None
    if not isinstance(tree, dict) or set(tree) != {"api_keys"}:
        raise ConfigError(f"server.api_keys_file: {path} must hold a list `api_keys`, only")
    both = [key.model_dump() for key in section.api_keys] + list(tree["api_keys"] or [])
    checked = build_config({"api_keys": both}, str(path), ServerSection).api_keys
    return list(checked[len(section.api_keys) :])


@dataclass
class Admitted:
    """A request that was let in; `started` and `close` give back what it holds."""

    close: Callable[[int], None]
    started: Callable[[int], None]


class Admission:
    """Counts what is in flight: outputs, and prompt tokens that wait for their first token."""

    def __init__(self, section: ServerSection):
        self._section = section
        self.in_flight = 0
        self.waiting_tokens = 0
        self.draining = False
        self._first_tokens: list[float] = []  # when, of the last few

    def admit(self, client: Client, outputs: int, prompt_tokens: int, max_tokens: int) -> Admitted:
        """Let a request in, or raise ApiError 429 or 503.

        Args:
            client: whose it is.
            outputs: sequences to generate.
            prompt_tokens: of all of them, together.
            max_tokens: most tokens to generate, together.

        The result's `started(tokens)` is called when an output of a prompt of so many tokens has
        its first token; `close(tokens)` at the end, with the output tokens there were.
        """
        section, now = self._section, time.monotonic()
        if self.draining:
            raise ApiError(503, "the server is shutting down", retry_after_s=5)
        if outputs > section.max_requests or prompt_tokens > section.max_waiting_tokens:
            raise ApiError(
                400,
                f"{outputs} outputs of {prompt_tokens} prompt tokens are more than this server "
                f"takes at once ({section.max_requests} and {section.max_waiting_tokens}): split "
                f"the request",
            )
        if (
            self.in_flight + outputs > section.max_requests
            or self.waiting_tokens + prompt_tokens > section.max_waiting_tokens
        ):
            raise ApiError(
                429,
                f"the server is busy: {self.in_flight} outputs in flight, {self.waiting_tokens} "
                f"prompt tokens waiting",
                code="server_busy",
                retry_after_s=self._busy_s(now),
            )
        self._charge(client, outputs, prompt_tokens + max_tokens, now)
        client.in_flight += outputs
        self.in_flight += outputs
        self.waiting_tokens += prompt_tokens
        waiting, closed = prompt_tokens, False

        def started(tokens: int) -> None:
            nonlocal waiting
            waiting -= tokens
            self.waiting_tokens -= tokens
            self._first_tokens = [*self._first_tokens[-31:], time.monotonic()]

        def close(output_tokens: int) -> None:
            nonlocal closed
            if not closed:
                closed = True
                client.in_flight -= outputs
                client.tokens += max_tokens - output_tokens  # what it was charged and did not use
                self.in_flight -= outputs
                self.waiting_tokens -= waiting

        return Admitted(close, started)

    def _charge(self, client: Client, outputs: int, tokens: int, now: float) -> None:
        limit = client.max_in_flight
        if limit is not None and client.in_flight + outputs > limit:
            raise ApiError(
                429,
                f"key {client.name!r} has {client.in_flight} outputs in flight and may have "
                f"{limit}",
                code="rate_limit_exceeded",
                retry_after_s=self._busy_s(now),
            )
        if client.tokens_per_minute is None:
            return
        client.refill(now)
        if tokens > client.tokens_per_minute:
            raise ApiError(
                400,
                f"the request may take {tokens} tokens, and key {client.name!r} has "
                f"{client.tokens_per_minute} a minute: lower max_tokens or shorten the prompt",
                param="max_tokens",
            )
        if tokens > client.tokens:
            missing = (tokens - client.tokens) * 60 / client.tokens_per_minute
            raise ApiError(
                429,
                f"key {client.name!r} has used its {client.tokens_per_minute} tokens a minute",
                code="rate_limit_exceeded",
                retry_after_s=max(1, math.ceil(missing)),
            )
        client.tokens -= tokens

    def _busy_s(self, now: float) -> int:
        """Seconds until a place is likely free: as long as the last 32 requests took to start."""
        if len(self._first_tokens) < 2:
            return 1
        return min(60, max(1, math.ceil(now - self._first_tokens[0])))
