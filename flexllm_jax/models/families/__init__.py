"""The families of models: a row for each, and no other place that knows one by its name."""

from flexllm_jax.models.families import cohere, dense, gemma, gemma4, hybrid, llama, muse
from flexllm_jax.models.families.family import Family, Wrapper

# All that these modules have.
FAMILIES: dict[str, Family] = {
    row.architecture: row
    for module in (llama, dense, gemma, gemma4, muse, hybrid, cohere)
    for row in vars(module).values()
    if isinstance(row, Family)
}
# Models of more than text, of which the text's part is served.
WRAPPERS: dict[str, Wrapper] = {
    wrapper.architecture: wrapper
    for wrapper in (
        *(*gemma4.GEMMA4_WRAPPERS, muse.MUSE_WRAPPER),
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
