"""Prints, as JSON, how many collectives of each kind the engine's compiled programs have, and
whether they update donated arrays in place.

A program of its own, as the number of host devices is fixed when JAX starts:
`python -m tests.compile.collectives MODEL LAYERS SAVED TP [TP ...]`
"""

import json
import math
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp

from flexllm_jax.compile.buckets import compile_programs
from flexllm_jax.config import build_config
from flexllm_jax.engine.device.programs import list_programs
from flexllm_jax.engine.memory.activations import choose_saved
from flexllm_jax.engine.memory.cache import tree_bytes
from flexllm_jax.engine.memory.placement import plan_placement
from flexllm_jax.engine.memory.sizes import EngineSizes, bank_shape
from flexllm_jax.models.config import ModelConfig
from kernels_pallas.backend import XLA

COLLECTIVE = re.compile(
    r"= .* (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
PROGRAMS = ("forward/base/8", "forward/adapters/8", "unit/layer", "unit/loss", "optimizer_step")


def examine(path: str, layers: int, tp: int, saved: str) -> dict[str, dict]:
    """By program: collectives by kind, and whether what is donated is overwritten."""
    config = build_config(
        {
            "model": {"path": path, "dtype": "float32", "max_model_len": 64},
            "parallel": {"tp": tp},
            "adapters": {"slots": 3, "max_rank": 4},
            "compile": {"token_buckets": [8], "cache_dir": None},
            "scheduler": {"max_tokens_per_step": 8, "max_sequences": 4},
            "finetune": {"max_tokens": 16, "unit_tokens": 8, "saved": saved},
        },
        "test",
    )
    model = ModelConfig.from_hf(path)
    model = replace(model, layers=model.layers[:1] * layers)
    dtype = jnp.dtype(config.model.dtype)
    placement = plan_placement(config, model, bank_shape(config, model), 8, dtype)
    sizes = EngineSizes.from_config(config, model, "cpu", XLA, placement)
    sizes = choose_saved(config, sizes, math.inf)
    assert set(sizes.bank.modules) == {"q", "k", "v", "o", "gate", "up", "down"}
    wanted = [p for p in list_programs(sizes, 8) if p.name in PROGRAMS]
    compiled = compile_programs(wanted, progress=False)
    found = {}
    for program in wanted:
        one: Any = compiled[program.name]
        donated = tree_bytes([program.arguments[i] for i in program.donated])
        found[program.name] = {
            "collectives": Counter(COLLECTIVE.findall(one.as_text())),
            "in_place": one.memory_analysis().alias_size_in_bytes >= donated,
        }
    return found


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    path, layers, saved = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    print(json.dumps({tp: examine(path, layers, int(tp), saved) for tp in sys.argv[4:]}))
