"""One epoch over rows of unequal length: this engine, and Trainer with PEFT, padded and packed.

The epoch is cut into slices, which the three train in turn, so that a machine whose speed swings
does so for all. A slice counts from the call that starts the training to its return.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedTokenizerFast

from flexllm_jax.config import FinetuneConfig, OptimizerConfig, PeftConfig
from flexllm_jax.experiments.side_by_side.peft import save_random_model
from flexllm_jax.experiments.side_by_side.trainer import WithTrainer, make_tokenizer
from flexllm_jax.experiments.side_by_side.workload import EpochWorkload, TokenRow
from flexllm_jax.llm import LLM

OURS, PADDED, PACKED = "flexllm_jax", "Trainer, padded", "Trainer, packed"
NOT_COUNTED = -100


def make_model(path: Path, workload: EpochWorkload, texts: list[str]) -> None:
    """A random model, and a tokenizer that these texts were read for."""
    tokenizer = make_tokenizer(texts, workload.hf_config["vocab_size"])
    tokenizer.save_pretrained(path)
    save_random_model(path, workload.hf_config, "float32")


def read_rows(file: Path) -> list[tuple[str, str]]:
    """(question, answer) of every line. ValueError names the line without them."""
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if not {"question", "answer"} <= set(row):
            raise ValueError(f"{file}:{number}: needs `question` and `answer`; has {sorted(row)}")
        rows.append((f"Question: {row['question']}\nAnswer: ", row["answer"]))
    return rows


def tokenize(model: Path, texts: list[tuple[str, str]]) -> list[TokenRow]:
    """The same tokens for all; only those of the answer and the end count in the loss."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    rows: list[TokenRow] = []
    for question, answer in texts:
        before, after = tokenizer(question).input_ids, tokenizer(answer).input_ids
        after = [*after, tokenizer.eos_token_id]
        rows.append({"input_ids": before + after, "labels": [NOT_COUNTED] * len(before) + after})
    return rows


class WithEngine:
    """LoRA on all linear layers, AdamW, by this engine; a job for each slice."""

    def __init__(self, model: Path, out: Path, workload: EpochWorkload, longest: int):
        self.workload, self.out, self.jobs = workload, out, 0
        self.llm = LLM(
            model,
            max_model_len=longest,
            dtype="float32",
            scheduler={"max_tokens_per_step": workload.token_buckets[-1], "max_sequences": 4},
            compile={"token_buckets": workload.token_buckets},
            adapter_bank={"slots": 3, "max_rank": workload.rank},
            cache={"page_size": 16},
            finetune=workload.finetune,
            output_dir=str(out),
        )

    def train(self, rows: list[TokenRow]) -> tuple[float, float]:
        """One pass over the rows; returns (seconds, mean loss of its steps)."""
        self.jobs += 1
        name = f"slice{self.jobs}"
        dataset = self.out / f"{name}.jsonl"
        dataset.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        tokens = sum(len(row["input_ids"]) for row in rows)
        config = FinetuneConfig(
            name=name,
            dataset=dataset,
            format="tokenized",
            epochs=1,
            batch_tokens=round(self.workload.batch_rows * tokens / len(rows)),
            peft=PeftConfig(r=self.workload.rank, alpha=2 * self.workload.rank),
            optimizer=OptimizerConfig(lr=self.workload.lr, schedule="constant"),
            resume=False,
        )
        started = time.perf_counter()
        job = self.llm.finetune(config).wait()
        seconds = time.perf_counter() - started
        self.llm.unload_adapter(name)
        return seconds, sum(job.losses) / len(job.losses)


def compare_epoch(
    file: Path, out: Path, workload: EpochWorkload, slices: int, limit: int | None
) -> dict[str, Any]:
    """Train the epoch, slice by slice, with each in turn; prints each slice, returns everything."""
    model = out / "model"
    texts = read_rows(file)[:limit]
    make_model(model, workload, [part for text in texts for part in text])
    rows = tokenize(model, texts)
    lengths = [len(row["input_ids"]) for row in rows]
    trained = {
        OURS: WithEngine(model, out, workload, max(lengths)),
        PADDED: WithTrainer(model, out / "padded", workload, packed=False),
        PACKED: WithTrainer(model, out / "packed", workload, packed=True),
    }
    parts = [rows[i::slices] for i in range(slices)]
    for who in trained.values():
        who.train(rows[: workload.batch_rows])
    rates: dict[str, list[float]] = {name: [] for name in trained}
    seconds: dict[str, float] = dict.fromkeys(trained, 0.0)
    losses: dict[str, list[float]] = {name: [] for name in trained}
    for index, part in enumerate(parts):
        counted = sum(label != NOT_COUNTED for row in part for label in row["labels"])
        for name, who in trained.items():
            spent, loss = who.train(part)
            rates[name].append(counted / spent)
            losses[name].append(loss)
            seconds[name] += spent
        latest = {name: round(r[-1], 1) for name, r in rates.items()}
        print(f"slice {index + 1} of {slices}: {latest}", file=sys.stderr)
    ours = trained[OURS]
    assert isinstance(ours, WithEngine)
    ours.llm.close()
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "tokens_that_count": sum(label != NOT_COUNTED for r in rows for label in r["labels"]),
        "seconds": seconds,
        "counted_tokens_per_s": rates,
        "mean_loss": losses,
        "ratio": {
            name: median(a / b for a, b in zip(rates[OURS], rates[name], strict=True))
            for name in (PADDED, PACKED)
        },
    }
