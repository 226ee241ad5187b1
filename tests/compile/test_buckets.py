"""The sizes of steps by default, and how compiling their programs is shown."""

import jax
import jax.numpy as jnp
import pytest

from flexllm_jax.compile.buckets import Program, compile_programs
from flexllm_jax.config import build_config
from flexllm_jax.engine.device.programs import list_programs
from flexllm_jax.engine.memory.sizes import EngineSizes, step_buckets
from flexllm_jax.models.config import ModelConfig
from kernels_pallas.backend import XLA


@pytest.mark.parametrize(
    ("fields", "on_cpu", "on_gpu"),
    [
        ({}, (8, 48, 256), (8, 32, 128, 512)),
        ({"scheduler": {"max_sequences": 300}}, (8, 48, 288, 300), (8, 32, 128, 512)),
        ({"scheduler": {"max_tokens_per_step": 512}}, (8, 48, 288, 512), (8, 32, 128, 512)),
        ({"compile": {"token_buckets": [16, 64]}}, (16, 64), (16, 64)),
    ],
)
def test_the_sizes_of_steps(fields, on_cpu, on_gpu):
    config = build_config({"model": {"path": "m"}, **fields}, "test")
    assert step_buckets(config, "cpu") == on_cpu
    assert step_buckets(config, "gpu") == on_gpu


def test_how_many_programs_a_cpu_compiles_by_default(llama):
    """Two forwards, and what follows them, for three sizes of steps: they take most of the time."""
    config = build_config({"model": {"path": str(llama)}}, "test")
    sizes = EngineSizes.from_config(config, ModelConfig.from_hf(llama), "cpu", XLA)
    names = [program.name for program in list_programs(sizes, 64)]
    assert sum(name.startswith("forward/") for name in names) == 6
    assert sum(name.startswith("sample/") for name in names) == 8
    assert len(names) <= 41  # write_pages among them


def test_the_bar_is_on_stderr(capsys):
    program = Program("double", lambda x: 2 * x, (jax.ShapeDtypeStruct((2,), jnp.float32),))
    compiled = compile_programs([program], progress=True)
    assert compiled["double"](jnp.ones(2)).tolist() == [2, 2]
    shown = capsys.readouterr()
    assert "compiling" in shown.err and not shown.out
