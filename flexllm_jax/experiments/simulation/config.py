"""The configuration of a simulation: the device's data sheet and what a system makes of it, the
engine's sizes, the policy, the workload and the fleet. Every field is described.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flexllm_jax.config import Section, SloSection, WorkloadSection
from flexllm_jax.config.fields import Bool, Float, Int
from scheduler.policies import POLICIES

# Clusters, or parts of a device, of inference and of finetuning alone: the share of the latter.
SEPARATE = {f"separate_{percent}": percent / 100 for percent in (25, 50, 75)}
SPATIAL = {f"spatial_{percent}": percent / 100 for percent in (25, 50, 75)}
ARRANGEMENTS = (*POLICIES, *SEPARATE, *SPATIAL)


class EfficiencySection(Section):
    """What a system makes of its device; see `scheduler.latency.roofline.Efficiency`."""

    compute: Float = Field(default=0.5, gt=0, le=1, description="Share of the FLOP/s reached.")
    memory: Float = Field(default=0.7, gt=0, le=1, description="Share of the bytes/s reached.")
    sharpness: Float = Field(
        default=4.0, ge=1, description="p of the p-norm of computing and reading weights."
    )
    step_s: Float = Field(default=1e-3, ge=0, description="Seconds of a step besides.")
    unit_s: Float = Field(default=1e-4, ge=0, description="Seconds of a backward unit besides.")
    all_reduce_s: Float = Field(default=2e-5, ge=0, description="Latency of an all-reduce.")
    recompute: Float = Field(
        default=0.0, ge=0, description="Share of the forward that the backward does again."
    )


class EngineSection(Section):
    """Sizes of an engine."""

    token_buckets: tuple[Annotated[Int, Field(ge=1)], ...] = Field(
        default=(16, 64, 128, 192, 256, 320, 384, 512, 1024, 2048),
        min_length=1,
        description="Token slots of the step programs, increasing.",
    )
    max_sequences: Int = Field(default=256, ge=1, description="Requests running at once.")
    max_model_len: Int = Field(default=8192, ge=2, description="Longest prompt plus output.")
    num_pages: Int = Field(default=24_000, ge=1, description="KV pages.")
    page_size: Int = Field(default=16, ge=1, description="Tokens of a page.")
    unit_tokens: Int = Field(default=512, ge=1, description="Tokens of a backward unit.")
    finetune_slots: Int = Field(default=16_384, ge=1, description="Tokens in finetuning work.")
    finetune_floor: Float = Field(default=0.0, ge=0, lt=1, description="As finetune.floor.")


class RolloutsSection(Section):
    """Answers that the job learns from, all of which it trains."""

    prompts: Int = Field(default=16, ge=1, description="Prompts of a batch.")
    generations: Int = Field(default=8, ge=2, description="Answers to each.")
    prompt_tokens: Int = Field(default=256, ge=1, description="Tokens of a prompt.")
    mean_tokens: Float = Field(default=512.0, ge=1, description="Mean length of an answer.")
    cv: Float = Field(default=0.5, ge=0, description="Its coefficient of variation.")
    max_tokens: Int = Field(default=1024, ge=1, description="Longer answers are cut here.")
    steps_ahead: Int = Field(
        default=0, ge=0, le=8, description="Batches that the answering weights may be behind."
    )


class SupplySection(Section):
    """The finetuning job: it never ends. With `rollouts` it learns from rewards."""

    rollouts: RolloutsSection | None = Field(
        default=None, description="What it answers; then lengths and accumulation do not count."
    )
    mean_tokens: Float = Field(default=3263.0, ge=1, description="Mean length of a sequence.")
    cv: Float = Field(default=0.57, ge=0, description="Its coefficient of variation.")
    min_tokens: Int = Field(default=256, ge=1, description="Shorter ones are this long.")
    max_tokens: Int = Field(default=8191, ge=1, description="Longer ones are this long.")
    microbatch_tokens: Int = Field(
        default=4096, ge=1, description="Sequences are packed up to this many tokens."
    )
    accumulation: Int = Field(default=8, ge=1, description="Sequences of an optimizer step.")


class ReplicaSection(Section):
    """Engines that come or go."""

    at_s: Float = Field(ge=0, description="When.")
    change: Int = Field(description="How many come (above 0) or go (below 0).")


class FleetSection(Section):
    """How many engines, and who gets which request."""

    engines: Int = Field(default=1, ge=1, description="Engines at the start.")
    router: Literal["round_robin", "least_loaded", "adapter_affinity"] = Field(
        default="least_loaded", description="Chooses an engine for a request."
    )
    replicas: tuple[ReplicaSection, ...] = Field(default=(), description="Changes, in order.")
    startup_s: Float = Field(default=60.0, ge=0, description="Seconds a new engine needs.")
    processes: Int = Field(
        default=1,
        ge=1,
        description="Processes that share the engines: about a core each is used, and the result "
        "is the same. Starting them takes seconds, so that they pay for large fleets alone.",
    )

    @model_validator(mode="after")
    def _can_be_shared(self) -> Self:
        if self.processes > self.engines:
            raise ValueError(
                f"processes={self.processes} must be at most engines={self.engines}: each process"
                " has some"
            )
        if self.processes > 1 and (self.router != "least_loaded" or self.replicas):
            raise ValueError(
                f"processes={self.processes} needs router=least_loaded and no replicas; other"
                " fleets are simulated with processes=1"
            )
        return self


class SimulationConfig(Section):
    """The whole tree."""

    device: Literal["a100", "h100", "h200"] = Field(default="a100", description="Data sheet.")
    model: Literal["llama-3.1-8b", "llama-3.1-70b", "qwen2.5-14b", "qwen2.5-32b"] = Field(
        default="llama-3.1-8b", description="Base model."
    )
    tp: Int = Field(default=1, ge=1, description="Devices of an engine.")
    efficiency: EfficiencySection = Field(
        default_factory=EfficiencySection, description="What is reached of the data sheet."
    )
    latency_file: Path | None = Field(
        default=None,
        description="A latency profile that an engine saved, in place of a data sheet.",
    )
    policy: str = Field(
        default="coserving", description=f"How work is shared: {', '.join(ARRANGEMENTS)}."
    )
    knowledge: Literal["learnt", "perfect", "fixed"] = Field(
        default="learnt",
        description="What the scheduler knows of step times: the model and what it measures, every "
        "step's time before it runs, or the model alone.",
    )
    believed_scale: Float = Field(
        default=1.0, gt=0, description="Step times the scheduler starts from, over the true ones."
    )
    slo: SloSection = Field(
        default_factory=lambda: SloSection(tpot_ms=50.0), description="Objective."
    )
    engine: EngineSection = Field(default_factory=EngineSection, description="Sizes.")
    finetune: SupplySection | None = Field(
        default_factory=SupplySection, description="The job. null: none."
    )
    workload: WorkloadSection = Field(description="Requests; prompts are lengths only.")
    rate: Float | None = Field(
        default=None,
        gt=0,
        description="Requests per second of the whole fleet: the trace is thinned evenly, or "
        "replayed by several at once. null: the trace as it is.",
    )
    duration_s: Float | None = Field(
        default=None, gt=0, description="Ignore later arrivals. null: all count."
    )
    fleet: FleetSection = Field(default_factory=FleetSection, description="Engines.")
    noise: Float = Field(default=0.03, ge=0, description="Sigma of the logarithm of step times.")
    host_s: Float = Field(default=0.0, ge=0, description="Seconds to plan a step.")
    leaps: Bool = Field(
        default=False, description="Take steps that are alike in one go: for large fleets."
    )
    seed: Int = Field(default=0, ge=0, description="Seeds lengths and step times.")
    output_dir: Path = Field(default=Path("runs/simulation"), description="Folder for reports.")

    @model_validator(mode="after")
    def _known_policy(self) -> Self:
        if self.policy not in ARRANGEMENTS:
            raise ValueError(f"policy: {self.policy!r} must be one of {', '.join(ARRANGEMENTS)}")
        return self
