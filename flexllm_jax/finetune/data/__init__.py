"""Datasets for finetuning: formats, loss masks, batches and packing."""

from flexllm_jax.finetune.data.formats import (
    FORMATS,
    Dataset,
    DatasetError,
    SkippedRow,
    TrainingSequence,
    detect_format,
    load_dataset,
)
from flexllm_jax.finetune.data.packing import pack
from flexllm_jax.finetune.data.stream import BatchStream

__all__ = [
    "FORMATS",
    "BatchStream",
    "Dataset",
    "DatasetError",
    "SkippedRow",
    "TrainingSequence",
    "detect_format",
    "load_dataset",
    "pack",
]
