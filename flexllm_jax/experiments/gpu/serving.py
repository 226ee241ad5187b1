"""An engine of a configuration under load on a GPU, with random weights: many adapters at once, a
trace of requests beside a job at several rates, and answers beside training."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flexllm_jax.config import (
    Config,
    ConfigError,
    ReinforcementConfig,
    WorkloadSection,
    load_config,
)
from flexllm_jax.experiments.gpu.engine import (
    TOY_ENGINE,
    TOY_MODEL,
    MeasuredEngine,
    start,
    tokens_per_s,
)
from flexllm_jax.experiments.gpu.measure import Notes
from flexllm_jax.experiments.gpu.workload import engine_workload
from flexllm_jax.experiments.planning.make import choose_requests
from flexllm_jax.experiments.simulation.report import figures
from flexllm_jax.experiments.simulation.simulate import at_rate
from flexllm_jax.launch.replay import Replay, ReplayRequest
from scheduler.simulation.workload import Arrival
from scheduler.slo import summarize

PARTS = ("generate", "finetuning", "traces", "adapters", "rollouts")
_BATCH = 4  # sequences of an optimizer step: one goes forward while another goes backward
_ALONE_STEPS = 4


def serve(
    notes: Notes,
    cache_dir: Path,
    config: Path,
    *,
    dry_run: bool,
    overrides: Sequence[str] = (),
    parts: Sequence[str] = PARTS,
    trace: Path | None = None,
    rates: Sequence[float] = (1, 3, 5, 20),
    seconds: float = 30.0,
) -> None:
    """Measure the `parts`.

    Args:
        config: of the engine; its workload's requests are sent where there is no `trace`.
        rates: requests/s that the first `seconds` of the requests are thinned or repeated to.
    """
    given = load_config(config, overrides)
    if given.workload is None:
        raise ConfigError(f"{config}: workload: required field is missing; it says how to sample")
    hf_config = json.loads((given.model.path / "config.json").read_text(encoding="utf-8"))
    engine: dict[str, Any] | Path = config
    if dry_run:
        hf_config, engine = TOY_MODEL, TOY_ENGINE
    own = (*overrides, f"compile.cache_dir={cache_dir}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with start(folder, hf_config, engine, own) as llm:
            notes.add(
                "start", {"seconds": llm.engine.start_seconds | {"all": llm.engine.startup_s}}
            )
            loads = {rate: requests_at(given, trace, rate, seconds) for rate in rates}
            sent = Sent(given.workload, loads, seconds)
            serving = Serving(notes, MeasuredEngine(llm, folder), sent, dry_run)
            for part in PARTS:
                if part in parts:
                    getattr(serving, part)()
            notes.add("recompiles", llm.engine.runner.compilations.count)
            notes.add("memory", jax.devices()[0].memory_stats())


def requests_at(config: Config, trace: Path | None, rate: float, seconds: float) -> list[Arrival]:
    """Those of the first `seconds` of a trace, or of the workload, thinned or repeated."""
    arrivals = choose_requests(config, trace, None)
    return at_rate([a for a in arrivals if a.arrival_s < seconds], rate)


@dataclass(frozen=True)
class Sent:
    """Requests by their rate, for so many seconds each, and how they are sampled."""

    workload: WorkloadSection
    loads: dict[float, list[Arrival]]
    seconds: float


class Serving:
    """The measurements of one engine."""

    def __init__(self, notes: Notes, engine: MeasuredEngine, sent: Sent, dry_run: bool):
        self.notes, self.engine, self.llm, self.dry_run = notes, engine, engine.llm, dry_run
        self.sent = sent
        self.config = engine.llm.config
        self.tokens = self.config.finetune.max_tokens // 2

    def generate(self) -> None:
        """Output tokens/s of a batch with its prefill, as `peers` has it."""
        work = engine_workload(dry_run=self.dry_run)
        prompts = self.engine.prompts(work.prompts, work.prompt)
        wall_s = self.engine.decode(prompts, work.new_tokens)["wall_s"]
        shape = {"prompts": work.prompts, "prompt": work.prompt, "new": work.new_tokens}
        rate = work.prompts * work.new_tokens / wall_s
        self.notes.add("generate", shape | {"tokens_per_s": rate})

    def adapters(self) -> None:
        """Decode and prefill with ever more adapters in a batch, as shares of the base's."""
        slots = self.config.adapters.slots - 1
        counts = [n for n in (1, 4, 16, 64) if n <= slots]
        job = self.engine.job("adapter0", 1, self.tokens).wait()
        if (folder := job.adapter_dir) is None:
            raise RuntimeError(f"the job made no adapter: {job.status}, {job.reason}")
        names = [f"adapter{i}" for i in range(counts[-1])]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: self.llm.load_adapter(name, folder), names[1:]))
        rows, length, new = (4, 16, 8) if self.dry_run else (64, 1024, 48)
        rows = min(rows, self.config.scheduler.max_sequences)
        base: dict[str, float] = {}
        for count in (0, *counts):
            prompts = self.engine.prompts(rows, length)
            prefill = self.engine.prefill(prompts, names[:count])
            decode = self.engine.decode(prompts, new, names[:count])
            base = base or {"prefill": prefill, "step_ms": decode["step_ms"]}
            shares = {
                "prefill_share": prefill / base["prefill"],
                "decode_share": base["step_ms"] / decode["step_ms"],
            }
            noted = decode | {"prefill_tokens_per_s": prefill} | (shares if count else {})
            self.notes.add(f"adapters/{count}", noted)
        for name in names:
            self.llm.unload_adapter(name)

    def finetuning(self) -> None:
        """A job alone."""
        batch = _BATCH * self.tokens
        self.engine.job("warm", 1, self.tokens, batch_tokens=batch).wait()
        job = self.engine.job("alone", _ALONE_STEPS, self.tokens, batch_tokens=batch).wait()
        noted = {"sequence": self.tokens, "batch": _BATCH}
        rate = tokens_per_s(job.step_times, batch)
        self.notes.add("finetuning alone", noted | {"tokens_per_s": rate})
        for name in ("warm", "alone"):
            self.llm.unload_adapter(name)

    def traces(self) -> None:
        """Requests beside a job that does not end, at every rate."""
        for rate, arrivals in self.sent.loads.items():
            self._load(rate, arrivals)

    def _load(self, rate: float, arrivals: Sequence[Arrival]) -> None:
        """At a rate; whoever still answers when the time is over is judged by the tokens that there
        are."""
        most = self.llm.engine.runner.sizes.max_model_len
        arrivals = [a for a in arrivals if a.prompt_tokens + a.output_tokens <= most]
        prompts = (self.engine.prompts(1, a.prompt_tokens)[0] for a in arrivals)
        requests = [
            ReplayRequest(a.arrival_s, tuple(prompt), a.output_tokens)
            for a, prompt in zip(arrivals, prompts, strict=True)
        ]
        replay = Replay(self.llm, requests, self.sent.workload)
        batch = _BATCH * self.tokens
        job = self.engine.job(f"beside{rate:g}", 100_000, self.tokens, batch_tokens=batch)
        begun, before = time.monotonic(), job.tokens
        replay.start()
        while (wall_s := time.monotonic() - begun) < self.sent.seconds and not replay.finished:
            time.sleep(min(replay.advance(), 0.02))
        trained = {"beside": {"tokens_per_s": (job.tokens - before) / wall_s}}
        unfinished = replay.stop()
        job.cancel()
        job.wait()
        slo = self.llm.engine.slos["standard"]
        made = {"inference": summarize(replay.timings, slo), "finetune": trained}
        noted = {"requests": len(arrivals), "unfinished": unfinished, "wall_s": wall_s}
        noted["measured"] = figures(made)
        noted["failures"] = dict(replay.failures)
        noted["host_ms p50, p99"] = [
            1e3 * float(q)
            for q in np.percentile(list(self.llm.engine.host_seconds)[-1000:], [50, 99])
        ]
        self.notes.add(f"load/{rate:g}", noted)

    def rollouts(self) -> None:
        """A reinforcement job, on its own policy and a batch behind: what it answers and trains."""
        prompt, new, steps = (8, 8, 2) if self.dry_run else (256, 128, 4)
        random = np.random.default_rng(0)

        def reward(samples: Sequence[Any]) -> list[float]:
            return random.random(len(samples)).tolist()

        for ahead in (0, 1):
            method = ReinforcementConfig(
                batch_size=2 if self.dry_run else 8,
                num_generations=2 if self.dry_run else 8,
                max_tokens=new,
                steps_ahead=ahead,
            )
            name = f"rewarded{ahead}"
            config = self.engine.job_config(
                name, steps, prompt, rows=16, method=method, max_seq_len=prompt + new
            )
            job = self.llm.finetune(config, reward=reward)
            begun = time.monotonic()
            job.wait()
            wall_s = time.monotonic() - begun
            noted = {"steps_ahead": ahead, "status": str(job.status), "wall_s": wall_s}
            noted["answered_tokens_per_s"] = job.sampled_tokens / wall_s
            noted["trained_tokens_per_s"] = job.tokens / wall_s
            noted["metrics"] = job.metrics[-1] if job.metrics else None
            self.notes.add(f"rollouts/{ahead}", noted)
            self.llm.unload_adapter(name)
