"""Runs one model on forced host devices and writes what it said and learnt.

A program of its own, as the number of host devices is fixed when JAX starts. For each PARALLEL, a
section of the configuration as JSON, an engine runs in turn:
`python -m tests.engine.tensor_parallel MODEL ADAPTER ROWS OUTPUT_DIR PARALLEL [PARALLEL ...]`
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")  # the tests' own, from conftest.py
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

import jax
import numpy as np

from flexllm_jax import LLM, SamplingParams, StructuredOutputsParams
from tests.engine.summands import add_summands, shardings
from tests.engines import SEVEN, job_config, random_prompts, start_engine

KINDS = {
    "lora": {"type": "lora", "r": 4, "alpha": 8.0, "target_modules": list(SEVEN)},
    "ia3": {"type": "ia3"},
    "bottleneck": {"type": "bottleneck", "bottleneck_size": 4},
    "prefix": {"type": "prefix", "num_virtual_tokens": 3},
}
REWARDED = {"type": "reinforcement", "batch_size": 2, "num_generations": 3, "max_tokens": 8}
PREFERENCE = {"type": "dpo", "beta": 0.3}


def lengths(samples: list) -> list[float]:
    """Rewards that differ between answers."""
    return [len(set(sample.text)) / 8 for sample in samples]


def gradients(llm: LLM, job: dict, rows: Path) -> dict[str, np.ndarray]:
    """Gradients, whole, and the loss, after every microbatch of a job's only step."""
    runner = llm.engine.runner
    seen, commit = [], runner.commit

    def spy(state, first, *ranks):
        state, compiled = commit(state, first, *ranks), runner.compilations.count
        gradients, shapes = state["gradients"], runner.sizes.job_state["master"]
        on_host = jax.tree.map(runner.to_host, gradients)
        whole = jax.tree.map(add_summands, on_host, jax.tree.map(shardings, gradients), shapes)
        seen.append(whole)
        runner.compilations.count = compiled  # this test's own reading compiles between processes
        return state

    runner.commit = spy
    futures = [
        f
        for prompt in random_prompts([5, 31, 18])
        for f in llm.submit(prompt, SamplingParams(max_tokens=30, temperature=1.0))
    ]
    done = llm.finetune(job_config("step", rows, steps=1, batch_tokens=400, seed=3, **job)).wait(
        300
    )
    for future in futures:
        future.result(60)
    runner.commit = commit
    assert done.status == "succeeded", done.reason
    flat = {"losses": np.array(done.losses)}
    for i, one in enumerate(seen):
        for path, leaf in jax.tree_util.tree_leaves_with_path(one):
            flat[f"{i}{jax.tree_util.keystr(path)}"] = leaf
    return flat


def buffers(llm: LLM) -> list:
    runner = llm.engine.runner
    arrays = jax.tree.leaves((runner.params, runner.pages, runner.finetune["saved"], runner.bank))
    return sorted(
        (shard.data.shape, shard.data.unsafe_buffer_pointer())
        for array in arrays
        for shard in array.addressable_shards
    )


def name_of(parallel: dict) -> str:
    """Number of devices, and of processes if there are several."""
    processes = parallel.get("num_processes", 1)
    return f"{parallel['tp']}" if processes == 1 else f"{parallel['tp']}p{processes}"


def trained_kinds(name: str) -> list[str]:
    """The kinds of adapters a run of that name trains: between processes every step is slow."""
    return ["lora"] if "p" in name else list(KINDS)


def trained(name: str) -> list[str]:
    """All whose gradients a run of that name writes: preferences train LoRA, with dropout."""
    return [*trained_kinds(name), "dpo"]


def run(model: Path, adapter: Path, rows: Path, out: Path, parallel: dict) -> None:
    """Everything, on one layout of devices."""
    name = name_of(parallel)
    llm = start_engine(
        model,
        out / f"runs{name}",
        parallel=parallel,
        compile={"token_buckets": [48]},
        finetune={"max_tokens": 96, "unit_tokens": 32, "dropout": True},
        adapter_bank={
            "slots": 6,
            "max_rank": 8,
            "kinds": list(KINDS),
            "max_bottleneck": 4,
            "max_prefix": 4,
        },
    )
    llm.load_adapter("served", adapter)
    prompts = random_prompts([1, 9, 33, 60])
    greedy = SamplingParams(max_tokens=20, ignore_eos=True)
    full = SamplingParams(
        max_tokens=12,
        temperature=0.8,
        top_p=0.9,
        seed=5,
        logprobs=3,
        prompt_logprobs=2,
        repetition_penalty=1.1,
        ignore_eos=True,
    )
    pattern = StructuredOutputsParams(regex="[a-f]{5,20}(-[0-9]+)*")
    structured = SamplingParams(max_tokens=20, structured_outputs=pattern)
    said: dict[str, Any] = {
        "greedy": [o.token_ids for o in llm.generate(prompts, greedy)],
        "adapter": [o.token_ids for o in llm.generate(prompts, greedy, adapter="served")],
        "sampled": [o.token_ids for o in llm.generate(prompts, full)],
        "structured": [o.token_ids for o in llm.generate(prompts, structured)],
    }
    outputs = llm.generate(prompts, full, adapter="served")
    said["logprobs"] = [
        sorted(position.values())
        for output in outputs
        for position in [*(output.logprobs or []), *(output.prompt_logprobs or [])]
        if position is not None
    ]
    before = llm._loop.call(lambda: buffers(llm))
    arrays = {}
    pairs = rows.with_name("pairs.jsonl")
    for kind in trained(name):
        job = {"peft": KINDS.get(kind, {"lora_dropout": 0.2})}
        if kind in ("lora", "dpo"):
            job["init_adapter"] = adapter
        if kind == "dpo":
            job["method"] = PREFERENCE
        for where, leaf in gradients(llm, job, pairs if kind == "dpo" else rows).items():
            arrays[f"{kind}{where}"] = leaf
        llm.unload_adapter("step")
    job = llm.finetune(
        job_config(
            "mine",
            rows,
            steps=4,
            batch_tokens=300,
            peft=KINDS["lora"],
            optimizer={"lr": 1e-2, "clip": 0.5},
        )
    ).wait(300)
    assert job.status == "succeeded", job.reason
    said["losses"] = job.losses
    fields = {"method": PREFERENCE, "init_adapter": adapter, "steps": 4, "batch_tokens": 300}
    preferred = llm.finetune(job_config("preferred", pairs, **fields)).wait(300)
    assert preferred.status == "succeeded", preferred.reason
    said["preferred"] = preferred.metrics
    fields = {"method": REWARDED, "init_adapter": adapter, "steps": 2}
    learnt = llm.finetune(job_config("learnt", rows, **fields), reward=lengths).wait(300)
    assert learnt.status == "succeeded", learnt.reason
    said["learnt"], said["answers"] = learnt.metrics, [s["text"] for s in learnt.samples]
    llm.unload_adapter("learnt")
    said["trained"] = [o.token_ids for o in llm.generate(prompts, greedy, adapter="mine")]
    said["recompiles"] = llm.engine.runner.compilations.count
    llm.export_adapter("mine", out / f"adapter{name}")
    llm.export_merged("mine", out / f"merged{name}")
    said["moved"] = len(set(before) - set(llm._loop.call(lambda: buffers(llm))))
    llm.close()
    np.savez(out / f"gradients{name}.npz", **arrays)
    (out / f"said{name}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    model, adapter, rows, out = map(Path, sys.argv[1:5])
    for parallel in map(json.loads, sys.argv[5:]):
        run(model, adapter, rows, out, parallel)
