"""Donated buffers stay where they are: no program copies KV pages, weights or finetuning buffers
(invariant 7; that nothing compiles is shown in `test_resume`, in a process of its own)."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexllm_jax import SamplingParams
from flexllm_jax.compile.buckets import Program, compile_programs
from flexllm_jax.engine.device import runner as runner_module
from flexllm_jax.engine.device.first_runs import run_all
from flexllm_jax.engine.device.programs import list_programs
from flexllm_jax.engine.device.runner import Runner
from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.finetune.buffers import saved_columns
from flexllm_jax.models.checkpoints.hf_weights import abstract_parameters
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.peft.bank import BankShape
from tests.engines import job_config, letter_rows, random_prompts, start_engine, write_rows


def size(*trees):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


@pytest.mark.parametrize("bucket", [8, 48])
def test_a_forward_updates_pages_and_finetuning_buffers_in_place(llm, bucket):
    runner = llm.engine.runner
    for variant, buffers in (
        ("base", (runner.pages,)),
        ("adapters", (runner.pages, runner.finetune)),
    ):
        memory = runner.programs[f"forward/{variant}/{bucket}"].memory_analysis()
        assert memory.alias_size_in_bytes >= size(*buffers)


@pytest.mark.parametrize(
    ("program", "buffers"),
    [
        ("unit/loss", lambda r: (r.finetune["flow"],)),
        ("unit/layer", lambda r: (r.finetune["flow"], r.pending[0])),
        ("optimizer_step", lambda r: (r.bank["weights"],)),
        ("begin_backward", lambda r: (r.finetune["flow"], r.pending)),
        ("clear", lambda r: (r.finetune,)),
        ("write_row", lambda r: (r.bank,)),
        ("copy_row", lambda r: (r.bank,)),
        ("sample/filtered/6", lambda r: (r.history, r.last_tokens)),
    ],
)
def test_other_programs_update_their_buffers_in_place(llm, program, buffers):
    runner = llm.engine.runner
    memory = runner.programs[program].memory_analysis()
    assert memory.alias_size_in_bytes >= size(*buffers(runner))


def test_programs_hold_no_copy_of_the_weights(llm):
    """Beside its arguments and results, a program of a few tokens needs a fraction of the weights.

    Compiled for weights that are large beside the tokens' activations; nothing is allocated.
    """
    sizes = llm.engine.runner.sizes
    layer = sizes.model.layers[0]
    attention = replace(layer.mixer, heads=8, kv_heads=8, head_dim=64)
    layer = replace(layer, mixer=attention, mlp=replace(layer.mlp, d_ff=2048))
    model = replace(sizes.model, d_model=512, layers=(layer,) * sizes.model.num_layers)
    sizes = replace(
        sizes,
        model=model,
        rows=4,
        finetune_slots=16,
        unit_tokens=8,
        buckets=(8,),
        bank=BankShape(rows=2, rank=2, modules=("q", "down")),
        columns=saved_columns(Decoder(model, sizes.dtype), ("attended", "query")),
    )
    layers = abstract_parameters(model, sizes.dtype)["layers"]
    programs = {program.name: program for program in list_programs(sizes, num_pages=16)}
    for name, weights, buffers in (
        ("forward/adapters/8", layers, (sizes.pages(16), sizes.finetune_arrays)),
        (
            "unit/layer",
            layers[0],
            (sizes.finetune_arrays["flow"], sizes.pending_arrays[0]),
        ),
    ):
        compiled = compile_programs([programs[name]], progress=False)[name]
        memory: Any = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < 0.1 * size(weights)
        assert memory.alias_size_in_bytes >= size(*buffers)


_PAGES, _SLOTS, _ROWS, _TIMES = 41, 64, 3, 20


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_no_program_costs_what_its_arrays_cost(llm, dtype):
    """With many times the KV pages, the finetuning slots and the slots of the adapter bank, every
    program needs the memory it needed, and none has such an array as float32: on a CPU, XLA would
    convert bfloat16, in place too.

    Units of the backward alone copy what flows through it, on CPUs and in its own type.
    """
    few, many = (_programs(llm.engine.runner.sizes, dtype, times) for times in (1, _TIMES))
    # What is equal in both is one program.
    changed = [p for p, q in zip(few, many, strict=True) if repr(p) != repr(q)]
    names = {p.name for p in changed}
    assert names > {"forward/base/8", "forward/adapters/8", "unit/layer", "unit/loss"}
    assert names > {"write_row", "read_row", "copy_row", "optimizer_step", "zeros/pages"}
    small = compile_programs(changed, progress=False)
    lengths = {_TIMES * n for n in (_PAGES, _SLOTS, _ROWS)}
    many = [p for p in many if p.name in names]
    for program, compiled in zip(
        many, compile_programs(many, progress=False).values(), strict=True
    ):
        name, text = program.name, compiled.as_text() or ""
        assert text
        memory: Any = [c.memory_analysis() for c in (small[name], compiled)]
        flow = size(program.arguments[program.donated[0]]) if name.startswith("unit/") else 0
        numbers = 4096  # a few of each slot of the bank
        before, after = (m.temp_size_in_bytes for m in memory)
        assert after < before + 2 * flow + numbers, name
        for array in jax.tree.leaves(program.arguments):
            if array.dtype.itemsize == 2 and array.shape[0] in lengths:
                flat = (math.prod(array.shape[:2]), *array.shape[2:])
                for shape in (array.shape, flat):
                    assert f"f32[{','.join(map(str, shape))}]" not in text, name


def _programs(sizes: EngineSizes, dtype: str, times: int) -> list[Program]:
    """Every program of an engine of one layer."""
    sizes = replace(
        sizes,
        model=replace(sizes.model, layers=sizes.model.layers[:1]),
        dtype=jnp.dtype(dtype),
        finetune_slots=_SLOTS * times,
        buckets=(8,),
        bank=replace(sizes.bank, rows=_ROWS * times),
    )
    return list_programs(sizes, _PAGES * times)


def test_buffers_stay_at_their_address_while_serving_and_training(llm, tmp_path):
    runner = llm.engine.runner

    def addresses():  # buffers of one shape may change places
        arrays = jax.tree.leaves((runner.pages, runner.finetune, runner.bank))
        return sorted((array.shape, array.unsafe_buffer_pointer()) for array in arrays)

    rows = write_rows(tmp_path / "rows.jsonl", letter_rows(20))

    def serve_and_train():
        job = llm.finetune(job_config("in-place", rows))
        llm.generate(random_prompts([9, 60, 33]), SamplingParams(max_tokens=30, ignore_eos=True))
        assert job.wait(60).status == "succeeded"
        llm.unload_adapter("in-place")

    serve_and_train()  # what still shares its memory with numpy moves once
    before = llm._loop.call(addresses)
    serve_and_train()
    assert llm._loop.call(addresses) == before


@pytest.mark.parametrize("name", ["forward/adapters/48", "sample/filtered/6", "unit/layer"])
def test_a_program_that_is_not_listed_is_an_error_at_the_start(llama, tmp_path, monkeypatch, name):
    def without(sizes, num_pages):
        return [program for program in list_programs(sizes, num_pages) if program.name != name]

    monkeypatch.setattr(runner_module, "list_programs", without)
    with pytest.raises(RuntimeError, match=f"without the programs {name}:"):
        start_engine(llama, tmp_path)


def test_every_program_runs_at_the_start_and_leaves_nothing(llm, monkeypatch):
    ran = Counter()

    def counted(name, program):
        def run(*arguments):
            ran[name] += 1
            return program(*arguments)

        return run

    runner = Runner(llm.config, progress=False)
    programs = {name: counted(name, program) for name, program in runner.programs.items()}
    monkeypatch.setattr(runner, "programs", programs)
    run_all(runner)
    never = set(programs) - set(ran)
    assert not {name for name in never if not name.startswith("zeros/")}  # those made the arrays
    arrays = (runner.pages, runner.bank, runner.finetune, runner.pending, runner.history)
    assert not any(np.asarray(array).any() for array in jax.tree.leaves(arrays))
    assert llm.engine.start_seconds["first runs"] > 0
    runner.close()
