"""Compiling without a GPU tells what does not compile and goes on; wrong results are found."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from flexllm_jax.experiments.gpu.compile import TARGETS, Compilation, chips, compile_all
from flexllm_jax.experiments.gpu.first_contact import essential_cases
from flexllm_jax.experiments.gpu.growth import grown, record
from flexllm_jax.experiments.gpu.kernels import kernel_cases
from flexllm_jax.experiments.gpu.llama_8b import write_config
from flexllm_jax.experiments.gpu.tuning import keys_and_cases
from flexllm_jax.models.config import ModelConfig
from kernels_pallas.cases import KERNELS
from kernels_pallas.check import relative_error, widened


def test_the_chips_are_described() -> None:
    assert chips() == ["a100", "h100", "h200"]
    for chip in chips():
        assert "gpu_device_info" in (TARGETS / f"{chip}.txtpb").read_text()


def test_what_does_not_compile_is_a_row_with_its_fault() -> None:
    def fails() -> None:
        raise ValueError("no such\n  layout")

    target: Any = SimpleNamespace(name="h200")
    jobs = [Compilation("engine", name, target, fails, (), ()) for name in ("one", "two")]
    table, rows = compile_all(jobs)
    assert table.row_count == 2
    assert [(row["chip"], row["kind"], row["name"]) for row in rows] == [
        ("h200", "engine", "one"),
        ("h200", "engine", "two"),
    ]
    assert all(len(row["faults"]) == 1 for row in rows)


def test_a_program_that_grows_is_told(tmp_path) -> None:
    row: dict[str, Any] = {"chip": "h200", "kind": "engine", "name": "unit/loss", "launches": 60}
    row |= {"outside_graphs": {"kWhile ": 1}, "temp": 2**20, "kernels": []}
    versions, file = {"jax": "1"}, tmp_path / "compiled.json"
    record([row, {"chip": "h200", "faults": ["fails"]}], versions, file)
    assert grown([row | {"launches": 63, "temp": 2**20 + 99}], versions, file) == []
    assert grown([row | {"launches": 64}, row | {"name": "new"}], versions, file) == [
        "h200/engine/unit/loss: launches 60 -> 64"
    ]
    assert grown([row | {"launches": 64}], {"jax": "2"}, file) == []


def test_first_contact_takes_cases_of_every_kernel_that_there_are() -> None:
    cases = essential_cases("", dry_run=False)  # a name that is no more is a KeyError
    assert {name.split("/")[0] for name in cases} == set(KERNELS)
    assert list(essential_cases("prefill-8192", dry_run=False)) == [
        "ragged_paged_attention/llama-3.1-8b/tp1/prefill-8192"
    ]


def test_the_shape_is_that_of_the_8b_model(tmp_path) -> None:
    model = ModelConfig.from_hf(write_config(tmp_path))
    assert (model.num_layers, model.d_model, model.vocab_size) == (32, 4096, 128256)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_cases_to_check_and_to_tune(kernel: str) -> None:
    for dry_run in (False, True):
        cases = kernel_cases(kernel, dry_run=dry_run)
        assert cases and {found for found, _ in cases} == {kernel}
    assert keys_and_cases(kernel, dry_run=True)


def test_an_error_is_relative_to_the_largest_value() -> None:
    expected = jnp.array([0.0, -4.0])
    assert relative_error(expected + 0.5, expected) == 0.125
    assert relative_error((expected, expected.at[0].set(jnp.nan)), (expected,) * 2) > 1e38


def test_only_bfloat16_is_widened() -> None:
    wide = widened((jnp.zeros(1, jnp.bfloat16), jnp.zeros(1, jnp.int8), jax.random.key(0)))
    assert [str(x.dtype) for x in wide[:2]] == ["float32", "int8"]
