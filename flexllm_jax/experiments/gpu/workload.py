"""What the GPU suite does with the engine beside transformers + PEFT: a model of 8B parameters.

Weights are random; a dry run has a toy of the same family instead.
"""

from flexllm_jax.experiments.gpu.llama_8b import HF_CONFIG
from flexllm_jax.experiments.side_by_side.workload import Workload

_TOY = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def engine_workload(*, dry_run: bool) -> Workload:
    """An 8B-sized random Llama in bfloat16; a toy in a dry run."""
    if dry_run:
        return Workload(
            title="toy Llama, float32 (dry run)",
            hf_config=HF_CONFIG | _TOY,
            dtype="float32",
            sequence=64,
            prompts=2,
            prompt=16,
            new_tokens=8,
            rank=8,
            tpot_ms=1000.0,
            token_buckets=[8, 64],
            engine={
                "cache": {"page_size": 16},
                "finetune": {"max_tokens": 64, "unit_tokens": 32, "checkpoint_every": 0},
            },
        )
    return Workload(
        title="8B-parameter Llama, bfloat16",
        hf_config=HF_CONFIG,
        dtype="bfloat16",
        sequence=4096,
        prompts=64,
        prompt=512,
        new_tokens=128,
        rank=16,
        tpot_ms=50.0,
        token_buckets=[64, 512, 2048],
        engine={
            "cache": {"page_size": 64, "memory_fraction": 0.45},
            "finetune": {"max_tokens": 8192, "unit_tokens": 1024, "checkpoint_every": 0},
        },
    )
