"""Runs the engine's programs of models that are split over forced host devices, and writes what
came of them: log-probabilities, LoRA's gradients, what is exported, and how many all-reduces the
compiled programs have.

A program of its own, as the number of host devices is fixed when JAX starts:
`python -m tests.engine.split_families OUTPUT_DIR DEVICES MODEL [MODEL ...]`
with numbers of devices as 2,4; beside a model lie its adapter, MODEL.adapter, and the token ids of
two sequences, MODEL.json.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")  # the tests' own, from conftest.py
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np

from flexllm_jax.compile.buckets import compile_programs
from flexllm_jax.config import build_config
from flexllm_jax.engine.device.programs import head_parameters, layer_program, list_programs
from flexllm_jax.engine.memory.placement import plan_placement
from flexllm_jax.engine.memory.sizes import EngineSizes, bank_shape
from flexllm_jax.finetune.buffers import saved_columns
from flexllm_jax.models.checkpoints.hf_weights import load_parameters
from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import TARGET_MODULES
from flexllm_jax.peft.bank import from_row, to_row
from flexllm_jax.peft.hf.peft import load_adapter, save_adapter, save_merged
from kernels_pallas.backend import XLA
from tests.engine.summands import add_summands, shardings
from tests.packing import pack

STEP, SLOTS, UNIT, PAGES = 16, 48, 16, 8
TABLES = ([5, 2, 7, 0], [1, 6])
# The first cuts a sequence, the last has the rest of one and of the other.
STEPS = ([(0, 0, 16)], [(0, 16, 29), (1, 0, 3)], [(1, 3, 14)])
# Of all else the backward computes the value again.
SAVED = ("residual", "attended", "attention_branch", "mlp_branch", "token_gate")
FORWARD = f"forward/adapters/{STEP}"


def sizes_of(path: Path, model: ModelConfig, tp: int) -> EngineSizes:
    """Those of a small engine, with LoRA on all projections of the layers."""
    names = {n.rpartition(".")[2] for n, m in TARGET_MODULES.items() if m in model.projections}
    config = build_config(
        {
            "model": {"path": str(path), "dtype": "float32", "max_model_len": SLOTS},
            "parallel": {"tp": tp},
            "cache": {"page_size": 8, "state_snapshots": 0},
            "adapters": {"slots": 3, "max_rank": 4, "target_modules": sorted(names - {"lm_head"})},
            "compile": {"token_buckets": [STEP], "cache_dir": None},
            "scheduler": {"max_tokens_per_step": STEP, "max_sequences": 2},
            "finetune": {"max_tokens": SLOTS, "unit_tokens": UNIT},
        },
        "test",
    )
    bank = bank_shape(config, model)
    placement = plan_placement(config, model, bank, STEP, jnp.dtype(jnp.float32))
    sizes = EngineSizes.from_config(config, model, "cpu", XLA, placement)
    return replace(sizes, columns=saved_columns(sizes.decoder, SAVED))


def run(path: Path, out: Path, tp: int) -> None:
    """A microbatch with its adapter, forward and backward, and both exports."""
    model = ModelConfig.from_hf(path)
    sizes = sizes_of(path, model, tp)
    units = [layer_program(kind) for kind in range(len(model.kinds))]
    wanted = {FORWARD, *units, "unit/loss", "write_row", "read_row"}
    listed = [p for p in list_programs(sizes, PAGES) if p.name in wanted]
    programs = compile_programs(listed, progress=False)

    def shardings_of(shapes):
        assert sizes.placement
        whole = sizes.placement.replicated
        return jax.tree.map(lambda s: getattr(s, "sharding", None) or whole, shapes)

    def put(tree, shapes):
        return jax.tree.map(jax.device_put, tree, shardings_of(shapes))

    def zeros(shapes):
        return put(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes), shapes)

    params = load_parameters(path, model, sizes.dtype, shardings_of(sizes.parameters))
    adapter = load_adapter(path.with_suffix(".adapter"), model, path)
    row, arrays = to_row(adapter, model, sizes.bank, "own"), zeros(sizes.bank_arrays)
    master = put(row.weights, sizes.adapter_row.weights)
    bank = arrays["weights"], arrays["scales"]
    bank = programs["write_row"](*bank, np.int32(0), master, row.scales)

    tokens = [np.array(own) for own in json.loads(path.with_suffix(".json").read_text())]
    batch, table, vectors, page_tables = pack(sizes, PAGES, tokens, TABLES, STEPS)
    table, loss = np.asarray(table), batch.loss.packed()
    pages, finetune = zeros(sizes.pages(PAGES)), zeros(sizes.finetune_arrays)
    last_tokens = np.zeros(sizes.rows, np.int32)
    for vector in vectors:
        pages, finetune, *_ = programs[FORWARD](
            *(params, dict(zip(("weights", "scales"), bank, strict=True)), pages, finetune),
            *(last_tokens, page_tables, vector),
        )
    flow, starts = finetune["flow"], range(SLOTS - UNIT, -1, -UNIT)
    for start in map(np.int32, starts):
        flow, _, _ = programs["unit/loss"](
            head_parameters(params), None, flow, None, table, loss, start
        )
    gradients = zeros(sizes.pending_arrays)
    for layer in reversed(range(model.num_layers)):
        stack, at = sizes.stacks.place(layer)
        for start in map(np.int32, starts):
            flow, gradients[stack], _ = programs[layer_program(model.kind_of[layer])](
                *(params["layers"][layer], {"weights": master[stack], "scales": row.scales[stack]}),
                *(pages[model.cache_of[layer]], finetune["saved"][layer], flow),
                *(gradients[stack], table, np.int32(at), start),
            )
    whole = jax.tree.map(
        add_summands,
        jax.tree.map(np.asarray, gradients),
        jax.tree.map(shardings, gradients),
        sizes.adapter_row.weights,
    )
    flat: dict[str, Any] = {"logprob": np.asarray(flow["logprob"])}
    for layer, sites in enumerate(sizes.stacks.by_layer(whole)):
        flat |= {f"{layer}/{s}/{n}": x for s, own in sites.items() for n, x in own.items()}
    np.savez(out / f"{path.name}-{tp}.npz", **flat)
    counts = {n: str(programs[n].as_text()).count(" all-reduce(") for n in (FORWARD, *units)}
    (out / f"{path.name}-{tp}.json").write_text(json.dumps(counts))

    held = jax.device_get(programs["read_row"](bank[0], np.int32(0)))
    held = from_row(held, adapter.config, adapter.shapes, sizes.stacks)
    save_adapter(held, model, path, out / f"{path.name}-{tp}.adapter")
    save_merged(params, held, model, path, out / f"{path.name}-{tp}.merged")


if __name__ == "__main__":
    out = Path(sys.argv[1])
    for path in map(Path, sys.argv[3:]):
        for tp in map(int, sys.argv[2].split(",")):
            run(path, out, tp)
