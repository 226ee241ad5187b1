"""JSON bodies of the Tinker API's requests. Fields that are not known are ignored: newer SDKs send
more of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from flexllm_jax.server.http.body import Body

Seq = Annotated[int, Field(ge=0, lt=2**62)]
Identifier = Annotated[str, Field(min_length=1, max_length=100)]
SECONDS_LEAST, SECONDS_MOST = 3600, 10 * 366 * 86_400
NAME = r"^[A-Za-z0-9._-]{1,255}$"


class CreateSession(Body):
    """POST create_session."""

    user_metadata: dict[str, Any] | None = None
    display_name: Annotated[str, StringConstraints(max_length=1000)] | None = None


class OfSession(Body):
    """What names a session."""

    session_id: Identifier


class Finish(Body):
    """POST sessions/{id}/finish."""

    reason: dict[str, Any] | str | None = None


class LoraConfig(Body):
    """The adapter of a model."""

    rank: Annotated[int, Field(ge=1)] = 32
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModel(OfSession):
    """POST create_model."""

    model_seq_id: Seq
    base_model: str
    lora_config: LoraConfig = Field(default_factory=LoraConfig)
    user_metadata: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] | None = None


class OfModel(Body):
    """What names a model."""

    model_id: Identifier


class Ordered(OfModel):
    """A request that has its turn."""

    seq_id: Annotated[int, Field(ge=1, lt=2**62)]


class Adam(Body):
    """Parameters of a step of AdamW."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStep(Ordered):
    """POST optim_step."""

    adam_params: Adam = Field(default_factory=Adam)
    optimizer_params: dict[str, Any] | None = None


class SaveWeights(Ordered):
    """POST save_weights and save_weights_external."""

    path: str | None = None
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] | None = None
    age_encryption_recipients: list[str] | None = None


class SaveForSampler(SaveWeights):
    """POST save_weights_for_sampler: with a name, or as a sampler of the session."""

    sampling_session_seq_id: Seq | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"


class LoadWeights(Body):
    """POST load_weights: into a model, or a new one."""

    model_id: Identifier | None = None
    seq_id: Annotated[int, Field(ge=1, lt=2**62)] | None = None
    session_id: Identifier | None = None
    model_seq_id: Seq | None = None
    base_model: str | None = None
    path: str
    optimizer: bool = False
    user_metadata: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] | None = None


class CreateSampler(OfSession):
    """POST create_sampling_session."""

    sampling_session_seq_id: Seq
    base_model: str | None = None
    model_path: str | None = None


class OfSampler(Body):
    """What names a sampler."""

    sampling_session_id: Identifier


class Chunk(Body):
    """A part of a prompt."""

    type: str = "encoded_text"
    tokens: list[int] | None = None


class Prompt(Body):
    """Chunks, one after the other."""

    chunks: list[Chunk]


class Sampling(Body):
    """How to sample."""

    max_tokens: int | None = None
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


class Tensor(Body):
    """An array as JSON."""

    data: list[int] | list[float]
    dtype: str = "int64"
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class Sample(Body):
    """POST asample."""

    sampling_session_id: Identifier | None = None
    seq_id: Seq | None = None
    base_model: str | None = None
    model_path: str | None = None
    num_samples: int = 1
    prompt: Prompt
    sampling_params: Sampling = Field(default_factory=Sampling)
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_logprobs: Tensor | None = None
    prompt_alt_tokens_k: int = 0


class Retrieve(Body):
    """POST retrieve_future and cancel_future."""

    request_id: Annotated[str, Field(min_length=1, max_length=200)]
    allow_metadata_only: bool = False


class FuturesTarget(OfSampler):
    """Whose futures."""

    cloned_sampler_id: int = 0


class RetrieveMany(Body):
    """POST retrieve_futures."""

    target: FuturesTarget
    prev_cursor: int = 0
    timeout: float | None = None
    retrieved_request_ids: list[str] = Field(default_factory=list)


class Ttl(Body):
    """PUT .../ttl."""

    ttl_seconds: int | None


class WeightsInfo(Body):
    """POST weights_info."""

    tinker_path: str
