"""The fields of the configuration tree: their types, ranges, defaults and descriptions.

Every field is described here and nowhere else; `config.describe()` turns this into `--help`.
Unknown keys are errors, numbers are never made out of strings, and what one section says about
another is checked where both are known. `config.py` reads YAML files and `--set` into these models
and is what other modules import.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    field_validator,
    model_validator,
)

from flexllm_jax.errors import UserError
from scheduler.policies import POLICIES

Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]
Bool = Annotated[bool, Strict()]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
TargetModule = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"
]
AdapterKind = Literal["lora", "ia3", "bottleneck", "prefix"]
ALL_MODULES: tuple[TargetModule, ...] = get_args(TargetModule)[:-1]  # "all-linear": no head


class ConfigError(UserError):
    """A configuration cannot be used. The message is one line: field, value, remedy."""


class Section(BaseModel):
    """Part of the configuration: immutable, no unknown keys, no infinities unless allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSection(Section):
    """The base model."""

    path: Path = Field(description="Folder of a Hugging Face checkpoint (Llama 3, Qwen2.5, Qwen3).")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="Type of weights, activations and KV pages on the device."
    )
    max_model_len: Int | None = Field(
        default=None,
        ge=2,
        description="Longest prompt plus output, tokens. null: what the checkpoint allows.",
    )


class ParallelSection(Section):
    """How the model is spread over devices."""

    tp: Int = Field(
        default=1,
        ge=1,
        description="Tensor parallel devices. Divides the model's attention heads, feed-forward "
        "width and vocabulary; key-value heads are replicated when there are fewer.",
    )
    num_processes: Int = Field(
        default=1,
        ge=1,
        description="Processes that the devices are spread over, each started with the same "
        "configuration but for process_id; each has tp / num_processes devices.",
    )
    process_id: Int = Field(
        default=0, ge=0, description="Which of the processes this is; 0 schedules and serves."
    )
    coordinator_address: str | None = Field(
        default=None,
        pattern=r"^[^\s:]+:\d{1,5}$",
        description="HOST:PORT of process 0, which the others find it by (a free port there).",
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.num_processes == 1:
            if self.process_id or self.coordinator_address:
                raise ValueError(
                    "process_id and coordinator_address need num_processes of 2 or more"
                )
            return self
        if self.coordinator_address is None:
            raise ValueError(
                f"num_processes={self.num_processes} needs coordinator_address: HOST:PORT of "
                f"process 0"
            )
        if self.process_id >= self.num_processes:
            raise ValueError(
                f"process_id={self.process_id} must be below num_processes={self.num_processes}"
            )
        if self.tp % self.num_processes:
            raise ValueError(
                f"tp={self.tp} must be a multiple of num_processes={self.num_processes}: as many "
                f"devices in each process"
            )
        return self


class CacheSection(Section):
    """The paged KV cache, shared by inference and finetuning."""

    page_size: Int = Field(default=16, ge=1, le=1024, description="Tokens in a KV page.")
    num_pages: Int | None = Field(
        default=None,
        ge=2,
        description="KV pages in the pool. null: as many as memory_fraction leaves room for.",
    )
    memory_fraction: Float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="Part of the device's memory the engine may use; unused if num_pages is set.",
    )
    prefix_caching: Bool = Field(
        default=True,
        description="Keep the pages of finished prompts, so that a shared prefix is computed once.",
    )


class PreloadedAdapter(Section):
    """A PEFT adapter to serve from the start."""

    name: Name = Field(description="Name requests ask for.")
    path: Path = Field(description="Folder with adapter_config.json and adapter_model.safetensors.")


