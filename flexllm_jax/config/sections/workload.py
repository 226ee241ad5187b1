"""Fields of `workload`: the requests that a run replays."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from flexllm_jax.config.fields import Float, Int, Section


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
