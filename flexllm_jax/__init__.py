"""flexllm_jax: serve a language model and finetune its adapters on the same device."""

from flexllm_jax.config import FinetuneConfig, OptimizerConfig, PeftConfig, load_config
from flexllm_jax.engine.sampling_params import SamplingParams
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
    "load_config",
]
