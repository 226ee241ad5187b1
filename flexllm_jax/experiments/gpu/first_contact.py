"""First contact with a GPU, in phases that each leave a JSON file, written after every measurement,
so that a run that is cut off leaves what it has measured.

    smoke     the device's rates; a tiny float32 engine with XLA's kernels and with ours
    kernels   the kernels that matter most at the shapes of Llama-3.1-8B: errors against float32,
              and times by name from a trace
    engine    a model of that shape with random weights: start-up by phase, decode, sampling,
              finetuning, both at once, and what the time goes to

No checkpoint and no torch are needed: weights are made on the device. A dry run goes through
the same at sizes for a CPU; its times mean nothing.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flexllm_jax.config import FinetuneConfig, OptimizerConfig, PeftConfig, build_config
from flexllm_jax.engine.cache import tree_bytes
from flexllm_jax.engine.sampling_params import SamplingParams
from flexllm_jax.experiments.gpu.kernels import kernel_cases
from flexllm_jax.experiments.gpu.llama_8b import HF_CONFIG
from flexllm_jax.experiments.gpu.measure import Notes, kernel_times, measure_roofline
from flexllm_jax.llm import LLM, JobHandle
from kernels_pallas.backend import XLA, Backend, select_backend
from kernels_pallas.cases import Case
from kernels_pallas.check import relative_error, widened

_WORDS = 4096  # of the tokenizer: a Chinese character each
_TOY_MODEL = {
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
_TOY_ENGINE = {
    "model": {"max_model_len": 256},
    "adapters": {"slots": 4, "max_rank": 16},
    "cache": {"page_size": 16, "num_pages": 64},
    "scheduler": {"max_tokens_per_step": 64, "max_sequences": 4, "slo": {"tpot_ms": 50.0}},
    "finetune": {"max_tokens": 128, "unit_tokens": 64, "checkpoint_every": 0},
    "compile": {"token_buckets": [8, 64]},
}
_ENGINE = {
    "model": {"max_model_len": 8192},
    "adapters": {"slots": 4, "max_rank": 16},
    "cache": {"page_size": 64, "memory_fraction": 0.85},
    "scheduler": {"max_tokens_per_step": 2048, "max_sequences": 64, "slo": {"tpot_ms": 50.0}},
    "finetune": {"max_tokens": 8192, "unit_tokens": 1024, "checkpoint_every": 0},
    "compile": {"token_buckets": [64, 512, 2048]},
}
_CASES = (
    "ragged_paged_attention/llama-3.1-8b/tp1/decode-64x2048",
    "ragged_paged_attention/llama-3.1-8b/tp1/decode-8x8192",
    "ragged_paged_attention/llama-3.1-8b/tp1/prefill-8192",
    "ragged_paged_attention/llama-3.1-8b/tp1/chunk-1024-of-8192",
    "ragged_paged_attention/llama-3.1-8b/tp1/mixed-64-448",
    "ragged_paged_attention/llama-3.1-8b/tp1/mixed/page16",
    "attention_backward/llama-3.1-8b/tp1/last-1024-of-8192",
    "attention_backward/llama-3.1-8b/tp1/packed-512-of-4096",
    "grouped_lora/llama-3.1-8b/tp1/qkv/decode-256-of-64",
    "grouped_lora/llama-3.1-8b/tp1/gate_up/decode-256-of-64",
    "grouped_lora/llama-3.1-8b/tp1/down/prefill-4096-of-4",
    "grouped_lora/llama-3.1-8b/tp1/qkv/train-1024-backward",
    "layer_passes/llama-3.1-8b/tp1/norm-1024-backward",
    "layer_passes/llama-3.1-8b/tp1/gated-1024-backward",
    "layer_passes/llama-3.1-8b/tp1/rotate-256",
)
_OURS = ("attention", "grouped_lora", "add_norm", "gated", "rotate")  # how our kernels' names begin


# -- kernels ---------------------------------------------------------------------------------------


def kernels(notes: Notes, *, dry_run: bool, match: str = "") -> None:
    """Errors and times of a few calls of every kernel."""
    notes.add("rates", measure_roofline(dry_run=dry_run))
    backend = select_backend("pallas", jax.devices()[0])
    cases = essential_cases(match, dry_run=dry_run)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        compiled = {name: pool.submit(_compile, case, backend) for name, case in cases.items()}
        for name, case in cases.items():
            try:
                notes.add(
                    name, _run_case(case, *compiled[name].result(), calls=2 if dry_run else 10)
                )
            except Exception as error:  # one that fails must not hide the others
                notes.add(name, {"failed": f"{type(error).__name__}: {error}"[:2000]})


def essential_cases(match: str, *, dry_run: bool) -> dict[str, Case]:
    """Those of `_CASES` whose name contains `match`, or the tiny ones of a dry run."""
    named = {f"{kernel}/{case.name}": case for kernel, case in kernel_cases("", dry_run=dry_run)}
    return {name: named[name] for name in (named if dry_run else _CASES) if match in name}


def _compile(case: Case, backend: Backend) -> tuple[Callable, Callable, Callable]:
    """Programs of a case: its arguments, the call, and the reference in float32."""
    shapes = jax.eval_shape(case.make, jax.random.key(0))
    with jax.default_matmul_precision("highest"):
        reference = jax.jit(lambda *arguments: case.function(*widened(arguments), backend=XLA))
        expected = reference.lower(*shapes).compile()
    call = jax.jit(partial(case.function, backend=backend)).lower(*shapes).compile()
    return jax.jit(case.make).lower(jax.random.key(0)).compile(), call, expected


def _run_case(case: Case, make: Callable, call: Callable, expected: Callable, calls: int) -> dict:
    arguments = make(jax.random.key(1))
    error = relative_error(call(*arguments), expected(*arguments))
    times = kernel_times(lambda: call(*arguments), calls)
    ours = [time for name, (time, _) in times.items() if name.startswith(_OURS)]
    us = sum(ours or [time for time, _ in times.values()])  # a case may have no kernel of ours
    speed = {"GB/s": case.bytes / us / 1e3, "TFLOP/s": case.flops / us / 1e6} if us else {}
    return {
        "error": error,
        "ok": error <= case.tolerance,
        "us": us,
        **speed,
        "bound": case.bound,
        "kernels": times,
    }


# -- engines ---------------------------------------------------------------------------------------


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


def _start(
    folder: Path, hf_config: dict[str, Any], sections: dict[str, dict], *changes: dict[str, Any]
) -> LLM:
    """An engine with random weights in a folder of its own."""
    path = str(write_model(folder / "model", hf_config))
    tree: dict[str, Any] = {"output_dir": str(folder / "runs")}
    for change in ({"model": {"path": path, "load_format": "dummy"}}, sections, *changes):
        for name, value in change.items():
            tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    return LLM.from_config(build_config(tree), progress=False)


class _Engine:
    """An engine under measurement: prompts and jobs of random tokens."""

    def __init__(self, llm: LLM, folder: Path):
        self.llm, self._folder, self._random = llm, folder, np.random.default_rng(0)

    def prompts(self, count: int, length: int) -> list[list[int]]:
        return self._random.integers(10, _WORDS, (count, length)).tolist()

    def job(self, name: str, steps: int, tokens: int, rows: int = 6, lr: float = 1e-4) -> JobHandle:
        """A job of sequences of `tokens`, one an optimizer step."""
        texts = ("".join(map(_word, row)) for row in self.prompts(rows, tokens))
        file = self._folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
        return self.llm.finetune(
            FinetuneConfig(
                name=name,
                dataset=file,
                format="text",
                steps=steps,
                batch_tokens=tokens,
                max_seq_len=tokens,
                train_on="all",
                peft=PeftConfig(r=16, alpha=32.0),
                optimizer=OptimizerConfig(lr=lr),
                resume=False,
            )
        )

    def decode(
        self, prompts: list[list[int]], new: int, adapter: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Decode `new` tokens of every prompt; medians of the steps that did nothing else but, at
        most, finetune."""
        engine, seen = self.llm.engine, len(self.llm.engine.host_seconds)
        params = SamplingParams(max_tokens=new, ignore_eos=True, **options)
        begun = time.perf_counter()
        outputs = self.llm.generate(prompts, params, adapter)
        wall = time.perf_counter() - begun
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
            "tpot_ms": median([o.tpot_s for o in outputs if o.tpot_s is not None]),
            "ttft_ms": median([o.ttft_s for o in outputs if o.ttft_s is not None]),
            "host_ms p50, p99": [1e3 * float(q) for q in np.percentile(host, [50, 99])],
            "wall_s": wall,
        }


