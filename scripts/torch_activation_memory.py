"""What transformers + PEFT on torch keep for the backward, for the cases of a memory experiment.

The model runs forward on torch's meta device, where nothing is allocated and nothing computed, and
every tensor that autograd saves is counted once, parameters left out. Attention saves what flash
attention does: queries, keys, values, output and log-sum-exp. What the backward allocates on top is
not counted. PEFT has no bottleneck adapters: those are left out.
"""

import argparse
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from flexllm_jax.config import ConfigError, load_config
from flexllm_jax.config.cli import run_script
from flexllm_jax.experiments.activation_memory import BypassSection
from flexllm_jax.experiments.benchmark import BenchmarkConfig


class _FlashAttention(torch.autograd.Function):
    """Saves what flash attention saves."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        return out


def _attention(module: Any, q: Any, k: Any, v: Any, mask: Any, **_: Any) -> tuple[Any, None]:
    out: Any = _FlashAttention.apply(q, k, v)
    return out.transpose(1, 2), None


def kept_bytes(hf_config: dict[str, Any], bypass: BypassSection, tokens: int) -> int:
    """Bytes that autograd holds after the forward of `tokens` tokens and their loss."""
    fields = {k: v for k, v in hf_config.items() if k not in ("architectures", "model_type")}
    config = AutoConfig.for_model(hf_config["model_type"], **fields, use_cache=False)
    config._attn_implementation = "counted"
    modules: list[str] = list(bypass.target_modules)
    adapter = {
        "lora": peft.LoraConfig(r=bypass.r, lora_dropout=0.0, target_modules=modules),
        "ia3": peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
    }[bypass.kind]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model: Any = peft.get_peft_model(model, adapter)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, Any] = {}  # keeps the storages alive: an address then means one of them

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage
        return tensor

    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=ids, labels=ids)
    return sum(storage.nbytes() for storage in saved.values())


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="a memory experiment")
    arguments = parser.parse_args()
    section = load_config(arguments.config, [], BenchmarkConfig).memory
    if section is None:
        raise ConfigError(f"{arguments.config}: it has no section `memory`; give one that has")
    AttentionInterface.register("counted", _attention)
    table = Table(title="kept by transformers + PEFT on torch, GB")
    for column in ("model", "tokens", "bypass", "GB"):
        table.add_column(column, justify="right" if column in ("tokens", "GB") else "left")
    for case in section.cases:
        for name in case.bypasses:
            bypass = section.bypasses[name]
            if bypass.kind in ("lora", "ia3"):
                held = kept_bytes(section.models[case.model], bypass, case.tokens)
                table.add_row(case.model, f"{case.tokens:,}", name, f"{held / 1e9:.1f}")
    Console(width=100).print(table)
    return 0


if __name__ == "__main__":
    run_script(main)
