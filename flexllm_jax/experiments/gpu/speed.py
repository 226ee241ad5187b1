"""How fast an engine at the shape of Llama-3.1-8B is on a GPU: start-up, decode, sampling, an
adapter, finetuning, both at once, and what the time goes to."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from flexllm_jax.engine.memory.cache import tree_bytes
from flexllm_jax.experiments.gpu.engine import (
    ENGINE,
    TOY_ENGINE,
    TOY_MODEL,
    MeasuredEngine,
    start,
    tokens_per_s,
)
from flexllm_jax.experiments.gpu.llama_8b import HF_CONFIG
from flexllm_jax.experiments.gpu.measure import Notes, kernel_times, measure_roofline

PARTS = ("decode", "sampling", "finetuning", "adapter", "both", "trace")


def engine(
    notes: Notes,
    cache_dir: Path,
    *,
    dry_run: bool,
    overrides: Sequence[str] = (),
    parts: Sequence[str] = PARTS,
) -> None:
    """Measure the `parts` of an engine; overrides: of its configuration, `a.b=c`."""
    rates = measure_roofline(dry_run=dry_run)
    notes.add("rates", rates)
    model, sections = (TOY_MODEL, TOY_ENGINE) if dry_run else (HF_CONFIG, ENGINE)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = [f"compile.cache_dir={cache_dir}", "finetune.saved=attention", *overrides]
        with start(folder, model, sections, own) as llm:
            Speed(notes, MeasuredEngine(llm, folder), rates["bytes_per_s"], dry_run).run(parts)


class Speed:
    """The measurements, in the order of `PARTS`."""

    def __init__(self, notes: Notes, engine: MeasuredEngine, bytes_per_s: float, dry_run: bool):
        self.notes, self.engine, self.llm = notes, engine, engine.llm
        self.bytes_per_s, self.dry_run = bytes_per_s, dry_run
        self.length, self.new = (32, 8) if dry_run else (2048, 64)
        self.rows = self.llm.config.scheduler.max_sequences
        self.tokens = self.llm.config.finetune.max_tokens // 2
        self.prompts = engine.prompts(self.rows, self.length)

    def run(self, parts: Sequence[str]) -> None:
        """Start-up and prefill, then the parts that are asked for."""
        llm, device = self.llm, jax.devices()[0]
        self.notes.add(
            "start",
            {
                "seconds": llm.engine.start_seconds | {"all": llm.engine.startup_s},
                "plan": llm.engine.runner.memory.describe(),
                "memory": device.memory_stats(),
            },
        )
        tokens = self.rows * self.length
        self.notes.add(
            "prefill", {"tokens": tokens, "tokens_per_s": self.engine.prefill(self.prompts)}
        )
        # From here on the prompts are in the prefix cache: what follows hardly prefills.
        for part in PARTS:
            if part in parts:
                getattr(self, part)()
        self.notes.add("recompiles", llm.engine.runner.compilations.count)
        self.notes.add("memory", device.memory_stats())

    def decode(self) -> None:
        """Steps of one row, an eighth of the rows, and all, beside the bytes that they read."""
        runner = self.llm.engine.runner
        weights = tree_bytes(runner.params)
        if not runner.model.head.tied:
            weights -= runner.params["embed"]["weight"].nbytes
        kv_bytes = runner.sizes.page_bytes / runner.sizes.page_size
        for count in sorted({1, max(1, self.rows // 8), self.rows}):
            measured = self.engine.decode(self.prompts[:count], self.new)
            least = weights + count * (self.length + self.new / 2) * kv_bytes
            measured |= {"bytes": least, "floor_ms": 1e3 * least / self.bytes_per_s}
            self.notes.add(f"decode/{count}", measured)

    def sampling(self) -> None:
        """The same, sampled in other ways than greedily."""
        sampled: dict[str, dict[str, Any]] = {
            "top_p": {"temperature": 0.8, "top_p": 0.9},
            "temperature": {"temperature": 1.0},
            "logprobs": {"temperature": 0.0, "logprobs": 5},
        }
        for name, options in sampled.items():
            measured = self.engine.decode(self.prompts, self.new // 2, **options)
            self.notes.add(f"decode/{self.rows}/{name}", measured)

    def finetuning(self) -> None:
        """A job alone."""
        for name, steps in (("warm", 2), ("alone", 3 if self.dry_run else 8)):
            job = self.engine.job(name, steps, self.tokens).wait()
            noted = {"status": str(job.status), "losses": job.losses}
            noted["tokens_per_s"] = tokens_per_s(job.step_times, self.tokens)
            self.notes.add(f"finetune/{name}", noted)
            self.llm.unload_adapter(name)

    def adapter(self) -> None:
        """Decode with an adapter."""
        self.engine.job("adapter", 1, self.tokens).wait()
        self.engine.decode(self.prompts, 1, ["adapter"])  # into the prefix cache
        for count in (1, self.rows):
            measured = self.engine.decode(self.prompts[:count], self.new, ["adapter"])
            self.notes.add(f"decode/{count}/adapter", measured)
        self.llm.unload_adapter("adapter")

    def both(self) -> None:
        """Decode beside a job."""
        job = self.engine.job("beside", 1000, self.tokens)
        begun = time.monotonic()
        measured = self.engine.decode(self.prompts, 3 * self.new)
        times = [t for t in job.step_times if t > begun]
        measured |= {"steps": len(times), "finetune_tokens_per_s": tokens_per_s(times, self.tokens)}
        self.notes.add("decode and finetune", measured)
        job.cancel()
        job.wait()

    def trace(self) -> None:
        """Kernels by name."""
        for own in (self.prompts[:1], self.prompts):
            trace = kernel_times(partial(self.engine.decode, own, 16))
            self.notes.add(f"trace/decode/{len(own)} x 16", trace)
        job = partial(self.engine.job, "traced", 2, self.tokens)
        self.notes.add("trace/finetune", kernel_times(lambda: job().wait()))
