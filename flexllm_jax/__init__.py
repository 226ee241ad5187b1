"""flexllm_jax: serve a language model and finetune its adapters on the same device."""

import os

# Said before transformers is imported: it would tell everybody that PyTorch is not installed, which
# is not needed here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from flexllm_jax.config import FinetuneConfig, OptimizerConfig, PeftConfig, load_config
from flexllm_jax.engine.sampling_params import SamplingParams
from flexllm_jax.engine.structured_outputs import StructuredOutputsParams
from flexllm_jax.llm import LLM, CompletionOutput, Job, RequestOutput
from flexllm_jax.peft.adapter import LoraConfig

__all__ = [
    "LLM",
    "CompletionOutput",
    "FinetuneConfig",
    "Job",
    "LoraConfig",
    "OptimizerConfig",
    "PeftConfig",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "load_config",
]
