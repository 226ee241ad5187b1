"""The configuration tree: its sections, and reading it from YAML and `--set`.

Every field is described once, in the module of its section; `describe()` turns that into `--help`
and the docs' page. Unknown keys are errors, numbers are never made out of strings, and what one
section says about another is checked in `tree`, where both are known.
"""

from flexllm_jax.config.fields import (
    ALL_MODULES,
    FUSED_MODULES,
    AdapterKind,
    ConfigError,
    LoraInit,
    Section,
    TargetModule,
    ranks_taken,
)
from flexllm_jax.config.load import build_config, describe, load_config
from flexllm_jax.config.sections.finetune import (
    FinetuneConfig,
    FinetuneSection,
    OptimizerConfig,
)
from flexllm_jax.config.sections.memory import AdaptersSection, CacheSection, PreloadedAdapter
from flexllm_jax.config.sections.method import (
    METHODS,
    PREFERENCE_METHODS,
    DpoConfig,
    IpoConfig,
    MethodConfig,
    PreferenceConfig,
    ReinforcementConfig,
    SimpoConfig,
    SupervisedConfig,
)
from flexllm_jax.config.sections.model import ModelSection, ParallelSection
from flexllm_jax.config.sections.peft import PeftConfig
from flexllm_jax.config.sections.scheduler import CompileSection, SchedulerSection, SloSection
from flexllm_jax.config.sections.server import ApiKey, LogSection, RaySection, ServerSection
from flexllm_jax.config.sections.tinker import TinkerSection
from flexllm_jax.config.sections.trackers import (
    MlflowSection,
    TensorboardSection,
    TrackersSection,
    WandbSection,
)
from flexllm_jax.config.sections.workload import ArrivalsConfig, WorkloadSection
from flexllm_jax.config.tree import Config

__all__ = [
    "ALL_MODULES",
    "FUSED_MODULES",
    "METHODS",
    "PREFERENCE_METHODS",
    "AdapterKind",
    "AdaptersSection",
    "ApiKey",
    "ArrivalsConfig",
    "CacheSection",
    "CompileSection",
    "Config",
    "ConfigError",
    "DpoConfig",
    "FinetuneConfig",
    "FinetuneSection",
    "IpoConfig",
    "LogSection",
    "LoraInit",
    "MethodConfig",
    "MlflowSection",
    "ModelSection",
    "OptimizerConfig",
    "ParallelSection",
    "PeftConfig",
    "PreferenceConfig",
    "PreloadedAdapter",
    "RaySection",
    "ReinforcementConfig",
    "SchedulerSection",
    "Section",
    "ServerSection",
    "SimpoConfig",
    "SloSection",
    "SupervisedConfig",
    "TargetModule",
    "TensorboardSection",
    "TinkerSection",
    "TrackersSection",
    "WandbSection",
    "WorkloadSection",
    "build_config",
    "describe",
    "load_config",
    "ranks_taken",
]
