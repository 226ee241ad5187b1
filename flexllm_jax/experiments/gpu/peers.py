"""What transformers and PEFT on torch do on the GPU at hand, with a model of the same shape as that
of `speed` and `serving`: random weights, made on the device."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np

from flexllm_jax.experiments.gpu.measure import Notes
from flexllm_jax.experiments.gpu.workload import engine_workload
from flexllm_jax.experiments.side_by_side.peft import Theirs, random_model
from flexllm_jax.experiments.side_by_side.workload import random_tokens

_STEPS = 3


def peers(notes: Notes, *, dry_run: bool) -> None:
    """Finetuning tokens/s, one sequence a step, and output tokens/s of a batch with its prefill."""
    workload, random = engine_workload(dry_run=dry_run), np.random.default_rng(0)
    theirs = Theirs(random_model(workload.hf_config, workload.dtype), workload)
    notes.add(
        "versions of peers", {name: version(name) for name in ("torch", "transformers", "peft")}
    )
    rows = random_tokens(random, _STEPS, workload.sequence)
    noted = {"sequence": workload.sequence, "tokens_per_s": theirs.finetune(rows)}
    notes.add("finetune", noted)
    shape = {"prompts": workload.prompts, "prompt": workload.prompt, "new": workload.new_tokens}
    prompts = random_tokens(random, workload.prompts, workload.prompt)
    notes.add("generate", shape | {"tokens_per_s": theirs.decode(prompts)})
