"""What torch is counted to keep grows as it must: nothing is quadratic in the tokens."""

import pytest

from flexllm_jax.experiments.memory.activations import BypassSection, MemorySection
from flexllm_jax.experiments.memory.torch_peft import count_cases, kept_bytes

D, F, VOCABULARY = 64, 160, 512
CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": F,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
LORA = BypassSection(kind="lora", r=4, target_modules=("down_proj",))


def kept(layers: int, tokens: int) -> int:
    return kept_bytes(CONFIG | {"num_hidden_layers": layers}, LORA, tokens)


def test_it_is_linear_in_tokens_and_in_layers() -> None:
    of_256, of_512 = (kept(2, tokens) for tokens in (256, 512))
    assert of_512 == pytest.approx(2 * of_256, rel=1e-3)
    assert kept(4, 256) - kept(3, 256) == kept(3, 256) - of_256


def test_a_layer_keeps_at_least_what_its_products_need() -> None:
    """In bfloat16: q, k, v and the attention's output, and the MLP's three hidden arrays."""
    a_layer = kept(3, 256) - kept(2, 256)
    least = 256 * 2 * (D + 2 * D // 2 + D + 3 * F)
    assert least < a_layer < 6 * least


def test_what_peft_has_not_is_left_out() -> None:
    section = MemorySection.model_validate(
        {
            "target": None,
            "models": {"small": CONFIG | {"num_hidden_layers": 1}},
            "bypasses": {"LoRA": LORA.model_dump(), "bottleneck": {"kind": "bottleneck"}},
            "cases": [
                {
                    "model": "small",
                    "tokens": 128,
                    "unit_tokens": 64,
                    "bypasses": ["LoRA", "bottleneck"],
                }
            ],
        }
    )
    (row,) = count_cases(section)
    assert (row["model"], row["tokens"], row["bypass"]) == ("small", 128, "LoRA")
    assert row["bytes"] == kept(1, 128)
