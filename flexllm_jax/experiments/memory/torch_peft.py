"""What transformers + PEFT on torch keep for the backward, counted without allocating anything.

The model runs forward on torch's meta device, where nothing is computed, and every tensor that
autograd saves is counted once, parameters left out. Attention saves what flash attention does:
queries, keys, values, output and log-sum-exp. What the backward allocates on top is not counted.
This module needs torch and peft.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from flexllm_jax.experiments.memory.activations import BypassSection, MemorySection

Row = dict[str, Any]


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
    AttentionInterface.register("counted", _attention)
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


def count_cases(section: MemorySection) -> Iterator[Row]:
    """A row for each case and bypass of a memory experiment that PEFT has: LoRA and IA3."""
    for case in section.cases:
        for name in case.bypasses:
            bypass = section.bypasses[name]
            if bypass.kind in ("lora", "ia3"):
                held = kept_bytes(section.models[case.model], bypass, case.tokens)
                yield {"model": case.model, "tokens": case.tokens, "bypass": name, "bytes": held}
