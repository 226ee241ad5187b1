"""Compiling all programs shows its bar beside what a program prints."""

import jax
import jax.numpy as jnp

from flexllm_jax.compile.buckets import Program, compile_programs


def test_the_bar_is_on_stderr(capsys):
    program = Program("double", lambda x: 2 * x, (jax.ShapeDtypeStruct((2,), jnp.float32),))
    compiled = compile_programs([program], progress=True)
    assert compiled["double"](jnp.ones(2)).tolist() == [2, 2]
    shown = capsys.readouterr()
    assert "compiling" in shown.err and not shown.out
