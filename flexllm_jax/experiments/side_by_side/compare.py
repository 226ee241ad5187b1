"""Round after round, ours and theirs in turn; then the engine doing both at once.

Measured are finetuning tokens/s (LoRA on all seven projections, AdamW, one sequence a step) and
decode tokens/s (greedy; `generate` on their side), and requests and a job together against the same
one after the other.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from flexllm_jax.experiments.side_by_side.engine import Ours
from flexllm_jax.experiments.side_by_side.peft import Theirs, make_model
from flexllm_jax.experiments.side_by_side.workload import Workload, random_tokens, write_rows


def compare(workload: Workload, out: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Measure both sides in turn, then co-serving; prints each round and returns everything."""
    out.mkdir(parents=True, exist_ok=True)
    make_model(out / "model", workload)
    rng = np.random.default_rng(0)
    rows = random_tokens(rng, steps, workload.sequence)
    dataset = write_rows(out / "rows.jsonl", rows)
    ours, theirs = Ours(out / "model", out, workload), Theirs.load(out / "model", workload)
    ours.decode(random_tokens(rng, workload.prompts, workload.prompt))
    theirs.decode(random_tokens(rng, workload.prompts, workload.prompt))

    result: dict[str, Any] = {kind: {"ours": [], "theirs": []} for kind in ("finetune", "decode")}
    for i in range(rounds):
        result["finetune"]["theirs"].append(theirs.finetune(rows))
        result["finetune"]["ours"].append(ours.finetune(dataset, steps))
        prompts = random_tokens(rng, workload.prompts, workload.prompt)
        result["decode"]["theirs"].append(theirs.decode(prompts))
        result["decode"]["ours"].append(ours.decode(prompts))
        latest = {k: {s: round(v[-1], 1) for s, v in r.items()} for k, r in result.items()}
        print(f"round {i + 1}: {latest}", file=sys.stderr)
    for kind in result.values():
        ratios = [a / b for a, b in zip(kind["ours"], kind["theirs"], strict=True)]
        kind["ratio"] = median(ratios)
    result["coserving"] = ours.coserve(rng, dataset, 2 * steps)
    result["recompiles_after_warmup"] = ours.llm.engine.runner.compilations.count
    ours.llm.close()
    return result
