"""Our side: the engine, finetuning, decoding, and both at once."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from flexllm_jax.config import FinetuneConfig, OptimizerConfig, PeftConfig
from flexllm_jax.experiments.side_by_side.workload import Workload, random_tokens
from flexllm_jax.llm import LLM, JobHandle


class Ours:
    """The engine."""

    def __init__(self, model: Path, out: Path, workload: Workload):
        self.jobs = 0
        self.workload = workload
        fields: dict[str, Any] = {
            "dtype": workload.dtype,
            "max_model_len": max(workload.sequence, workload.prompt + workload.new_tokens),
            "scheduler": {
                "max_tokens_per_step": workload.token_buckets[-1],
                "max_sequences": workload.prompts,
                "slo": {"tpot_ms": workload.tpot_ms},
            },
            "compile": {"token_buckets": workload.token_buckets},
            "adapter_bank": {"slots": 3, "max_rank": workload.rank},
            "output_dir": str(out),
        }
        self.llm = LLM(model, **fields, **workload.engine)

    def start_job(self, rows: Path, steps: int) -> JobHandle:
        """A finetuning job of one sequence a step."""
        self.jobs += 1
        return self.llm.finetune(
            FinetuneConfig(
                name=f"job{self.jobs}",
                dataset=rows,
                format="text",
                steps=steps,
                batch_tokens=self.workload.sequence,
                train_on="all",
                max_seq_len=self.workload.sequence,
                peft=PeftConfig(r=self.workload.rank, alpha=2 * self.workload.rank),
                optimizer=OptimizerConfig(lr=1e-4),
                resume=False,
            )
        )

    def finetune(self, rows: Path, steps: int) -> float:
        """Tokens per second between the first step and the last."""
        times = self.start_job(rows, steps + 1).wait().step_times
        self.llm.unload_adapter(f"job{self.jobs}")
        return steps * self.workload.sequence / (times[-1] - times[0])

    def decode(self, prompts: np.ndarray) -> float:
        """Output tokens per second."""
        started = time.perf_counter()
        outputs = self.llm.generate(prompts.tolist(), self.workload.sampling)
        seconds = time.perf_counter() - started
        return sum(len(o.token_ids) for o in outputs) / seconds

    def coserve(self, rng: np.random.Generator, rows: Path, steps: int) -> dict[str, float]:
        """Requests and a job together, and the same requests and job one after the other."""
        workload = self.workload
        prompts = random_tokens(rng, 2 * workload.prompts, workload.prompt).tolist()

        def serve() -> float:
            outputs = self.llm.generate(prompts, workload.sampling)
            return 1e3 * float(np.mean([o.tpot_s for o in outputs if o.tpot_s]))

        started = time.perf_counter()
        alone_ms = serve()
        job = self.start_job(rows, steps).wait()
        sequential_s = time.perf_counter() - started
        self.llm.unload_adapter(job.name)

        started = time.perf_counter()
        job = self.start_job(rows, steps)
        coserved_ms = serve()
        served_s, steps_beside = time.perf_counter() - started, job.steps
        job.wait()
        together_s = time.perf_counter() - started
        self.llm.unload_adapter(job.name)
        return {
            "sequential_s": sequential_s,
            "together_s": together_s,
            "finetune_tokens_per_s_beside_requests": steps_beside * workload.sequence / served_s,
            "tpot_ms_alone": alone_ms,
            "tpot_ms_coserved": coserved_ms,
        }
