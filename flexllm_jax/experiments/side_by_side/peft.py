"""Their side: transformers and PEFT on torch, which also makes the random model of both.

This module, `trainer` and `trl` alone need torch and peft.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from flexllm_jax.experiments.side_by_side.workload import FIRST_LETTER, TOKENS, Workload


def torch_device() -> str:
    """The device of their side."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_model(hf_config: dict, dtype: str) -> Any:
    """Random weights of a configuration, on their device."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**hf_config)
    with torch.device(torch_device()):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def save_random_model(path: Path, hf_config: dict, dtype: str) -> None:
    """`random_model` as a checkpoint, without a tokenizer."""
    random_model(hf_config, dtype).save_pretrained(path)


def lora_config(rank: int) -> LoraConfig:
    """LoRA as both sides train it."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def make_model(path: Path, workload: Workload) -> None:
    """A random model whose tokenizer has one letter per token id."""
    if (path / "tokenizer.json").exists():
        return
    save_random_model(path, workload.hf_config, workload.dtype)
    words = {chr(FIRST_LETTER + i): i for i in range(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=chr(FIRST_LETTER)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


class Theirs:
    """transformers and PEFT."""

    def __init__(self, model: Any, workload: Workload):
        """`model`: of transformers; what decodes and what trains have its weights in common."""
        self.workload = workload
        self.device = torch_device()
        self.base = model.to(self.device).eval()
        trains = copy.deepcopy(self.base, {id(weight): weight for weight in model.parameters()})
        self.peft = get_peft_model(trains, lora_config(workload.rank)).train()
        trained = [p for p in self.peft.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    @classmethod
    def load(cls, path: Path, workload: Workload) -> Theirs:
        """A checkpoint's."""
        dtype = getattr(torch, workload.dtype)
        return cls(AutoModelForCausalLM.from_pretrained(path, dtype=dtype), workload)

    def step(self, row: np.ndarray) -> None:
        """One optimizer step on one sequence."""
        tokens = torch.from_numpy(row)[None].to(self.device)
        self.peft(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.peft.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wait(self) -> None:
        """Until the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def finetune(self, rows: np.ndarray) -> float:
        """Tokens per second."""
        self.step(rows[0])
        self.wait()
        started = time.perf_counter()
        for row in rows:
            self.step(row)
        self.wait()
        return rows.size / (time.perf_counter() - started)

    def decode(self, prompts: np.ndarray) -> float:
        """Output tokens per second."""
        tokens = torch.from_numpy(prompts).to(self.device)
        started = time.perf_counter()
        with torch.no_grad():
            outputs = self.base.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=self.workload.new_tokens,
                min_new_tokens=self.workload.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        self.wait()
        seconds = time.perf_counter() - started
        return (outputs.shape[1] - tokens.shape[1]) * len(tokens) / seconds
