"""What `make bench` compares on a CPU: a random Llama of 33M parameters in float32."""

from flexllm_jax.experiments.side_by_side.workload import EpochWorkload, Workload

SEQUENCE = 512
WORKLOAD = Workload(
    title="33M-parameter Llama, float32",
    hf_config={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    dtype="float32",
    sequence=SEQUENCE,
    prompts=8,
    prompt=128,
    new_tokens=64,
    rank=16,
    tpot_ms=250.0,
    token_buckets=[8, 128, SEQUENCE],
    engine={
        "cache": {"page_size": 16},
        "finetune": {
            "max_tokens": SEQUENCE,
            "unit_tokens": SEQUENCE // 2,
            "saved": "all",
            "idle_step_ms": 1000,
            "checkpoint_every": 0,
        },
    },
    targets={"finetune": 0.9, "decode": 2.0},
)
EPOCH = EpochWorkload(
    title=f"{WORKLOAD.title}: one epoch of LoRA",
    hf_config=WORKLOAD.hf_config,
    batch_rows=8,  # Trainer's default
    rank=WORKLOAD.rank,
    lr=2e-4,
    token_buckets=[8, 256],
    finetune={
        "max_tokens": 2048,
        "unit_tokens": 512,
        "saved": "all",
        "idle_step_ms": 10_000,
        "checkpoint_every": 0,
    },
)
