"""flexllm_jax: serve a language model and finetune its adapters on the same device."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from flexllm_jax.version import __version__ as __version__

# Said before transformers is imported: it would tell everybody that PyTorch is not installed, which
# is not needed here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# Said before JAX makes its client of a GPU, which else takes three quarters of the memory; what is
# left besides holds CUDA graphs, modules and cuBLAS' workspace. Both at once JAX refuses.
if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & os.environ.keys():
    os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.92"

if TYPE_CHECKING:
    from flexllm_jax.config import (
        DpoConfig,
        FinetuneConfig,
        IpoConfig,
        OptimizerConfig,
        PeftConfig,
        ReinforcementConfig,
        SimpoConfig,
        load_config,
    )
    from flexllm_jax.engine.sampling.params import SamplingParams
    from flexllm_jax.engine.sampling.structured_outputs import StructuredOutputsParams
    from flexllm_jax.llm import LLM, CompletionOutput, JobHandle, RequestOutput
    from flexllm_jax.peft.adapter import LoraConfig

# Imported when asked for: a process without an engine, as the HTTP server, need not wait for one.
_MODULES = {
    "config": (
        "DpoConfig",
        "FinetuneConfig",
        "IpoConfig",
        "OptimizerConfig",
        "PeftConfig",
        "ReinforcementConfig",
        "SimpoConfig",
        "load_config",
    ),
    "engine.sampling.params": ("SamplingParams",),
    "engine.sampling.structured_outputs": ("StructuredOutputsParams",),
    "llm": ("LLM", "CompletionOutput", "JobHandle", "RequestOutput"),
    "peft.adapter": ("LoraConfig",),
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "DpoConfig",
    "FinetuneConfig",
    "IpoConfig",
    "JobHandle",
    "LoraConfig",
    "OptimizerConfig",
    "PeftConfig",
    "ReinforcementConfig",
    "RequestOutput",
    "SamplingParams",
    "SimpoConfig",
    "StructuredOutputsParams",
    "load_config",
]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
