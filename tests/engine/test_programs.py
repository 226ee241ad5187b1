"""Donated buffers stay where they are: no program copies KV pages, weights or finetuning buffers
(invariant 7; that nothing compiles is shown in `test_resume`, in a process of its own)."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from flexllm_jax import SamplingParams
from flexllm_jax.engine.batch import BatchShape
from flexllm_jax.engine.cache import page_shapes
from flexllm_jax.engine.step import forward_step
from flexllm_jax.finetune.backward import flow_shapes, layer_unit, saved_columns, saved_shapes
from flexllm_jax.models.decoder import Decoder
from flexllm_jax.models.hf_weights import abstract_parameters
from flexllm_jax.peft.bank import BankShape, scale_shapes, weight_shapes
from tests.engines import job_config, letter_rows, random_prompts, write_rows


def size(*trees):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trees))


@pytest.mark.parametrize("bucket", [8, 48])
def test_a_forward_updates_pages_and_finetuning_buffers_in_place(llm, bucket):
    runner = llm.engine.runner
    for variant, buffers in (
        ("base", (runner.pages,)),
        ("adapters", (runner.pages, runner.finetune)),
    ):
        memory = runner._programs[f"forward/{variant}/{bucket}"].memory_analysis()
        assert memory.alias_size_in_bytes >= size(*buffers)


@pytest.mark.parametrize(
    ("program", "buffers"),
    [
        ("loss_unit", lambda r: (r.finetune["flow"], r.pending["totals"])),
        ("layer_unit", lambda r: (r.finetune["flow"], r.pending["gradients"][0])),
        ("optimizer_step", lambda r: (r.bank["weights"],)),
        ("write_row", lambda r: (r.bank,)),
        ("copy_row", lambda r: (r.bank,)),
        ("sample/full/6", lambda r: (r.history, r.last_tokens)),
    ],
)
def test_other_programs_update_their_buffers_in_place(llm, program, buffers):
    runner = llm.engine.runner
    memory = runner._programs[program].memory_analysis()
    assert memory.alias_size_in_bytes >= size(*buffers(runner))


def test_programs_hold_no_copy_of_the_weights(llm):
    """Beside its arguments and results, a program of a few tokens needs a fraction of the weights.

    Compiled for weights that are large beside the tokens' activations; nothing is allocated.
    """
    model = replace(llm.engine.runner.model, d_model=512, d_ff=2048, num_heads=8, num_kv_heads=8)
    model = replace(model, head_dim=64)
    decoder, tokens, dtype = Decoder(model, jnp.float32), 8, jnp.float32
    params = abstract_parameters(model, dtype)
    pages = page_shapes(model, dtype, 16, 8)
    columns = saved_columns(model, ("query",))
    finetune = {
        "saved": saved_shapes(model, dtype, 16, columns),
        "flow": flow_shapes(model, dtype, 16),
    }
    bank_shape = BankShape(rows=2, rank=2, modules=("q", "down"))
    bank = {
        "weights": weight_shapes(model, bank_shape, 2, dtype),
        "scales": scale_shapes(model, bank_shape, 2),
    }
    own = weight_shapes(model, bank_shape, None, jnp.float32)[0]
    scales = dict.fromkeys(own, jax.ShapeDtypeStruct((1,), jnp.float32))
    batch = BatchShape(tokens=tokens, sequences=4, pages=4, samples=4)

    def ints(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    forward = jax.jit(partial(forward_step, decoder, batch, columns), donate_argnums=(2, 3))
    compiled = forward.lower(params, bank, pages, finetune, ints(4), ints(batch.size)).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * size(params["layers"])
    assert memory.alias_size_in_bytes >= size(pages, finetune)

    unit = jax.jit(partial(layer_unit, decoder, tokens, columns), donate_argnums=(4, 5))
    compiled = unit.lower(
        params["layers"][0],
        {"weights": own, "scales": scales},
        pages[0],
        finetune["saved"][0],
        finetune["flow"],
        own,
        ints(4, 16),
        ints(),
    ).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * size(params["layers"][0])
    assert memory.alias_size_in_bytes >= size(finetune["flow"], own)


def test_buffers_stay_at_their_address_while_serving_and_training(llm, tmp_path):
    runner = llm.engine.runner

    def addresses():  # buffers of one shape may change places
        zeroed_anew = ("dk", "dv")  # for every microbatch: nothing is copied
        flow = {k: v for k, v in runner.finetune["flow"].items() if k not in zeroed_anew}
        arrays = jax.tree.leaves((runner.pages, runner.finetune["saved"], flow, runner.bank))
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
