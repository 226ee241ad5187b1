"""The experiment on memory, counted by the CPU backend at a small size."""

import re

import pytest

from flexllm_jax.config import ConfigError
from flexllm_jax.engine.memory.activations import layer_graph, with_saved
from flexllm_jax.experiments.memory.activations import (
    STAGES,
    Compiler,
    MemorySection,
    held,
    make_sizes,
    measure,
)
from flexllm_jax.experiments.memory.report import conclusions, plot_memory
from kernels_pallas.backend import XLA

LAYERS, TOKENS, D, HEADS, KV_HEADS, HEAD_DIM = 3, 512, 64, 4, 2, 32
SECTION = MemorySection.model_validate(
    {
        "target": None,
        "bypasses": {"LoRA": {"kind": "lora", "r": 4, "target_modules": ["down_proj"]}},
        "models": {
            "small": {
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": 512,
                "hidden_size": D,
                "intermediate_size": 192,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS,
                "num_key_value_heads": KV_HEADS,
                "head_dim": HEAD_DIM,
                "max_position_embeddings": TOKENS,
                "tie_word_embeddings": False,
            }
        },
        "cases": [
            {
                "model": "small",
                "tokens": TOKENS,
                "unit_tokens": 64,
                "bypasses": ["LoRA"],
                "paper_bytes": {"LoRA": [4e6, 3e6, 2e6, 1e6]},
                "target_gb": 1e-3,
                "inference_tokens": 128,
                "target_saved": 0.1,
            }
        ],
    }
)
CASE = SECTION.cases[0]


@pytest.fixture(scope="module")
def rows():
    return list(measure(SECTION, CASE, Compiler.of(None)))


def test_every_stage_takes_less(rows):
    stages = rows[:-1]
    assert [row["stage"] for row in stages] == list(STAGES)
    sizes = [row["bytes"] for row in stages]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
    assert stages[2]["held"] == stages[3]["held"]
    assert stages[3]["recomputed_flops_per_token"] > 0


def test_what_is_held_is_what_was_asked_for(rows):
    """Layer inputs, the last output's gradient, keys and values with their gradients of one layer,
    and a float for each token."""
    kv = 2 * KV_HEADS * HEAD_DIM
    expected = TOKENS * (LAYERS * (2 * D + 2 * kv) + 2 * D + 4 * kv + 4)
    assert rows[3]["held"] == expected
    assert rows[3]["kv"] == rows[0]["kv"] == TOKENS * LAYERS * 2 * kv


@pytest.mark.parametrize(("stage", "arrays"), [(0, "kept"), (1, "needed")])
def test_without_optimization_it_is_what_the_trace_says(rows, stage, arrays):
    """XLA's count of a layer's outputs, against the arrays found in the trace."""
    bank = SECTION.bypasses["LoRA"].bank(SECTION.model("small"))
    model = SECTION.model("small")
    graph = layer_graph(make_sizes(model, bank, TOKENS, TOKENS, Compiler(None).backend))
    own = set(getattr(graph, arrays)) | {graph.input}
    assert rows[stage]["held"] == pytest.approx(LAYERS * graph.bytes_of(own), rel=0.02)


def test_everything_in_memory(rows):
    separate, ours = (rows[-1]["parts"][name] for name in ("separate", "co-serving"))
    assert separate["weights"] == separate["weights of the copy for inference"] == ours["weights"]
    assert ours["activations"] == rows[3]["bytes"]
    assert separate["activations"] == rows[0]["bytes"]


def test_targets_are_told(rows):
    first, second = conclusions(CASE, rows)
    told = r"small, 512 tokens, LoRA: 0\.0[01] GB with everything on, target 0\.001: NOT met"
    assert re.match(told, first)  # 0.01 GB with jax 0.10, 0.00 with 0.12
    assert second.endswith("target 10%: met")


def test_the_plot(rows, tmp_path):
    plot_memory(rows[:-1], tmp_path / "memory.png", "memory")
    assert (tmp_path / "memory.png").stat().st_size > 10_000


def test_a_target_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"memory\.target: .* does not exist; null"):
        Compiler.of(tmp_path / "x.txtpb")


def test_names_that_are_not_there():
    case = CASE.model_copy(update={"bypasses": ("IA4",)})
    with pytest.raises(ConfigError, match=r"'IA4' is not one of memory\.bypasses"):
        list(measure(SECTION, case, Compiler(None)))
    with pytest.raises(ConfigError, match=r"'huge' is not one of memory\.models"):
        SECTION.model("huge")


def test_a_hybrid_keeps_a_state_for_each_slice():
    """Beside its layers' inputs: states of its slots, and of the slices of a sequence."""
    key_heads, value_heads, dk, dv, kernel = 2, 4, 8, 16, 4
    hybrid = SECTION.models["small"] | {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 4,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": kernel,
        "linear_key_head_dim": dk,
        "linear_value_head_dim": dv,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
    }
    model = SECTION.model_copy(update={"models": {"hybrid": hybrid}}).model("hybrid")
    bank = SECTION.bypasses["LoRA"].bank(model)
    few, many = (
        with_saved(make_sizes(model, bank, tokens, 64, XLA), ()) for tokens in (TOKENS // 2, TOKENS)
    )
    channels = 2 * key_heads * dk + value_heads * dv
    slot = 3 * (4 * value_heads * dk * dv + 2 * (kernel - 1) * channels)
    kv = 2 * 2 * KV_HEADS * HEAD_DIM  # of the one layer that attends
    assert held(few)[1:] == (TOKENS // 2 * kv, slot * (1 + 2 + TOKENS // 2 // 64))
    assert held(many)[1:] == (TOKENS * kv, slot * (1 + 2 + TOKENS // 64))
    carried = 4 * (value_heads * dk * dv + (kernel - 1) * channels)  # what no token adds to
    fixed = 3 * slot + carried
    assert held(many)[0] - fixed == 2 * (held(few)[0] - fixed)
