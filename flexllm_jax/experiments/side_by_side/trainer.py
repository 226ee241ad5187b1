"""Their side of an epoch: transformers' Trainer with PEFT, padding rows or packing them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from flexllm_jax.experiments.side_by_side.peft import lora_config
from flexllm_jax.experiments.side_by_side.workload import EpochWorkload, TokenRow


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts, which ends a sequence with `<eos>`."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocabulary, special_tokens=["<pad>", "<eos>"], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


class WithTrainer:
    """LoRA on all linear layers, AdamW, by `Trainer`.

    packed: the rows of a batch one after the other in one sequence with positions of their own,
    which keep attention apart; else padded to the longest of the batch, which is the default.
    """

    def __init__(self, model: Path, out: Path, workload: EpochWorkload, packed: bool):
        self.model, self.workload = model, workload
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
        self.collator: Any = (
            DataCollatorWithFlattening() if packed else DataCollatorForSeq2Seq(tokenizer)
        )
        self.out = out

    def train(self, rows: list[TokenRow]) -> tuple[float, float]:
        """One pass over the rows with a fresh adapter; returns (seconds, mean loss of its steps).
        Loading the model does not count."""
        base = AutoModelForCausalLM.from_pretrained(self.model, attn_implementation="sdpa")
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(self.out),
            per_device_train_batch_size=self.workload.batch_rows,
            num_train_epochs=1,
            learning_rate=self.workload.lr,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model=get_peft_model(base, lora_config(self.workload.rank)),
            args=arguments,
            train_dataset=list(rows),  # pyright: ignore[reportArgumentType]
            data_collator=self.collator,
        )
        started = time.perf_counter()
        result = trainer.train()
        return time.perf_counter() - started, result.training_loss
