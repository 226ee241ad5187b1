"""An engine under measurement on a GPU: random weights, prompts and jobs of random tokens, so that
neither a checkpoint nor data is needed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexllm_jax.config import FinetuneConfig, OptimizerConfig, PeftConfig, load_config
from flexllm_jax.engine.loop import NewRequest
from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.experiments.gpu.llama_8b import HF_CONFIG
from flexllm_jax.llm import LLM, JobHandle

_WORDS = 4096  # of the tokenizer: a Chinese character each

TOY_MODEL = HF_CONFIG | {
    "vocab_size": _WORDS,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# One of each kind of layers: what a GPU has to agree with XLA's kernels about.
TOY_MODELS = {
    "dense": TOY_MODEL,
    "sliding": {name: value for name, value in TOY_MODEL.items() if name != "hidden_act"}
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_scaling": None,
        "sliding_window": 32,
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "hybrid": TOY_MODEL
    | {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 4,
        "rope_scaling": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
        },
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
}
TOY_ENGINE = {
    "model": {"max_model_len": 256},
    "adapters": {"slots": 8, "max_rank": 16},
    "cache": {"page_size": 16, "num_pages": 64},
    "scheduler": {"max_tokens_per_step": 64, "max_sequences": 4, "slo": {"tpot_ms": 50.0}},
    "finetune": {"max_tokens": 128, "unit_tokens": 64, "checkpoint_every": 0},
    "compile": {"token_buckets": [8, 64]},
}
ENGINE = {
    "model": {"max_model_len": 8192},
    "adapters": {"slots": 4, "max_rank": 16},
    "cache": {"page_size": 64, "memory_fraction": 0.85},
    "scheduler": {"max_tokens_per_step": 2048, "max_sequences": 64, "slo": {"tpot_ms": 50.0}},
    "finetune": {"max_tokens": 8192, "unit_tokens": 1024, "checkpoint_every": 0},
    "compile": {"token_buckets": [64, 512, 2048]},
}


def start(
    folder: Path, hf_config: dict[str, Any], config: dict[str, Any] | Path, overrides: Sequence[str]
) -> LLM:
    """An engine with random weights, of a configuration's sections or file and `a.b=c` on top."""
    path = write_model(folder / "model", hf_config)
    if isinstance(config, dict):
        file = folder / "engine.yaml"
        file.write_text(json.dumps(config), encoding="utf-8")  # which is YAML
        config = file
    own = (f"model.path={path}", "model.load_format=dummy", f"output_dir={folder / 'runs'}")
    return LLM.from_config(load_config(config, (*overrides, *own)), progress=False)


def write_model(folder: Path, hf_config: dict[str, Any]) -> Path:
    """A folder that an engine with random weights starts from: `config.json` and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config), encoding="utf-8")
    words = {_word(token): token for token in range(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=_word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def _word(token: int) -> str:
    return chr(0x4E00 + token)


def tokens_per_s(times: Sequence[float], tokens: int) -> float | None:
    """From when optimizer steps of `tokens` each were done."""
    return tokens * (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None


class MeasuredEngine:
    """An engine, and what is asked of it."""

    def __init__(self, llm: LLM, folder: Path):
        """`folder` takes the datasets."""
        self.llm, self._folder, self._random = llm, folder, np.random.default_rng(0)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random tokens."""
        return self._random.integers(10, _WORDS, (count, length)).tolist()

    def job_config(
        self, name: str, steps: int, tokens: int, rows: int = 6, lr: float = 1e-4, **fields: Any
    ) -> FinetuneConfig:
        """A job of LoRA 16 on sequences of `tokens`, one an optimizer step."""
        texts = ("".join(map(_word, row)) for row in self.prompts(rows, tokens))
        file = self._folder / f"{name}.jsonl"
        field = "prompt" if "method" in fields else "text"
        file.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), "utf-8")
        supervised = {"format": "text", "batch_tokens": tokens, "train_on": "all"}
        return FinetuneConfig.model_validate(
            {
                "name": name,
                "dataset": file,
                "steps": steps,
                "max_seq_len": tokens,
                "peft": PeftConfig(r=16, alpha=32.0),
                "optimizer": OptimizerConfig(lr=lr),
                "resume": False,
            }
            | (fields if "method" in fields else supervised | fields)
        )

    def job(self, name: str, steps: int, tokens: int, **options: Any) -> JobHandle:
        """`job_config`, started."""
        return self.llm.finetune(self.job_config(name, steps, tokens, **options))

    def decode(
        self,
        prompts: list[list[int]],
        new: int,
        adapters: Sequence[str] = (),
        **options: Any,
    ) -> dict[str, Any]:
        """Decode `new` tokens of every prompt, prompt i with adapter i modulo their number; medians
        of the steps that did nothing else but, at most, finetune."""
        engine, seen = self.llm.engine, len(self.llm.engine.host_seconds)
        params = SamplingParams(max_tokens=new, ignore_eos=True, **options)
        arrival = time.monotonic()
        names = [adapters[i % len(adapters)] if adapters else None for i in range(len(prompts))]
        requests = [
            NewRequest(tuple(prompt), params, name, arrival)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        timings = [f.result().timing for f in self.llm.submit_all(requests)]
        wall = time.monotonic() - arrival
        host = list(engine.host_seconds)[seen:]
        steps = [
            step
            for step in list(engine.observations)[-len(host) :]
            if step.decode_tokens == len(prompts) and not step.prefill_tokens
        ]

        def median(values: Sequence[float]) -> float | None:
            return 1e3 * float(np.median(values)) if values else None

        return {
            "steps": len(steps),
            "step_ms": median([step.measured_s for step in steps]),
            "predicted_ms": median([step.predicted_s for step in steps]),
            "tpot_ms": median([t.tpot_s for t in timings if t.tpot_s is not None]),
            "ttft_ms": median([t.ttft_s for t in timings if t.ttft_s is not None]),
            "host_ms p50, p99": [1e3 * float(q) for q in np.percentile(host, [50, 99])],
            "wall_s": wall,
        }

    def prefill(self, prompts: list[list[int]], adapters: Sequence[str] = ()) -> float:
        """Tokens/s of prompts that no cache has, each with a token of output."""
        wall_s = self.decode(prompts, 1, adapters)["wall_s"]
        return sum(map(len, prompts)) / wall_s
