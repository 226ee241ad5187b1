"""The table of model families in the docs, which the build makes from the families' rows."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from flexllm_jax.models.families import FAMILIES, WRAPPERS
from tests import checkpoints


@pytest.fixture(scope="module")
def rows():
    """Cells by architecture."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "docs" / "_extensions"))
    made = importlib.import_module("families_reference").families_markdown()
    lines = made.splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[1].strip("`"): row for row in cells}


def test_it_has_every_family(rows):
    assert rows.keys() == FAMILIES.keys() | WRAPPERS.keys()


@pytest.mark.parametrize("family", ["phi3", "glm4", "gemma2"])
def test_sites_of_lora_are_the_projections_in_the_checkpoint(rows, family, tmp_path):
    path = getattr(checkpoints, f"make_{family}")(tmp_path)
    with safe_open(path / "model.safetensors", "numpy") as file:
        names = " ".join(file.keys())
    stored = set(re.findall(r"(\w+_proj)\.weight", names))
    (row,) = (r for name, r in rows.items() if name.lower().startswith(family))
    usual = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    sites = set(re.findall(r"\w+_proj", row[3].replace("the usual seven", usual)))
    assert sites == stored


def test_it_says_what_a_family_does(rows):
    assert "a window in 6 of 12 layers; a soft cap of scores" in rows["Gemma2ForCausalLM"][2]
    assert rows["LlamaForCausalLM"][2] == "nothing"
