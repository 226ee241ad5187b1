"""First contact with a GPU: does everything run, and is it right? Each phase leaves a JSON file,
written after every measurement, so that a run that is cut off leaves what it has measured.

    smoke     the device's rates; tiny float32 engines, one of each kind of model, with XLA's
              kernels and with ours
    kernels   the kernels that matter most at the shapes of Llama-3.1-8B: errors against float32,
              and times by name from a trace

How fast it is: `speed`, and under load `serving`. A dry run goes through the same at sizes for a
CPU; its times mean nothing.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from flexllm_jax.engine.sampling.params import SamplingParams
from flexllm_jax.experiments.gpu.engine import TOY_ENGINE, TOY_MODELS, MeasuredEngine, start
from flexllm_jax.experiments.gpu.kernels import kernel_cases
from flexllm_jax.experiments.gpu.measure import Notes, kernel_times, measure_roofline
from flexllm_jax.llm import LLM
from kernels_pallas.backend import XLA, Backend, select_backend
from kernels_pallas.cases import Case
from kernels_pallas.check import relative_error, widened

_CASES = (
    "ragged_paged_attention/llama-3.1-8b/tp1/decode-64x2048",
    "ragged_paged_attention/llama-3.1-8b/tp1/decode-8x8192",
    "ragged_paged_attention/llama-3.1-8b/tp1/prefill-8192",
    "ragged_paged_attention/llama-3.1-8b/tp1/chunk-1024-of-8192",
    "ragged_paged_attention/llama-3.1-8b/tp1/mixed-64-448",
    "ragged_paged_attention/llama-3.1-8b/tp1/mixed/page16",
    "attention_backward/llama-3.1-8b/tp1/last-1024-of-8192",
    "attention_backward/llama-3.1-8b/tp1/last-1024-of-8192/mosaic",
    "attention_backward/llama-3.1-8b/tp1/packed-512-of-4096",
    "attention_backward/llama-3.1-8b/tp1/packed-512-of-4096/mosaic",
    "gated_delta/qwen3.5-9b/tp1/decode-64",
    "gated_delta/qwen3.5-9b/tp1/mixed-64-448-512",
    "gated_delta/qwen3.5-9b/tp1/window-1024-backward",
    "grouped_lora/llama-3.1-8b/tp1/qkv/decode-256-of-64",
    "grouped_lora/llama-3.1-8b/tp1/gate_up/decode-256-of-64",
    "grouped_lora/llama-3.1-8b/tp1/down/prefill-4096-of-4",
    "grouped_lora/llama-3.1-8b/tp1/layer-64-of-4",
    "grouped_lora/llama-3.1-8b/tp1/layer-64-of-4/apart",
    "grouped_lora/llama-3.1-8b/tp1/layer-64-of-16",
    "grouped_lora/llama-3.1-8b/tp1/layer-64-of-16/apart",
    "grouped_lora/llama-3.1-8b/tp1/layer-2048-of-4",
    "grouped_lora/llama-3.1-8b/tp1/layer-2048-of-4/apart",
    "grouped_lora/llama-3.1-8b/tp1/qkv/train-1024-backward",
    "layer_passes/llama-3.1-8b/tp1/norm-1024-backward",
    "layer_passes/llama-3.1-8b/tp1/gated-1024-backward",
    "layer_passes/llama-3.1-8b/tp1/rotate-256",
)
SMOKE = tuple(TOY_MODELS)  # parts of the phase
# How our kernels' names begin.
_OURS = ("attention", "delta", "grouped_lora", "add_norm", "gated", "rotate", "write_rows")


# -- kernels ---------------------------------------------------------------------------------------


def kernels(notes: Notes, *, dry_run: bool, match: str = "") -> None:
    """Errors and times of a few calls of every kernel."""
    notes.add("rates", measure_roofline(dry_run=dry_run))
    backend = select_backend("pallas", jax.devices()[0])
    cases = essential_cases(match, dry_run=dry_run)
    cases = {name: case for name, case in cases.items() if backend.chip in case.chips}
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        compiled = {name: pool.submit(_compile, case, backend) for name, case in cases.items()}
        for name, case in cases.items():
            try:
                # This one gathers and sums in XLA, too; copies are of what the engine donates.
                whole = name.startswith("attention_backward")
                calls = 2 if dry_run else 10
                notes.add(name, _run_case(case, *compiled[name].result(), calls, whole=whole))
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


def _run_case(
    case: Case, make: Callable, call: Callable, expected: Callable, calls: int, *, whole: bool
) -> dict:
    """whole: all that runs is counted but copies, and not our kernels alone."""
    arguments = make(jax.random.key(1))
    error = relative_error(call(*arguments), expected(*arguments))
    times = kernel_times(lambda: call(*arguments), calls)
    ours = [
        time
        for name, (time, _) in times.items()
        if (not name.startswith("memcpy") if whole else name.startswith(_OURS))
    ]
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


def smoke(notes: Notes, cache_dir: Path, *, dry_run: bool, parts: Sequence[str] = SMOKE) -> None:
    """Rates, and tiny engines of each kind of model in `parts` with XLA's kernels and with ours:
    greedy tokens, losses of a job, tokens of the adapter it made."""
    notes.add("memory_stats", jax.devices()[0].memory_stats())
    notes.add("rates", measure_roofline(dry_run=dry_run))
    jax.config.update("jax_default_matmul_precision", "highest")
    for kind in parts:
        results, adapters = {}, {}
        for choice in ("xla", "auto"):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary)
                own = [f"compile.cache_dir={cache_dir}", "model.dtype=float32", f"kernels={choice}"]
                with start(folder, TOY_MODELS[kind], TOY_ENGINE, own) as llm:
                    engine = MeasuredEngine(llm, folder)
                    results[choice], adapters[choice] = _run_tiny(llm, engine)
                    notes.add(f"{kind}/kernels={choice}", results[choice])
        xla, ours = results["xla"], results["auto"]
        far = {
            name: np.abs(np.subtract(xla[name], ours[name])).max()
            for name in ("losses", "logprobs")
        }
        a, b = adapters.values()
        far["adapter, relative"] = np.linalg.norm(a - b) / np.linalg.norm(a)
        same = {name: xla[name] == ours[name] for name in ("tokens", "adapted")}
        notes.add(f"{kind}/agree", same | {name: float(value) for name, value in far.items()})


def _run_tiny(llm: LLM, engine: MeasuredEngine) -> tuple[dict[str, Any], np.ndarray]:
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
