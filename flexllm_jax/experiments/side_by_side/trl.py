"""Their side of learning from rewards: TRL's GRPOTrainer with PEFT, transformers' generation.

TRL is no dependency of anything else: its extra is `trl`.
"""

# pyright: reportMissingImports=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from flexllm_jax.experiments.side_by_side.answers import (
    CLIP,
    FACTS,
    AnswerTask,
    Curve,
    ScoredBatch,
    read_prompts,
    reward_of,
)
from flexllm_jax.experiments.side_by_side.peft import lora_config


class WithTrl:
    """GRPOTrainer. threads: of PyTorch; None leaves them as they are."""

    def __init__(self, task: AnswerTask, out: Path, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(threads)
        self.task, self.out = task, out
        rows = read_prompts(task.rows)
        self.data = Dataset.from_list(
            [{"prompt": r["messages"], **{f: r[f] for f in FACTS}} for r in rows]
        )
        self.tokenizer = AutoTokenizer.from_pretrained(task.model)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.first: ScoredBatch | None = None

    def train(self, seed: int) -> Curve:
        """A run with a fresh adapter. Loading the model does not count."""
        task, watch = self.task, _Watch()
        config = GRPOConfig(
            output_dir=str(self.out / "trl"),
            per_device_train_batch_size=task.answers,
            num_generations=task.generations,
            max_completion_length=task.max_tokens,
            learning_rate=task.lr,
            lr_scheduler_type="constant",
            max_steps=task.steps,
            beta=0.0,
            epsilon=CLIP[1] - 1,
            scale_rewards="group",
            loss_type="dapo",
            temperature=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            disable_tqdm=True,
            seed=seed,
        )
        trainer = _Recording(
            model=str(task.model),
            reward_funcs=_rewards,
            args=config,
            train_dataset=self.data,
            processing_class=self.tokenizer,
            peft_config=lora_config(task.rank),
            callbacks=[watch],
        )
        trainer.pop_callback(_printer())
        watch.began = time.perf_counter()
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "reward" in entry]
        if self.first is None:
            self.first = trainer.first_batch(task.generations)
        return Curve(
            watch.ends_s,
            [entry["reward"] for entry in logs],
            sum(entry["completions/mean_length"] for entry in logs) * task.answers,
        )


class _Watch(TrainerCallback):
    """When every step ended."""

    def __init__(self) -> None:
        self.began, self.ends_s = 0.0, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends_s.append(time.perf_counter() - self.began)


class _Recording(GRPOTrainer):
    """Keeps what its first step was computed from, and came to."""

    seen: dict[str, Any] | None = None
    seen_rewards: Any = None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        rewards = super()._calculate_rewards(*args, **kwargs)
        if self.seen_rewards is None:
            self.seen_rewards = rewards.detach().clone()
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        scored = super()._generate_and_score_completions(inputs)
        if self.seen is None:  # before it is shuffled
            self.seen = {name: value for name, value in scored.items() if value is not None}
        return scored

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        if self.seen is not None and "loss" not in self.seen:
            self.seen["loss"] = float(loss)
            with torch.no_grad():
                ids, mask = (
                    torch.cat([self.seen[f"{part}_{kind}"] for part in ("prompt", "completion")], 1)
                    for kind in ("ids", "mask")
                )
                keep = self.seen["completion_ids"].size(1)
                self.seen["logprobs"] = self._get_per_token_logps_and_entropies(
                    model, ids, mask, keep
                )[0]
        return loss

    def first_batch(self, generations: int) -> ScoredBatch:
        """What its first step was, as numpy."""
        assert self.seen is not None
        seen = {
            name: value.detach().cpu().numpy()
            for name, value in self.seen.items()
            if isinstance(value, torch.Tensor)
        }
        asked, said = seen["prompt_mask"].astype(bool), seen["completion_mask"].astype(bool)
        return ScoredBatch(
            rewards=np.asarray(self.seen_rewards).reshape(-1, generations),
            prompts=[i[m].tolist() for i, m in zip(seen["prompt_ids"], asked, strict=True)],
            answers=[i[m].tolist() for i, m in zip(seen["completion_ids"], said, strict=True)],
            logprobs=[p[m] for p, m in zip(seen["logprobs"], said, strict=True)],
            advantages=seen["advantages"],
            loss=self.seen["loss"],
        )


def _rewards(completions: Any, **facts: Any) -> list[float]:
    rows = ({name: facts[name][i] for name in FACTS} for i in range(len(completions)))
    return [reward_of(c[0]["content"], row) for c, row in zip(completions, rows, strict=True)]


def _printer() -> Any:
    from transformers import PrinterCallback

    return PrinterCallback
