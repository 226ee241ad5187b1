"""Which type weights have: that of transformers' `auto`, or on a CPU one that it computes in."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flexllm_jax.models.checkpoints.dtype import checkpoint_dtype, engine_dtype, export_dtype
from flexllm_jax.models.fields import ModelConfigError
from tests.checkpoints import make_llama, save_tokenizer
from tests.engines import save_random_adapter, start_engine


def rename(path, **fields):
    file = path / "config.json"
    raw = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("dtype",)}
    file.write_text(json.dumps(raw | fields))


@pytest.mark.parametrize("field", ["dtype", "torch_dtype", None])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_a_checkpoints_type_is_what_transformers_finds(stored, field, tmp_path):
    path = make_llama(tmp_path, dtype=stored)
    rename(path, **({field: stored} if field else {}))
    expected = AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype
    assert f"torch.{checkpoint_dtype(path)}" == str(expected) == f"torch.{stored}"


@pytest.mark.parametrize(
    ("stored", "asked", "on_gpu", "on_cpu", "exported"),
    [
        ("bfloat16", "auto", "bfloat16", "float32", "bfloat16"),
        ("float32", "auto", "float32", "float32", "float32"),
        ("float16", "auto", "bfloat16", "float32", "float16"),
        ("float32", "bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32", "float32", "float32"),
    ],
)
def test_what_model_dtype_means(stored, asked, on_gpu, on_cpu, exported, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": stored}))
    assert engine_dtype(asked, tmp_path, "gpu").name == on_gpu
    assert engine_dtype(asked, tmp_path, "cpu").name == on_cpu
    assert export_dtype(asked, tmp_path).name == exported


def test_a_type_that_is_none_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"torch_dtype": "int4"}')
    says = r"torch_dtype='int4' is none of bfloat16, .* set model\.dtype"
    with pytest.raises(ModelConfigError, match=says):
        checkpoint_dtype(tmp_path)


def test_a_bfloat16_checkpoint_on_a_cpu(tmp_path, caplog):
    """It runs in float32, the start says so, and what is exported is bfloat16 again."""
    path = save_tokenizer(make_llama(tmp_path / "base", vocab=272, dtype="bfloat16"))
    adapter = save_random_adapter(path, tmp_path / "adapter", target_modules=["q_proj"])
    caplog.set_level("INFO")
    llm = start_engine(path, tmp_path / "runs", dtype="auto")
    try:
        assert llm.engine.runner.params["layers"][0]["q"]["kernel"].dtype == "float32"
        assert "in float32 (model.dtype: auto; the checkpoint has bfloat16)" in caplog.text
        llm.load_adapter("mine", adapter)
        llm.export_merged("mine", tmp_path / "merged")
    finally:
        llm.close()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    before, after = (load_file(p / "model.safetensors") for p in (path, tmp_path / "merged"))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, before[name]) == ("q_proj" not in name), name
