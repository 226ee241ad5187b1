"""Fields of `model` and `parallel`: the base model, and the devices it is spread over."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from flexllm_jax.config.fields import Int, Section


class ModelSection(Section):
    """The base model."""

    path: Path = Field(
        description="Folder of a Hugging Face checkpoint (families: docs/adapters.md)."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Type of weights, activations and KV pages on the device. auto: the "
        "checkpoint's on a GPU (bfloat16 for float16), float32 on a CPU; an export has the "
        "checkpoint's.",
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto",
        description="auto: the checkpoint's weights. dummy: random ones made on the device, for "
        "trials and benchmarks; path then needs only config.json and a tokenizer.",
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
