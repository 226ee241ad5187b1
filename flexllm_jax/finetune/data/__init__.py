"""Datasets for finetuning: formats, loss masks, batches and packing."""

from flexllm_jax.finetune.data.formats import detect_format, load_dataset
from flexllm_jax.finetune.data.items import (
    Dataset,
    SkippedRow,
    TrainingItem,
    TrainingPair,
    TrainingSequence,
)
from flexllm_jax.finetune.data.packing import pack
from flexllm_jax.finetune.data.rows import DatasetError
from flexllm_jax.finetune.data.stream import BatchStream
from flexllm_jax.finetune.data.table import FORMATS

__all__ = [
    "FORMATS",
    "BatchStream",
    "Dataset",
    "DatasetError",
    "SkippedRow",
    "TrainingItem",
    "TrainingPair",
    "TrainingSequence",
    "detect_format",
    "load_dataset",
    "pack",
]
