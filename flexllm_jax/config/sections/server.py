"""Fields of `server`, `ray` and `log`: the HTTP API, its replicas, and what it logs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from flexllm_jax.config.fields import Bool, Float, Int, Name, Section, distinct
from flexllm_jax.config.sections.tinker import TinkerSection


class ApiKey(Section):
    """A key that clients send as `Authorization: Bearer` or `X-API-Key`, and what its owner may
    use."""

    name: Name = Field(description="Whose key it is, as logs and limits call it.")
    key: str = Field(min_length=8, description="The key itself.")
    requests_in_flight: Int | None = Field(
        default=None, ge=1, description="Outputs being generated at once. null: no limit."
    )
    tokens_per_minute: Int | None = Field(
        default=None, ge=1, description="Prompt and output tokens per minute. null: no limit."
    )
    storage_bytes: Int | None = Field(
        default=None,
        ge=1024,
        description="Its uploaded files together, bytes. null: as much as it leaves to others.",
    )
    admin: bool = Field(
        default=False, description="Whether it sees the files, jobs and adapters of every key."
    )


class ServerSection(Section):
    """The HTTP server of scripts/serve.py."""

    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 is all.")
    port: Int = Field(default=8000, ge=0, le=65535, description="Port; 0 takes a free one.")
    model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name of the base model in requests. null: name of the folder model.path.",
    )
    organization: Name = Field(
        default="org", description="Organization in the names of finetuned models."
    )
    api_keys: tuple[ApiKey, ...] = Field(
        default=(), description="Keys that may use the server. None, and no file: everybody may."
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="YAML file with a list `api_keys` in the same form, outside of this file.",
    )
    max_requests: Int = Field(
        default=1024,
        ge=1,
        description="Outputs generated or waiting at once; beyond it requests get status 429.",
    )
    max_waiting_tokens: Int = Field(
        default=262_144,
        ge=1,
        description="Prompt tokens of requests without their first token; beyond it, 429.",
    )
    max_body_bytes: Int = Field(
        default=8 * 2**20, ge=1024, description="Largest request, bytes, other than uploads."
    )
    max_bodies_bytes: Int = Field(
        default=2**30,
        ge=1024,
        description="Bytes of all requests, other than uploads, that are held at once; beyond it, "
        "429. One of several keys holds as much as it leaves to the others.",
    )
    max_upload_bytes: Int = Field(
        default=512 * 2**20, ge=1024, description="Largest uploaded file, bytes."
    )
    max_storage_bytes: Int = Field(
        default=16 * 2**30,
        ge=1024,
        description="All files together, bytes, those being uploaded included.",
    )
    max_connections: Int = Field(
        default=2048,
        ge=1,
        description="Connections; beyond it the one that has waited longest without a request is "
        "closed, or else the new one gets 503.",
    )
    head_timeout_s: Float = Field(
        default=20.0, gt=0, description="Seconds in which a request's head must come."
    )
    keep_alive_s: Float = Field(
        default=75.0, gt=0, description="Seconds that a connection is kept after an answer."
    )
    stalled_after_s: Float = Field(
        default=30.0,
        gt=0,
        description="Seconds that a client may be behind `least_bytes_per_s` with a body, which "
        "gets 408, or in reading an answer, whose connection is closed.",
    )
    least_bytes_per_s: Int = Field(
        default=500, ge=1, description="Rate at which bodies come and answers are read, at least."
    )
    adapter_wait_s: Float = Field(
        default=60.0,
        gt=0,
        description="Seconds that requests wait for a slot of adapters.slots; beyond it, 429.",
    )
    max_running_jobs: Int = Field(
        default=2, ge=1, description="Jobs that an engine trains side by side; others are queued."
    )
    max_queued_jobs: Int = Field(
        default=100, ge=1, description="Jobs that are not done; beyond it, status 429."
    )
    batch_requests: Int | None = Field(
        default=None,
        ge=1,
        description="Requests of batches that are asked at once. null: half as many as "
        "scheduler.max_sequences.",
    )
    database: str | None = Field(
        default=None,
        description="SQLAlchemy URL of files, jobs, responses. null: SQLite in output_dir/server.",
    )
    response_ttl_s: Float = Field(
        default=30 * 86_400.0,
        gt=0,
        description="Seconds that responses of /v1/responses are kept in the database.",
    )
    adapter_dirs: tuple[Path, ...] = Field(
        default=(),
        description="Folders whose adapters /v1/load_lora_adapter may load. None: it is off.",
    )
    allowed_origins: tuple[str, ...] = Field(
        default=(),
        description="Origins whose pages may call the server from a browser (CORS): "
        "https://example.org, or * for all. None: it is off.",
    )
    otlp_traces_endpoint: str | None = Field(
        default=None,
        min_length=1,
        description="Where OpenTelemetry's traces are sent: http://localhost:4318/v1/traces, OTLP "
        "over HTTP. null: there are none.",
    )
    trust_request_chat_template: Bool = Field(
        default=False,
        description="Whether requests may bring a `chat_template`: a program, run without limits "
        "of time and memory.",
    )
    stuck_after_s: Float = Field(
        default=60.0,
        gt=0,
        description="Seconds in which an engine says nothing, or has work and does no step, until "
        "it is killed and started again; /health fails before.",
    )
    log_format: Literal["json", "text"] = Field(
        default="json", description="What a line of the log looks like, on stderr."
    )
    grace_s: Float = Field(
        default=25.0,
        gt=0,
        description="Seconds after SIGTERM in which requests finish and jobs write checkpoints; "
        "what hangs then is ended.",
    )

    tinker: TinkerSection = Field(default_factory=TinkerSection, description="The Tinker API.")

    @field_validator("api_keys")
    @classmethod
    def _distinct_keys(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        distinct(tuple(key.name for key in keys), "name: ")
        for index, key in enumerate(keys):
            if key.key in [other.key for other in keys[:index]]:
                raise ValueError(f"the key of {key.name!r} is given twice; change one")
        return keys


class RaySection(Section):
    """Engines behind one endpoint, on Ray: scripts/serve_ray.py."""

    replicas: Int = Field(default=1, ge=1, description="Engines, each with devices of its own.")
    address: str | None = Field(
        default=None,
        min_length=1,
        description="Ray cluster to join: `auto`, or host:port of its head. Its machines share "
        "model.path and output_dir. null: starts a cluster on this machine.",
    )
    cpus_per_replica: Float = Field(
        default=1.0, ge=0, description="CPU cores that Ray reserves for an engine."
    )
    gpus_per_replica: Float | None = Field(
        default=None,
        ge=0,
        description="GPUs that Ray gives an engine. null: parallel.tp where the cluster has GPUs.",
    )
    object_store_bytes: Int = Field(
        default=128 * 2**20,
        ge=80 * 2**20,
        description="Shared memory of a cluster that is started here.",
    )


class LogSection(Section):
    """What is written down besides the report."""

    plans: Bool = Field(
        default=False,
        description="Write every step's plan, and what it was made from, as a line of "
        "plans.jsonl in output_dir; scripts/replay_plans.py plans them again.",
    )
