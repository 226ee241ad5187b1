"""A second start takes over the programs of the first, untraced; only those that are the same."""

import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache, monitoring

from flexllm_jax import SamplingParams
from flexllm_jax.compile import kept as kept_module
from flexllm_jax.compile.buckets import Program, compile_programs, use_persistent_cache
from flexllm_jax.compile.kept import KeptPrograms, compile_noting_key
from tests.engines import COMPILE_CACHE, random_prompts, start_engine

WORK = {"jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration"}


@contextmanager
def counted_work() -> Iterator[list[str]]:
    """What JAX traces, lowers and compiles meanwhile."""
    found: list[str] = []

    def note(event: str, *_: float, **__: str | int | float) -> None:
        if (name := event.rsplit("/", 1)[-1]) in WORK:
            found.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield found
    finally:
        monitoring.unregister_event_duration_listener(note)


def programs(size: int = 7, factor: float = 3.0) -> list[Program]:
    """One that overwrites an argument and one whose arguments are a tree."""
    array = jax.ShapeDtypeStruct((size,), jnp.float32)

    def add(x: jax.Array, y: jax.Array) -> jax.Array:
        return x + factor * y

    def tree(x: dict) -> dict:
        return {"sum": x["a"].sum() + x["b"], "twice": [2 * x["a"]]}

    return [
        Program("add", add, (array, array), donated=(0,)),
        Program("tree", tree, ({"a": array, "b": array},)),
    ]


@pytest.fixture
def start(tmp_path):
    use_persistent_cache(COMPILE_CACHE)

    def start(wanted=None, source="it"):
        """The programs of a new start, and what JAX had to do for them."""
        kept = KeptPrograms(tmp_path, source, jax.devices()[0])
        with counted_work() as work:
            compiled = compile_programs(wanted or programs(), progress=False, kept=kept)
        return compiled, work

    return start


def check(compiled, factor=3.0, size=7):
    x, y = jnp.arange(float(size)), jnp.ones(size)
    expected = np.arange(float(size)) + factor
    np.testing.assert_array_equal(compiled["add"](x, y), expected)
    assert x.is_deleted(), "an argument that may be overwritten was copied"
    out = compiled["tree"]({"a": y, "b": 2 * y})
    np.testing.assert_array_equal(out["sum"], np.full(size, size + 2.0))
    np.testing.assert_array_equal(out["twice"][0], np.full(size, 2.0))


def test_a_second_start_traces_and_compiles_nothing(start):
    first, work = start()
    assert set(work) == WORK
    second, work = start()
    assert not work
    for compiled in (first, second):
        check(compiled)
    with pytest.raises(TypeError, match="compiled"):
        second["add"](jnp.ones(8), jnp.ones(8))


def test_what_differs_is_not_taken(start, tmp_path, monkeypatch):
    start()
    check(start(programs(size=8))[0], size=8)  # other shapes
    check(start(programs(factor=5.0), source="other")[0], factor=5.0)
    assert not start(source="other")[1] and start(programs(size=9))[1]
    files = len(list((tmp_path / "programs").iterdir()))
    kept_module._surroundings.cache_clear()
    monkeypatch.setattr(kept_module, "_LIBRARIES", ("jax",))  # as if another were installed
    try:
        assert start()[1]
    finally:
        kept_module._surroundings.cache_clear()
    assert len(list((tmp_path / "programs").iterdir())) == files + 1


@pytest.mark.parametrize("harm", ["cut", "changed", "emptied", "foreign"])
def test_a_damaged_file_is_told_and_replaced(harm, start, tmp_path, caplog):
    start()
    (file,) = (tmp_path / "programs").iterdir()
    whole = file.read_bytes()
    half = len(whole) // 2
    changed = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    harmed = {"cut": whole[:half], "changed": changed, "emptied": b"", "foreign": b"x" * 999}
    file.write_bytes(harmed[harm])
    with caplog.at_level(logging.WARNING):
        compiled, work = start()
    assert work
    check(compiled)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == f"{file} is damaged: programs are compiled anew"
    assert not start()[1]


def test_a_program_that_jaxs_cache_has_no_longer_is_compiled(start, caplog, monkeypatch):
    start()
    gone = lambda *_: (None, None)  # noqa: E731
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(compilation_cache, "get_executable_and_time", gone)
        compiled, work = start()
    assert work
    check(compiled)
    assert all("no longer has it" in record.getMessage() for record in caplog.records[:2])
    assert not start()[1]


def test_what_jaxs_cache_cannot_read_is_replaced(start):
    start()

    def compiled():
        def function(x: jax.Array) -> jax.Array:
            return x * 1.25 + 0.5

        made, key = compile_noting_key(jax.jit(function).lower(jnp.ones(3)))
        np.testing.assert_array_equal(made(jnp.ones(3)), np.full(3, 1.75))
        assert compilation_cache._cache is not None
        return compilation_cache._cache._path / f"{key}-cache"

    entry = compiled()
    entry.write_bytes(entry.read_bytes()[:-200])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        assert compiled() == entry
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled() == entry


def test_a_folder_that_cannot_be_written(start, tmp_path, caplog):
    (tmp_path / "programs").write_text("a file")
    with caplog.at_level(logging.WARNING):
        check(start()[0])
    assert "could not be kept in" in caplog.text


# Solves a triangular system by a program that is kept in the folder named; whether it was.
SOLVES = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from flexllm_jax.compile.buckets import Program, compile_programs, use_persistent_cache
from flexllm_jax.compile.kept import KeptPrograms

def solve(a, b):
    return jax.lax.linalg.triangular_solve(a, b, left_side=True, lower=True)

use_persistent_cache(Path(sys.argv[1]))
kept = KeptPrograms(Path(sys.argv[1]), "solve", jax.devices()[0])
shape = jax.ShapeDtypeStruct((2, 2), jnp.float32)
found = bool(kept._entries)
listed = [Program("solve", solve, (shape, shape))]
program = compile_programs(listed, progress=False, kept=kept)["solve"]
print(found, program(2 * jnp.eye(2), jnp.ones((2, 2)))[0, 0])
"""


def test_another_process_calls_what_solves_systems(tmp_path):
    """What it calls is found while it is lowered, which another process does not do."""
    command = [sys.executable, "-c", SOLVES, str(tmp_path)]
    for kept in (False, True):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.stdout.split() == [str(kept), "0.5"], (run.returncode, run.stderr[-500:])


def test_an_engine_that_starts_again_traces_no_program(llama: Path, tmp_path: Path) -> None:
    """What is compiled or read beside them is how weights are put on the device."""
    options, answers, counts = SamplingParams(max_tokens=9, ignore_eos=True), [], []
    for _ in range(2):
        with counted_work() as work:
            llm = start_engine(llama, tmp_path, cache={"num_pages": 49})
        with llm:
            answers.append(llm.generate(random_prompts([20, 5]), options))
            counts.append(work.count("backend_compile_duration"))
    assert answers[0][0].outputs[0].token_ids == answers[1][0].outputs[0].token_ids
    assert counts[1] < len(llm.engine.runner.programs) / 4, counts