def _tokens_per_s(times: Sequence[float], tokens: int) -> float | None:
    """From when optimizer steps of `tokens` each were done."""
    return tokens * (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None


def smoke(notes: Notes, cache_dir: Path, *, dry_run: bool) -> None:
    """Rates, and the same tiny engine with XLA's kernels and with ours: greedy tokens, losses of a
    job, tokens of the adapter it made."""
    notes.add("memory_stats", jax.devices()[0].memory_stats())
    notes.add("rates", measure_roofline(dry_run=dry_run))
    jax.config.update("jax_default_matmul_precision", "highest")
    results, adapters = {}, {}
    cache = {"compile": {"cache_dir": str(cache_dir)}}
    for choice in ("xla", "auto"):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            own = {"model": {"dtype": "float32"}, "kernels": choice}
            with _start(folder, HF_CONFIG | _TOY_MODEL, _TOY_ENGINE, cache, own) as llm:
                engine = _Engine(llm, folder)
                results[choice], adapters[choice] = _run_tiny(llm, engine)
                notes.add(f"tiny engine, kernels={choice}", results[choice])
    xla, ours = results["xla"], results["auto"]
    far = {
        name: np.abs(np.subtract(xla[name], ours[name])).max() for name in ("losses", "logprobs")
    }
    a, b = adapters.values()
    far["adapter, relative"] = np.linalg.norm(a - b) / np.linalg.norm(a)
    same = {name: xla[name] == ours[name] for name in ("tokens", "adapted")}
    notes.add("agree", same | {name: float(value) for name, value in far.items()})


def _run_tiny(llm: LLM, engine: _Engine) -> tuple[dict[str, Any], np.ndarray]:
    """What came of it, and the weights of the adapter."""
    prompts = engine.prompts(4, 40)
    greedy = SamplingParams(max_tokens=16, ignore_eos=True)
    base = llm.generate(prompts, greedy)
    job = engine.job("tiny", steps=4, tokens=64, lr=3e-3).wait()
    logprobs = SamplingParams(max_tokens=1, prompt_logprobs=0)
    adapted = llm.generate(prompts, greedy, adapter="tiny")
    if job.adapter_dir is None:
        raise RuntimeError(f"the tiny job made no adapter: {job.status}, {job.reason}")
    weights = load_file(str(job.adapter_dir / "adapter_model.safetensors"))
    flat = np.concatenate([weights[name].ravel() for name in sorted(weights)])
    return {
        "backend": str(llm.engine.runner.sizes.backend),
        "tokens": [o.token_ids for o in base],
        "losses": job.losses,
        "status": str(job.status),
        "adapted": [o.token_ids for o in adapted],
        "logprobs": [
            logprob
            for output in llm.generate(prompts, logprobs, adapter="tiny")
            for token in output.prompt_logprobs or ()
            for logprob in (token or {}).values()
        ],
        "start_s": llm.engine.start_seconds,
        "recompiles": llm.engine.runner.compilations.count,
    }, flat


def engine(notes: Notes, cache_dir: Path, *, dry_run: bool, saved: str = "attention") -> None:
    """Start-up, decode, sampling, finetuning, both at once, and where the time goes. `saved`: which
    activations finetuning keeps (`finetune.saved`)."""
    rates = measure_roofline(dry_run=dry_run)
    notes.add("rates", rates)
    own = {"compile": {"cache_dir": str(cache_dir)}, "finetune": {"saved": saved}}
    model, sections = (_TOY_MODEL, _TOY_ENGINE) if dry_run else ({}, _ENGINE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with _start(folder, HF_CONFIG | model, sections, own) as llm:
            _measure(notes, _Engine(llm, folder), rates["bytes_per_s"], dry_run)


def _measure(notes: Notes, engine: _Engine, bytes_per_s: float, dry_run: bool) -> None:
    llm = engine.llm
    runner, rows = llm.engine.runner, llm.config.scheduler.max_sequences
    device = jax.devices()[0]
    notes.add(
        "start",
        {
            "seconds": llm.engine.start_seconds | {"all": llm.engine.startup_s},
            "plan": runner.memory.describe(),
            "memory": device.memory_stats(),
        },
    )
    length, new = (32, 8) if dry_run else (2048, 64)
    prompts = engine.prompts(rows, length)
    first = SamplingParams(max_tokens=1, ignore_eos=True)
    begun = time.perf_counter()
    llm.generate(prompts, first)
    seconds = time.perf_counter() - begun
    notes.add("prefill", {"tokens": rows * length, "tokens_per_s": rows * length / seconds})

    # From here on the prompts are in the prefix cache: what follows hardly prefills.
    weights = tree_bytes(runner.params) - (
        0 if runner.model.head.tied else runner.params["embed"]["weight"].nbytes
    )
    kv_bytes = tree_bytes(runner.sizes.pages(1)) / runner.sizes.page_size
    for count in sorted({1, max(1, rows // 8), rows}):
        measured = engine.decode(prompts[:count], new)
        least = weights + count * (length + new / 2) * kv_bytes
        measured |= {"bytes": least, "floor_ms": 1e3 * least / bytes_per_s}
        notes.add(f"decode/{count}", measured)
    sampled = {
        "top_p": {"temperature": 0.8, "top_p": 0.9},
        "temperature": {"temperature": 1.0},
        "logprobs": {"temperature": 0.0, "logprobs": 5},
    }
    for name, options in sampled.items():
        notes.add(f"decode/{rows}/{name}", engine.decode(prompts, new // 2, **options))

    tokens = llm.config.finetune.max_tokens // 2
    for name, steps in (("warm", 2), ("alone", 3 if dry_run else 8)):
        job = engine.job(name, steps, tokens).wait()
        notes.add(
            f"finetune/{name}",
            {
                "status": str(job.status),
                "losses": job.losses,
                "tokens_per_s": _tokens_per_s(job.step_times, tokens),
            },
        )
    llm.generate(prompts, first, "alone")  # into the prefix cache
    notes.add(f"decode/{rows}/adapter", engine.decode(prompts, new, "alone"))
    llm.unload_adapter("alone")
    beside = engine.job("beside", 1000, tokens)
    begun = time.monotonic()
    measured = engine.decode(prompts, 3 * new)
    times = [t for t in beside.step_times if t > begun]
    notes.add(
        "decode and finetune",
        measured | {"steps": len(times), "finetune_tokens_per_s": _tokens_per_s(times, tokens)},
    )
    beside.cancel()
    beside.wait()
    notes.add("recompiles", runner.compilations.count)
    notes.add("memory", device.memory_stats())
    short = SamplingParams(max_tokens=16, ignore_eos=True)
    for own in (prompts[:1], prompts):
        trace = kernel_times(partial(llm.generate, own, short))
        notes.add(f"trace/decode/{len(own)} x 16", trace)
    notes.add("trace/finetune", kernel_times(lambda: engine.job("traced", 2, tokens).wait()))
