"""The tuning tables: what is in them is used, and what a tuner writes is read again."""

import json

import pytest

from kernels_pallas import tuning
from kernels_pallas.cases import KERNELS


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table in a folder of its own."""
    file = tmp_path / "tuning.json"
    file.write_text(json.dumps({"h200": {"decode": {"keys": 64}}, "a100": {}}))
    monkeypatch.setattr(tuning, "table_file", lambda kernel: file)
    tuning.read_table.cache_clear()
    yield file
    tuning.read_table.cache_clear()


def test_the_table_goes_before_the_default(table):
    default = {"keys": 32, "num_warps": 4}
    assert tuning.tiles("any", "h200", "decode", default) == {"keys": 64, "num_warps": 4}
    assert tuning.tiles("any", "a100", "decode", default) == default


def test_a_trial_ends(table):
    for key, before in (("decode", {"keys": 64}), ("chunks", {"keys": 1})):
        with tuning.trial("any", "h200", key, {"keys": 128}):
            assert tuning.tiles("any", "h200", key, {"keys": 1}) == {"keys": 128}
        assert tuning.tiles("any", "h200", key, {"keys": 1}) == before


def test_what_is_written_is_read(table):
    written = {"h200": {"decode": {"keys": 16}, "chunks": {"rows": 128}}, "a100": {}}
    tuning.write_table("any", written)
    assert tuning.read_table("any") == written


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_table_names_known_chips(kernel):
    tuning.read_table.cache_clear()
    assert tuning.read_table(kernel).keys() == {"h200", "a100"}