class AdaptersSection(Section):
    """The device's bank of adapters."""

    slots: Int = Field(
        default=8,
        ge=1,
        le=4096,
        description="Adapters held on the device at once; slot 0 is `no adapter`.",
    )
    kinds: tuple[AdapterKind, ...] = Field(
        default=("lora",),
        min_length=1,
        description="Kinds of adapters the bank has room for; each makes steps with adapters a "
        "little longer.",
    )
    max_rank: Int = Field(
        default=16, ge=1, le=1024, description="Largest LoRA rank a slot can hold."
    )
    max_bottleneck: Int = Field(
        default=64, ge=1, le=1024, description="Largest width of a bottleneck adapter."
    )
    max_prefix: Int = Field(default=32, ge=1, le=1024, description="Longest prefix, in tokens.")
    target_modules: tuple[TargetModule, ...] = Field(
        default=ALL_MODULES,
        min_length=1,
        description="Modules the bank has room for; adapters may use any of these.",
    )
    preload: tuple[PreloadedAdapter, ...] = Field(
        default=(), description="Adapters loaded at start-up."
    )

    @field_validator("target_modules", "kinds")
    @classmethod
    def _distinct(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(modules)

    @model_validator(mode="after")
    def _names(self) -> Self:
        _distinct(tuple(adapter.name for adapter in self.preload), "preload.*.name: ")
        return self


class SloSection(Section):
    """The latency objective of inference, which finetuning must not break."""

    tpot_ms: Float = Field(default=200.0, gt=0, description="Time per output token, ms.")
    ttft_ms: Float = Field(
        default=5000.0, gt=0, description="Queueing plus time to the first token, ms."
    )
    weight: Float = Field(
        default=1.0, gt=0, description="What meeting it is worth, relative to other classes."
    )


class SchedulerSection(Section):
    """What goes into a step."""

    policy: Literal[tuple(POLICIES)] = Field(  # type: ignore[valid-type]
        default="coserving",
        description=f"How inference and finetuning share the device: {', '.join(POLICIES)}.",
    )
    latency: Literal["profile", "roofline"] = Field(
        default="profile",
        description="Where the prediction of a step's time starts from: steps timed at start-up, "
        "or the device's data sheet. Either is corrected while serving.",
    )
    max_tokens_per_step: Int = Field(
        default=512,
        ge=1,
        description="Token slots of the largest step: decode, prefill and finetuning together.",
    )
    max_sequences: Int = Field(default=32, ge=1, description="Requests running at once.")
    slo: SloSection = Field(
        default_factory=SloSection, description="Latency objective of the class `standard`."
    )
    slo_classes: dict[Name, SloSection] = Field(
        default={
            "interactive": SloSection(tpot_ms=100.0, ttft_ms=1000.0, weight=2.0),
            "batch": SloSection(tpot_ms=1000.0, ttft_ms=60_000.0, weight=0.5),
        },
        description="Other classes of requests, by name, each with tpot_ms, ttft_ms and weight.",
    )

    @field_validator("slo_classes")
    @classmethod
    def _standard_is_slo(cls, classes: dict[str, SloSection]) -> dict[str, SloSection]:
        if "standard" in classes:
            raise ValueError("`standard` is what scheduler.slo describes; set its fields there")
        return classes

    @model_validator(mode="after")
    def _every_sequence_decodes(self) -> Self:
        if self.max_sequences > self.max_tokens_per_step:
            raise ValueError(
                f"max_sequences is {self.max_sequences} but max_tokens_per_step only "
                f"{self.max_tokens_per_step}; every running request needs a token slot"
            )
        return self


class CompileSection(Section):
    """Ahead-of-time compilation."""

    cache_dir: Path | None = Field(
        default=Path("~/.cache/flexllm_jax"),
        validate_default=True,
        description="JAX's persistent compilation cache; ~ is the home folder. null: none.",
    )
    token_buckets: tuple[Annotated[Int, Field(ge=1)], ...] | None = Field(
        default=None,
        min_length=1,
        description="Token slots of the step programs, increasing, the last equal to "
        "scheduler.max_tokens_per_step. null: chosen by the engine.",
    )

    @field_validator("cache_dir")
    @classmethod
    def _home(cls, path: Path | None) -> Path | None:
        return path if path is None else path.expanduser()

    @field_validator("token_buckets")
    @classmethod
    def _increasing(cls, buckets: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if buckets is not None and any(b >= c for b, c in pairwise(buckets)):
            raise ValueError(f"got {list(buckets)}; must be strictly increasing")
        return buckets


class PeftConfig(Section):
    """The adapter a job trains; fields of other kinds do not count. Also accepts
    `flexllm_jax.peft.adapter.LoraConfig`."""

    type: AdapterKind = Field(default="lora", description="Kind of adapter; one of adapters.kinds.")
    r: Int = Field(default=16, ge=1, description="LoRA rank; at most adapters.max_rank.")
    alpha: Float = Field(
        default=32.0, gt=0, description="LoRA scale: alpha/r multiplies the update."
    )
    target_modules: tuple[TargetModule, ...] = Field(
        default=ALL_MODULES,
        min_length=1,
        description="Modules that get an adapter, or all-linear: all seven.",
    )
    use_rslora: Bool = Field(
        default=False, description="Scale by alpha/sqrt(r) instead of alpha/r."
    )
    rank_pattern: dict[str, Annotated[Int, Field(ge=1)]] = Field(
        default={}, description="Rank of single modules, by name or regular expression as in PEFT."
    )
    alpha_pattern: dict[str, Annotated[Float, Field(gt=0)]] = Field(
        default={}, description="Alpha of single modules, by name or regular expression as in PEFT."
    )

    layers_to_transform: tuple[Annotated[Int, Field(ge=0)], ...] | None = Field(
        default=None, min_length=1, description="Layers that get LoRA, from 0. null: all."
    )
    bottleneck_size: Int = Field(
        default=64, ge=1, description="Width of a bottleneck; at most adapters.max_bottleneck."
    )
    num_virtual_tokens: Int = Field(
        default=16, ge=1, description="Tokens of a prefix; at most adapters.max_prefix."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_dataclass(cls, value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return value

    @field_validator("target_modules", mode="before")
    @classmethod
    def _all_linear(cls, modules: Any) -> Any:
        return ALL_MODULES if modules == "all-linear" else modules

    @field_validator("target_modules")
    @classmethod
    def _distinct(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        return _distinct(modules)

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns


class OptimizerConfig(Section):
    """AdamW and its learning rate."""

    lr: Float = Field(default=2e-4, gt=0, description="Peak learning rate.")
    warmup: Int = Field(
        default=0, ge=0, description="Optimizer steps over which the rate rises from 0."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="linear",
        description="Rate after warm-up: constant, or falling to 0 at the last step.",
    )
    weight_decay: Float = Field(default=0.0, ge=0, description="AdamW's decoupled weight decay.")
    clip: Float | None = Field(
        default=1.0, gt=0, description="Largest global norm of a gradient. null: no clipping."
    )
    beta1: Float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean of gradients.")
    beta2: Float = Field(
        default=0.999, ge=0, lt=1, description="Decay of the mean of squared gradients."
    )
    eps: Float = Field(default=1e-8, gt=0, description="Added to the denominator.")


class FinetuneConfig(Section):
    """One finetuning job: a dataset, an adapter, an optimizer."""

    name: Name = Field(
        description="Name of the job, of its adapter and of its folder in output_dir."
    )
    dataset: Path = Field(description="Training rows, JSONL or JSON.")
    format: Literal[
        "auto", "chat", "prompt_completion", "text", "alpaca", "sharegpt", "question_answer"
    ] = Field(default="auto", description="What a row looks like. auto: detected from its fields.")
    validation: Path | None = Field(default=None, description="Validation rows in the same format.")
    validation_every: Int = Field(
        default=0, ge=0, description="Optimizer steps between validations. 0: only at the end."
    )
    train_on: Literal["completion", "all"] = Field(
        default="completion",
        description="Tokens that count in the loss: the answers, or everything.",
    )
    peft: PeftConfig = Field(default_factory=PeftConfig, description="The adapter.")
    optimizer: OptimizerConfig = Field(
        default_factory=OptimizerConfig, description="The optimizer."
    )
    batch_tokens: Int = Field(
        default=4096,
        ge=1,
        description="Tokens per optimizer step, at most, unless a single row has more.",
    )
    max_seq_len: Int | None = Field(
        default=None,
        ge=2,
        description="Longer rows are cut to this many tokens. null: finetune.max_tokens.",
    )
    epochs: Int | None = Field(
        default=None, ge=1, description="Passes over the dataset; or give steps."
    )
    steps: Int | None = Field(default=None, ge=1, description="Optimizer steps; or give epochs.")
    seed: Int = Field(
        default=0, ge=0, description="Seeds the adapter's start and the order of rows."
    )
    weight: Float = Field(
        default=1.0,
        gt=0,
        description="Share of the finetuning tokens, relative to other jobs of its priority.",
    )
    priority: Int = Field(
        default=0, description="Jobs of a higher priority go first as long as they have work."
    )
    init_adapter: Path | None = Field(
        default=None,
        description="PEFT folder to start from. null: a fresh adapter that changes nothing yet.",
    )
    resume: Bool = Field(
        default=True,
        description="Go on from the job's newest checkpoint in output_dir, if there is one.",
    )

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            given = "neither" if self.epochs is None else "both"
            raise ValueError(f"{given} of epochs and steps is given; give exactly one")
        return self


class FinetuneSection(Section):
    """Token-level finetuning."""

    max_tokens: Int = Field(
        default=1024,
        ge=2,
        description="Tokens whose activations are held on the device: a longest sequence, or two "
        "microbatches of half of it, of which one goes forward while the other goes backward.",
    )
    window: Int = Field(
        default=256, ge=1, description="Tokens of a backward window; must divide max_tokens."
    )
    saved: Literal["auto", "all", "inputs"] | tuple[str, ...] = Field(
        default="inputs",
        description="Activations the forward keeps for the backward instead of recomputing, "
        "besides the layers' inputs: `inputs` (attention's outputs alone), `all` (whatever spares "
        "work), `auto` (what spares most in the memory that is free), or a list of names; an empty "
        "list keeps least.",
    )
    idle_step_ms: Float = Field(
        default=100.0,
        gt=0,
        allow_inf_nan=True,
        description="Longest step while no request runs, ms: an arriving request waits for it. "
        ".inf: no limit.",
    )
    floor: Float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the device's time that finetuning gets even if requests are then "
        "late; 0: none.",
    )
    checkpoint_every: Int = Field(
        default=50,
        ge=0,
        description="Optimizer steps between checkpoints. 0: only at the end or on Ctrl-C.",
    )
    jobs: tuple[FinetuneConfig, ...] = Field(default=(), description="Jobs, trained side by side.")

    @field_validator("saved", mode="before")
    @classmethod
    def _saved(cls, saved: Any) -> Any:
        if saved in ("auto", "all", "inputs"):
            return saved
        if isinstance(saved, list | tuple) and all(isinstance(name, str) for name in saved):
            return tuple(saved)
        raise ValueError(
            f"got {saved!r}; must be `auto`, `all`, `inputs` or a list of activation names"
        )

    @field_validator("window")
    @classmethod
    def _divides(cls, window: int, info: Any) -> int:
        max_tokens = info.data.get("max_tokens", window)
        if max_tokens % window:
            raise ValueError(
                f"got {window}; must divide finetune.max_tokens, which is {max_tokens}"
            )
        return window

    @field_validator("jobs")
    @classmethod
    def _jobs(cls, jobs: tuple[FinetuneConfig, ...], info: Any) -> tuple[FinetuneConfig, ...]:
        _distinct(tuple(job.name for job in jobs), "name: ")
        max_tokens = info.data.get("max_tokens", math.inf)
        for index, job in enumerate(jobs):
            if job.max_seq_len is not None and job.max_seq_len > max_tokens:
                raise ValueError(
                    f"job {index} has max_seq_len {job.max_seq_len}, too long for a microbatch; "
                    f"lower it or raise finetune.max_tokens, which is {max_tokens}"
                )
        if max_tokens == math.inf:
            return jobs
        return tuple(
            job.model_copy(update={"max_seq_len": job.max_seq_len or max_tokens}) for job in jobs
        )


class ArrivalsConfig(Section):
    """Made-up requests, where no trace is at hand."""

    process: Literal["poisson", "gamma", "uniform"] = Field(
        default="poisson",
        description="Times between arrivals: exponential, gamma (bursty), or constant.",
    )
    rate: Float = Field(gt=0, description="Requests per second.")
    duration_s: Float = Field(gt=0, description="Length of the workload, seconds.")
    cv: Float = Field(
        default=2.0,
        gt=0,
        description="Coefficient of variation of the gamma process; above 1 is bursty.",
    )
    prompt_tokens: Int = Field(default=64, ge=1, description="Mean prompt, tokens.")
    output_tokens: Int = Field(default=64, ge=1, description="Mean output, tokens.")


class WorkloadSection(Section):
    """The requests coserve.py replays."""

    trace: Path | None = Field(
        default=None,
        description="CSV with arrival_s, prompt_tokens, output_tokens; or give arrivals.",
    )
    arrivals: ArrivalsConfig | None = Field(
        default=None, description="Made-up arrivals; or give a trace."
    )
    prompts: Path | None = Field(
        default=None, description="JSONL with a field `prompt`. null: random tokens."
    )
    time_scale: Float = Field(
        default=1.0, gt=0, description="Multiplies arrival times: 0.5 is twice the request rate."
    )
    seed: Int = Field(default=0, ge=0, description="Seeds arrivals, prompts and sampling.")
    max_requests: Int | None = Field(
        default=None, ge=1, description="Stop after this many. null: all."
    )
    temperature: Float = Field(default=0.0, ge=0, description="Sampling temperature; 0 is greedy.")
    adapter: str | None = Field(
        default=None,
        description="Adapter the requests ask for, preloaded or a job's. null: the base model.",
    )
    slo_class: str = Field(
        default="standard",
        description="Class of the requests: standard or one of scheduler.slo_classes.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.trace is None) == (self.arrivals is None):
            given = "neither" if self.trace is None else "both"
            raise ValueError(f"{given} of trace and arrivals is given; give exactly one")
        return self


class ApiKey(Section):
    """A key that clients send as `Authorization: Bearer`, and what its owner may use."""

    name: Name = Field(description="Whose key it is, as logs and limits call it.")
    key: str = Field(min_length=8, description="The key itself.")
    requests_in_flight: Int | None = Field(
        default=None, ge=1, description="Outputs being generated at once. null: no limit."
    )
    tokens_per_minute: Int | None = Field(
        default=None, ge=1, description="Prompt and output tokens per minute. null: no limit."
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
    max_upload_bytes: Int = Field(
        default=512 * 2**20, ge=1024, description="Largest uploaded file, bytes."
    )
    max_storage_bytes: Int = Field(
        default=16 * 2**30, ge=1024, description="All uploaded files together, bytes."
    )
    max_running_jobs: Int = Field(
        default=2, ge=1, description="Jobs that an engine trains side by side; others are queued."
    )
    max_queued_jobs: Int = Field(
        default=100, ge=1, description="Jobs that are not done; beyond it, status 429."
    )
    database: str | None = Field(
        default=None,
        description="SQLAlchemy URL of files and jobs. null: SQLite in output_dir/server.",
    )
    adapter_dirs: tuple[Path, ...] = Field(
        default=(),
        description="Folders whose adapters /v1/load_lora_adapter may load. None: it is off.",
    )
    stuck_after_s: Float = Field(
        default=60.0, gt=0, description="Seconds without a step, having work, that fail /health."
    )
    log_format: Literal["json", "text"] = Field(
        default="json", description="What a line of the log looks like, on stderr."
    )
    grace_s: Float = Field(
        default=25.0,
        gt=0,
        description="Seconds after SIGTERM in which requests finish and jobs write checkpoints.",
    )

    @field_validator("api_keys")
    @classmethod
    def _distinct_keys(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        _distinct(tuple(key.name for key in keys), "name: ")
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


class Config(Section):
    """The whole tree."""

    model: ModelSection = Field(description="The base model.")
    parallel: ParallelSection = Field(default_factory=ParallelSection, description="Devices.")
    kernels: Literal["auto", "xla", "pallas"] = Field(
        default="auto",
        description="Attention and adapter kernels. auto: pallas on a GPU, xla elsewhere. pallas "
        "without a GPU runs in an interpreter, slowly.",
    )
    cache: CacheSection = Field(default_factory=CacheSection, description="KV pages.")
    adapters: AdaptersSection = Field(default_factory=AdaptersSection, description="Adapter bank.")
    scheduler: SchedulerSection = Field(default_factory=SchedulerSection, description="Steps.")
    compile: CompileSection = Field(default_factory=CompileSection, description="Programs.")
    finetune: FinetuneSection = Field(default_factory=FinetuneSection, description="Finetuning.")
    workload: WorkloadSection | None = Field(default=None, description="Requests to replay.")
    server: ServerSection = Field(default_factory=ServerSection, description="HTTP server.")
    ray: RaySection = Field(default_factory=RaySection, description="Replicas.")
    log: LogSection = Field(default_factory=LogSection, description="Logs.")
    output_dir: Path = Field(
        default=Path("runs/default"), description="Folder for reports, checkpoints and adapters."
    )

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        for problem in self._disagreements():
            raise ValueError(problem)
        return self

    def _disagreements(self) -> Iterator[str]:
        buckets, adapters, jobs = self.compile.token_buckets, self.adapters, self.finetune.jobs
        largest = self.scheduler.max_tokens_per_step
        if buckets is not None and buckets[-1] != largest:
            yield (
                f"compile.token_buckets: the last bucket is {buckets[-1]}; it must equal "
                f"scheduler.max_tokens_per_step, which is {largest}"
            )
        preloaded = {adapter.name for adapter in adapters.preload}
        needed = 1 + len(preloaded) + len(jobs)
        if needed > adapters.slots:
            yield (
                f"adapters.slots: got {adapters.slots}; slot 0 is `no adapter` and every preloaded "
                f"adapter and job needs one: set it to {needed} or more"
            )
        for index, job in enumerate(jobs):
            field = f"finetune.jobs.{index}"
            if job.name in preloaded:
                yield f"{field}.name: {job.name!r} is also a preloaded adapter; rename one of them"
            if job.peft.type not in adapters.kinds:
                yield f"{field}.peft.type: {job.peft.type} is not in adapters.kinds; add it there"
            rank = max((job.peft.r, *job.peft.rank_pattern.values()))
            for kind, own, value, most in (
                ("lora", "r: rank", rank, "max_rank"),
                ("bottleneck", "bottleneck_size:", job.peft.bottleneck_size, "max_bottleneck"),
                ("prefix", "num_virtual_tokens:", job.peft.num_virtual_tokens, "max_prefix"),
            ):
                limit = getattr(adapters, most)
                if job.peft.type == kind and value > limit:
                    yield (
                        f"{field}.peft.{own} {value} is more than adapters.{most}, which is "
                        f"{limit}; raise that or lower it"
                    )
            for module in job.peft.target_modules if job.peft.type == "lora" else ():
                if module not in adapters.target_modules:
                    yield (
                        f"{field}.peft.target_modules: {module} is not in adapters.target_modules; "
                        "add it there or drop it here"
                    )
        known = preloaded | {job.name for job in jobs}
        wanted = self.workload.adapter if self.workload else None
        if wanted and wanted not in known:
            yield (
                f"workload.adapter: {wanted!r} is neither a preloaded adapter nor a job "
                f"({', '.join(sorted(known)) or 'there are none'})"
            )

        classes = {"standard", *self.scheduler.slo_classes}
        if self.workload and self.workload.slo_class not in classes:
            yield (
                f"workload.slo_class: {self.workload.slo_class!r} is not one of "
                f"{', '.join(sorted(classes))}; add it to scheduler.slo_classes"
            )

    def require_inputs(self) -> None:
        """Raise ConfigError naming the first input file or folder that does not exist.

        Scripts call it first: a mistyped path must not cost minutes of loading and compiling.
        """
        inputs: dict[str, Path | None] = {"model.path": self.model.path}
        for index, adapter in enumerate(self.adapters.preload):
            inputs[f"adapters.preload.{index}.path"] = adapter.path
        for index, job in enumerate(self.finetune.jobs):
            for field in ("dataset", "validation", "init_adapter"):
                inputs[f"finetune.jobs.{index}.{field}"] = getattr(job, field)
        if self.workload:
            inputs["workload.trace"] = self.workload.trace
            inputs["workload.prompts"] = self.workload.prompts
        for field, path in inputs.items():
            if path is not None and not path.exists():
                raise ConfigError(f"{field}: {path} does not exist (paths start at {Path.cwd()})")


def _distinct(names: tuple[str, ...], prefix: str = "") -> tuple[str, ...]:
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"{prefix}{name!r} is given twice; remove or rename one")
    return names
