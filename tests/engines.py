"""Engines for tests: one small configuration, so that all of them find their programs in the cache;
and what transformers and PEFT say about the same models."""

import json
import signal
import socket
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from transformers import AutoConfig

from flexllm_jax import LLM, FinetuneConfig
from flexllm_jax.engine.loop import RequestFuture
from flexllm_jax.finetune.job import FinetuneJob

COMPILE_CACHE = Path(__file__).resolve().parents[1] / ".pytest_cache" / "xla"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Names in the parameter tree, written out by hand.
SHORT: dict[str, str] = dict(zip(SEVEN, ("q", "k", "v", "o", "gate", "up", "down"), strict=True))

_started: weakref.WeakSet[LLM] = weakref.WeakSet()


def start_engine(path: Path, output_dir: Path, **changes: Any) -> LLM:
    """The small configuration; `changes` replace fields within its sections, or top-level ones."""
    fields: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 160,
        "cache": {"page_size": 8, "num_pages": 48},
        "scheduler": {
            "max_tokens_per_step": 48,
            "max_sequences": 6,
            "slo": {"tpot_ms": 25.0, "ttft_ms": 500.0},
        },
        "finetune": {
            "max_tokens": 96,
            "unit_tokens": 32,
            "checkpoint_every": 4,
            "idle_step_ms": float("inf"),
        },
        "compile": {"token_buckets": [8, 48], "cache_dir": str(COMPILE_CACHE)},
        "adapter_bank": {"slots": 6, "max_rank": 8},
        "output_dir": str(output_dir),
    }
    for name, value in changes.items():
        fields[name] = fields.get(name, {}) | value if isinstance(value, dict) else value
    llm = LLM(path, progress=False, **fields)
    _started.add(llm)
    return llm


@contextmanager
def given_back() -> Iterator[None]:
    """Whatever happens inside, the engines of `start_engine` end as they were: jobs and requests
    that were added are stopped, adapters that were added are unloaded."""
    before = {llm: (set(llm.adapters), _unfinished(llm)) for llm in _started if llm.alive}
    try:
        yield
    finally:
        for llm in [llm for llm in _started if llm.alive]:
            adapters, unfinished = before.get(llm, (set(), []))
            llm._loop.call(_stop_others, llm, unfinished)
            for name in set(llm.adapters) - adapters:
                llm.unload_adapter(name)


def _unfinished(llm: LLM) -> list[FinetuneJob | RequestFuture]:
    def read() -> list[FinetuneJob | RequestFuture]:
        jobs = [job for job in llm.engine.trainer.jobs.values() if job.running]
        return [*jobs, *llm._loop._waiting.values()]

    return llm._loop.call(read)


def _stop_others(llm: LLM, kept: list[FinetuneJob | RequestFuture]) -> None:
    kept_ids = set(map(id, kept))
    for job in llm.engine.trainer.jobs.values():
        if job.running and id(job) not in kept_ids:
            llm.engine.trainer.cancel(job)
    for future in list(llm._loop._waiting.values()):
        if id(future) not in kept_ids:
            llm._loop.drop(future, "the test that sent it has ended")


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def random_prompts(lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    """Prompts of letters, as token ids of the byte-level tokenizer."""
    random = np.random.default_rng(seed)
    return [random.integers(3, 200, length).tolist() for length in lengths]


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def letter_rows(count: int, longest: int = 60, seed: int = 0) -> list[dict]:
    """Rows with odd lengths whose completion follows from the prompt."""
    random = np.random.default_rng(seed)
    letters = list("abcdefghijklmnop ")
    rows = []
    for _ in range(count):
        prompt = random.choice(letters[:-1])  # a completion of spaces alone is skipped
        prompt += "".join(random.choice(letters, random.integers(0, longest // 2 - 1)))
        completion = (prompt.upper() * 3)[: random.integers(1, longest // 2)]
        rows.append({"prompt": prompt, "completion": completion})
    return rows


def job_config(name: str, dataset: Path, **fields: Any) -> FinetuneConfig:
    """A job of a few small batches; starts anew unless told to resume."""
    defaults = {
        "batch_tokens": 150,
        "steps": 6,
        "resume": False,
        "peft": {"r": 4, "alpha": 8.0},
        "optimizer": {"lr": 1e-2},
    }
    return FinetuneConfig(name=name, dataset=dataset, **(defaults | fields))


# -- what others say ---------------------------------------------------------------------------


def load_base(path: Path, dtype: torch.dtype, **options: Any) -> Any:
    """A checkpoint in the class that its configuration names."""
    names = AutoConfig.from_pretrained(path).architectures or [""]
    return getattr(transformers, names[0]).from_pretrained(path, dtype=dtype, **options)


def save_random_adapter(base: Path, path: Path, seed: int = 0, **options: Any) -> Path:
    """A PEFT adapter with random A and B, written by peft."""
    torch.manual_seed(seed)
    options = {"target_modules": list(SEVEN), "r": 4, "lora_alpha": 8} | options
    model = load_base(base, torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(str(path))
    return path


def load_with_adapter(base: Path, adapter: Path, dtype: torch.dtype = torch.float32, **options):
    """The base model with an adapter, in peft."""
    model = load_base(base, dtype)
    return peft.PeftModel.from_pretrained(model, str(adapter), **options).to(dtype).eval()


def reference_logits(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """Logits after every token [T, V], float64."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)])).logits[0].double().numpy()


def reference_logprobs(model: Any, tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities of what follows every token [T, V]."""
    logits = reference_logits(model, tokens)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reference_greedy(model: Any, prompt: Sequence[int], count: int, **options: Any) -> list[int]:
    """Greedy tokens, end-of-sequence ignored."""
    return list(_greedy(model, tuple(prompt), count, tuple(sorted(options.items()))))


@cache
def _greedy(model: Any, prompt: tuple[int, ...], count: int, options: tuple) -> tuple[int, ...]:
    output = model.generate(
        input_ids=torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **dict(options),
    )
    return tuple(output[0, len(prompt) :].tolist())


def prompt_logprob_errors(output: Any, expected: np.ndarray) -> np.ndarray:
    """Difference of every reported prompt log-probability from `expected` [T, V]; checks that all
    positions are reported, each with its own token and its most likely ones."""
    tokens, reported = output.prompt_token_ids, output.prompt_logprobs
    assert len(reported) == len(tokens)
    assert reported[0] is None
    errors = []
    for i, logprobs in enumerate(reported[1:]):
        assert tokens[i + 1] in logprobs
        best = np.argsort(-expected[i])[: max(1, len(logprobs) - 2)]
        assert set(best[:3].tolist()) <= logprobs.keys()
        errors += [abs(value - expected[i, token]) for token, value in logprobs.items()]
    return np.array(errors)


def heed_interrupts() -> None:
    """For `preexec_fn`: a shell that started the tests in the background made all ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
