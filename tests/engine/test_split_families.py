"""Models of which a device has no plain slice, split over devices: gated delta nets, projections
that give several things side by side, norms over all heads, and what tokens have for single layers.

The engine's programs run on 4 devices; what they say is compared with transformers and PEFT on one,
and what is exported with what was loaded. FLEXLLM_TP_DEVICES=2,4 tests other numbers of devices,
and FLEXLLM_TP_FAMILIES=olmo2,glm4,… others of the families.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flexllm_jax.models.config import ModelConfig
from flexllm_jax.peft.adapter import TARGET_MODULES
from flexllm_jax.peft.hf.peft import load_adapter
from tests import checkpoints
from tests.engine.split_families import FORWARD, STEPS
from tests.engines import load_base, load_with_adapter, reference_logprobs, save_random_adapter
from tests.numerics.test_families import peft_gradients

_HEADS = {"num_kv_heads": 4}
_DELTA = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
OPTIONS = {
    "qwen3_5": _DELTA,
    "olmo_hybrid": _DELTA | _HEADS,
    "phi3": _HEADS | {"num_hidden_layers": 1},
    "gemma4": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
    },
    "gemma4_unified": {"num_global_key_value_heads": 2},
}
FAMILIES = os.environ.get("FLEXLLM_TP_FAMILIES", "qwen3_5,olmo_hybrid,phi3,gemma4").split(",")
DEVICES = [n for n in os.environ.get("FLEXLLM_TP_DEVICES", "4").split(",") if n != "1"]
LENGTHS = [max(end for pieces in STEPS for s, _, end in pieces if s == i) for i in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all of them have run."""
    folder, paths = tmp_path_factory.mktemp("families"), []
    for family in FAMILIES:
        make = getattr(checkpoints, f"make_{family}")
        path = make(folder / family, **OPTIONS.get(family, {}))
        model = ModelConfig.from_hf(path)
        names = [n for n, m in TARGET_MODULES.items() if m in model.projections and m != "head"]
        within = "model.*" if model.names.root == "model" else ".*language_model.*"
        targets = rf"{within}\.({'|'.join(names)})"
        where = path.with_suffix(".adapter")
        save_random_adapter(path, where, r=3, lora_alpha=5, target_modules=targets)
        random = np.random.default_rng(0)
        tokens = [random.integers(3, model.vocab_size, n).tolist() for n in LENGTHS]
        path.with_suffix(".json").write_text(json.dumps(tokens))
        paths.append(str(path))
    command = [sys.executable, "-m", "tests.engine.split_families", str(folder), ",".join(DEVICES)]
    done = subprocess.run([*command, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, folder):
    """One of the families, on one device."""
    path = folder / request.param
    model, adapter = ModelConfig.from_hf(path), path.with_suffix(".adapter")
    tokens = [np.array(own) for own in json.loads(path.with_suffix(".json").read_text())]
    own = SimpleNamespace(path=path, saved=adapter, model=model, tokens=tokens)
    own.adapter = load_adapter(adapter, model, path)
    own.gradients = peft_gradients(own)[1]
    return own


@pytest.fixture(params=DEVICES)
def run(request, family):
    """What came of it, on several devices."""
    stem = f"{family.path.name}-{request.param}"
    out = family.path.parent
    return SimpleNamespace(
        arrays=np.load(out / f"{stem}.npz"),
        counts=json.loads((out / f"{stem}.json").read_text()),
        adapter=out / f"{stem}.adapter",
        merged=out / f"{stem}.merged",
    )


def test_logprobs_are_those_of_transformers_and_peft(family, run):
    adapted = load_with_adapter(family.path, family.saved, attn_implementation="eager")
    start = 0
    for tokens in family.tokens:
        expected = reference_logprobs(adapted, tokens.tolist())
        expected = expected[np.arange(len(tokens) - 1), tokens[1:]]
        own = run.arrays["logprob"][start : start + len(tokens) - 1]
        np.testing.assert_allclose(own, expected, atol=1e-4 * np.abs(expected).max())
        start += len(tokens)


def test_gradients_are_those_of_peft(family, run):
    assert len(family.gradients) == len(run.arrays.files) - 1
    for (layer, module, factor), expected in family.gradients.items():
        rank = family.adapter.config.r
        own = run.arrays[f"{layer}/{module}/{factor}"]
        own = own[:, :rank] if factor == "a" else own[:rank]
        error = np.linalg.norm(own - expected) / np.linalg.norm(expected)
        assert error < 1e-4, (layer, module, factor, error)


def test_exports_are_as_without_a_split(family, run):
    def tensors(path):
        return load_file(next(path.glob("*.safetensors")))

    own, expected = tensors(run.adapter), tensors(family.saved)
    torch.testing.assert_close(own, expected, rtol=0, atol=0)
    merged = load_base(run.merged, torch.float32)
    base = load_with_adapter(family.path, family.saved).merge_and_unload()
    torch.testing.assert_close(merged.state_dict(), base.state_dict(), rtol=1e-5, atol=1e-6)


def test_layers_have_two_all_reduces(family, run):
    """Forward and backward; norms over all heads have one more of two numbers for each token, which
    the backward needs again. XLA joins those that do not wait for one another, as the two of a
    parallel layer."""
    counts, model = dict(run.counts), family.model
    norms = [getattr(spec.mixer, "qk_norm", None) == "projection" for spec in model.layers]
    # One more joins the split embedding, and that for single layers.
    own = [2 - spec.parallel for spec in model.layers]
    assert counts.pop(FORWARD) == 1 + sum(own) + sum(norms)
    for spec, count in zip(model.kinds, counts.values(), strict=True):
        at = model.layers.index(spec)
        assert own[at] <= count <= own[at] + 2 * norms[at]
