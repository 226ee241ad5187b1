"""The families of models: a row for each, and no other place that knows one by its name."""

from flexllm_jax.models.families.family import Family
from flexllm_jax.models.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    family.architecture: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL)
}
BY_MODEL_TYPE = {family.model_type: name for name, family in FAMILIES.items()}
