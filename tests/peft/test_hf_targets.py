"""Which modules an adapter changes, against PEFT's own function, whatever the fields say."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists

from flexllm_jax.models.names import USUAL
from flexllm_jax.peft.adapter import Adapter, AdapterError, LoraConfig
from flexllm_jax.peft.hf.targets import target_fields, targeted_sites
from tests.small_models import small_model

LAYERS = 3
MODEL = small_model(
    vocab_size=128,
    d_model=64,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=96,
)
PATHS = {
    USUAL.module_path(layer, module): (layer, module)
    for layer in range(LAYERS)
    for module in ("q", "k", "v", "o", "gate", "up", "down")
} | {"lm_head": (LAYERS, "head")}

names = st.sampled_from(
    [
        *("q_proj", "v_proj", "up_proj", "self_attn.k_proj", "1.mlp.down_proj", "lm_head"),
        *("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "mlp.gate_proj"),
        *("layers.1.self_attn.o_proj", "proj", "_proj", "c_attn", "layers.9.mlp.up_proj"),
    ]
)
expressions = st.sampled_from(
    [
        r".*\.[qv]_proj",
        r"model\.layers\.[02]\..*(up|down)_proj",
        r"lm_head|.*k_proj",
        r"q_proj",
        r".*layers\.1\.mlp\..*_proj",
        r".*\.(?!0)\d\..*o_proj",
    ]
)
layers = st.none() | st.integers(0, 4) | st.lists(st.integers(0, 4), max_size=3)
patterns = st.none() | st.sampled_from(["layers", "h", "", ["h", "layers"], [], ["blocks"]])


@settings(max_examples=120, deadline=None)  # regular expressions start a process each
@given(
    targets=st.lists(names, min_size=1, max_size=4, unique=True) | expressions,
    excluded=st.none() | st.lists(names, max_size=2) | expressions,
    layers=layers,
    pattern=patterns,
)
def test_the_modules_are_those_of_peft(targets, excluded, layers, pattern):
    raw = {
        "target_modules": targets,
        "exclude_modules": excluded,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    theirs = SimpleNamespace(**raw, modules_to_save=None, target_parameters=None)
    theirs.target_modules = targets if isinstance(targets, str) else set(targets)

    def is_target(path):
        result = check_target_module_exists(theirs, path)
        return result is True or isinstance(result, re.Match)

    expected = {site for path, site in PATHS.items() if is_target(path)}
    if expected:
        assert set(targeted_sites(raw, MODEL)) == expected
    else:
        with pytest.raises(AdapterError, match="matches no module of this model"):
            targeted_sites(raw, MODEL)


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(sorted(PATHS.values())), min_size=1))
def test_the_fields_of_an_export_select_its_modules(sites):
    adapter = Adapter(LoraConfig(4, 8, ("q_proj",)), {site: {} for site in sites})
    assert set(targeted_sites(target_fields(adapter, MODEL), MODEL)) == sites


def test_names_that_match_nothing_are_told(caplog):
    sites = targeted_sites({"target_modules": ["q_proj", "c_attn"]}, MODEL)
    assert sites == tuple((layer, "q") for layer in range(LAYERS))
    assert "c_attn match no module" in caplog.text


def test_all_linear_means_full_paths():
    """PEFT replaces it by the paths of all linear layers, so the layers named beside do not
    count."""
    raw = {
        "target_modules": "all-linear",
        "layers_to_transform": [0],
        "exclude_modules": ["k_proj"],
    }
    expected = {site for site in PATHS.values() if site[1] not in ("head", "k")}
    assert set(targeted_sites(raw, MODEL)) == expected
