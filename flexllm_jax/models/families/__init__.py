"""The families of models: a row for each, and no other place that knows one by its name."""

from flexllm_jax.models.families.cohere import COHERE2
from flexllm_jax.models.families.dense import (
    GRANITE,
    GRANITE_SWA,
    OLMO2,
    OLMO3,
    SEED_OSS,
    SMOLLM3,
)
from flexllm_jax.models.families.family import Family, Wrapper
from flexllm_jax.models.families.gemma import GEMMA2, GEMMA3
from flexllm_jax.models.families.gemma4 import GEMMA4, GEMMA4_UNIFIED, GEMMA4_WRAPPERS
from flexllm_jax.models.families.hybrid import OLMO_HYBRID, QWEN3_5
from flexllm_jax.models.families.llama import (
    GLM4,
    LLAMA,
    MINISTRAL,
    MINISTRAL3,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
)
from flexllm_jax.models.families.muse import MUSE, MUSE_WRAPPER

FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        *(LLAMA, QWEN2, QWEN3, MISTRAL, MINISTRAL, MINISTRAL3, PHI3, GLM4),
        *(SMOLLM3, SEED_OSS, GRANITE, GRANITE_SWA, OLMO2, OLMO3, GEMMA2, GEMMA3),
        *(GEMMA4, GEMMA4_UNIFIED, MUSE, QWEN3_5, OLMO_HYBRID, COHERE2),
    )
}
# Models of more than text, of which the text's part is served.
WRAPPERS: dict[str, Wrapper] = {
    wrapper.architecture: wrapper
    for wrapper in (
        *(*GEMMA4_WRAPPERS, MUSE_WRAPPER),
        Wrapper(
            "Gemma 3 with vision", "gemma3", "Gemma3ForConditionalGeneration", text="gemma3_text"
        ),
        Wrapper(
            "Mistral Small 3, Ministral 3 with vision",
            "mistral3",
            "Mistral3ForConditionalGeneration",
            text="mistral",
        ),
        Wrapper(
            "Qwen3.5 with vision",
            "qwen3_5",
            "Qwen3_5ForConditionalGeneration",
            text="qwen3_5_text",
        ),
    )
}
