"""Fields of `server.tinker`: the Tinker API, with which clients train models call by call."""

from __future__ import annotations

from pydantic import Field, field_validator

from flexllm_jax.config.fields import Bool, Float, Int, Section, distinct


class TinkerSection(Section):
    """The Tinker API, beside OpenAI's on the same port."""

    enabled: Bool = Field(default=False, description="Whether /api/v1 is there.")
    model_names: tuple[str, ...] = Field(
        default=(),
        description="Names under which clients know the base model, such as Qwen/Qwen3-8B: by "
        "them recipes choose how to write messages. None: server.model_name alone.",
    )
    tokenizer_id: str | None = Field(
        default=None,
        min_length=1,
        description="Tokenizer that clients of models are told to load: a name in their hub, or a "
        "folder of theirs. null: the model's name.",
    )
    session_timeout_s: Float = Field(
        default=300.0,
        gt=0,
        description="Seconds without a sign of a client until its models leave the device. They "
        "come back when it does.",
    )
    snapshot_every: Int = Field(
        default=20,
        ge=1,
        description="Optimizer steps between the snapshots of a model, from which it goes on when "
        "a process was killed; what came after is computed again.",
    )
    sampler_idle_s: Float = Field(
        default=3600.0,
        gt=0,
        description="Seconds that a sampler without a name is kept after its last use.",
    )
    result_s: Float = Field(
        default=600.0,
        gt=0,
        description="Seconds that a result is kept after it was fetched. Results nobody fetches "
        "are kept for a day.",
    )
    max_sessions: Int = Field(default=1000, ge=1, description="Sessions that have not ended.")
    max_models: Int = Field(
        default=100,
        ge=1,
        description="Models of these sessions. One of several keys has as many as it leaves to "
        "the others; the same of samplers and bytes.",
    )
    models_at_once: Int = Field(
        default=4,
        ge=1,
        description="Models whose state is on the device at once; others wait in the host's "
        "memory and take turns.",
    )
    max_samplers: Int = Field(default=10_000, ge=1, description="Samplers of these sessions.")
    max_waiting_bytes: Int = Field(
        default=2**30,
        ge=2**20,
        description="Bytes of training requests that wait for their turn, and of results of "
        "samples that were not fetched; beyond it, 429.",
    )
    max_checkpoint_bytes: Int = Field(
        default=64 * 2**30, ge=2**20, description="Bytes of checkpoints and samplers on disk."
    )

    @field_validator("model_names")
    @classmethod
    def _distinct_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not all(names):
            raise ValueError("a name is empty; remove it")
        return distinct(names)
