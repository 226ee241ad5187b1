"""Fields of `trackers`: where the progress of finetuning jobs is written besides the report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from flexllm_jax.config.fields import Int, Section


class TensorboardSection(Section):
    """Event files, for `tensorboard --logdir`; `{}` is enough."""

    folder: Path | None = Field(
        default=None,
        description="Folder of the runs, one folder each. null: output_dir/tensorboard.",
    )


class WandbSection(Section):
    """Runs at Weights & Biases; `{}` is enough. The key is WANDB_API_KEY of the environment."""

    project: str = Field(default="flexllm_jax", min_length=1, description="Project of the runs.")
    entity: str | None = Field(
        default=None, min_length=1, description="Team or user. null: the key's own."
    )
    tags: tuple[str, ...] = Field(default=(), description="Tags of every run.")
    mode: Literal["online", "offline"] = Field(
        default="online",
        description="offline: written to output_dir/wandb, for `wandb sync`; needs no key.",
    )


class MlflowSection(Section):
    """Runs of MLflow; `{}` is enough."""

    uri: str | None = Field(
        default=None,
        min_length=1,
        description="Tracking URI, such as http://host:5000 or file:///folder. null: the folder "
        "output_dir/mlruns.",
    )
    experiment: str = Field(
        default="flexllm_jax", min_length=1, description="Experiment of the runs."
    )


class TrackersSection(Section):
    """Where the progress of jobs is written besides the report. None of them is by default; each
    needs an extra of its name."""

    tensorboard: TensorboardSection | None = Field(default=None, description="TensorBoard.")
    wandb: WandbSection | None = Field(default=None, description="Weights & Biases.")
    mlflow: MlflowSection | None = Field(default=None, description="MLflow.")
    samples: Int = Field(
        default=0,
        ge=0,
        le=100,
        description="Validation rows (training rows, if there are none) that a finished adapter "
        "answers, as requests of the least urgent class; prompt, expected and answer are logged.",
    )
    sample_tokens: Int = Field(
        default=64, ge=1, description="Tokens of a sample's answer, at most."
    )

    def chosen(self) -> Iterator[tuple[str, Section]]:
        """Name and section of every tracker that is to be used."""
        for name in ("tensorboard", "wandb", "mlflow"):
            if (section := getattr(self, name)) is not None:
                yield name, section
