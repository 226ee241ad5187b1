"""Measure the engine beside transformers + PEFT on this machine's CPU, in one run.

A small random Llama (33M parameters, float32): finetuning of LoRA rank 16 on all seven projections
with one 512-token sequence a step, decoding of 8 prompts of 128 tokens with 64 new tokens each, and
both at once (see `side_by_side.py`). Prints a table, writes `benchmark.json` and `benchmark.png`.
Ratios are medians over the rounds.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from rich.console import Console
from side_by_side import Workload, compare, plot, show

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
            "window": SEQUENCE // 2,
            "saved": "all",
            "idle_step_ms": 1000,
            "checkpoint_every": 0,
        },
    },
    targets={"finetune": 0.9, "decode": 2.0},
)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="finetuning steps a round")
    arguments = parser.parse_args()
    out: Path = arguments.out
    result = compare(WORKLOAD, out, arguments.rounds, arguments.steps)
    result["environment"] = {
        "machine": platform.machine(),
        "versions": {p: version(p) for p in ("jax", "flax", "torch", "transformers", "peft")},
    }
    console = Console()
    show(WORKLOAD, result, console)
    (out / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, out / "benchmark.png")
    console.print(f"written: {out / 'benchmark.json'}, {out / 'benchmark.png'}")


if __name__ == "__main__":
    main()
