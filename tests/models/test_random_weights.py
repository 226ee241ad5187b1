"""Random weights have the layout of a checkpoint's, and an engine serves with them."""

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoConfig

from flexllm_jax import SamplingParams
from flexllm_jax.models.checkpoints.hf_weights import abstract_parameters
from flexllm_jax.models.checkpoints.random_weights import random_parameters
from flexllm_jax.models.config import ModelConfig
from tests.checkpoints import make_qwen2, save_tokenizer
from tests.engines import random_prompts, start_engine


def test_they_are_as_transformers_initializes_them(tmp_path):
    path = make_qwen2(tmp_path / "model")
    model = ModelConfig.from_hf(path)
    params = random_parameters(model, jnp.float32)
    assert jax.eval_shape(lambda: params) == abstract_parameters(model, jnp.float32)
    layer = params["layers"][0]
    assert np.all(layer["pre_attn_norm"]["weight"] == 1) and np.all(layer["q"]["bias"] == 0)
    std = AutoConfig.from_pretrained(path).initializer_range
    for matrix in (params["embed"]["weight"], layer["q"]["kernel"], layer["down"]["kernel"]):
        assert abs(float(jnp.std(matrix)) / std - 1) < 0.1
    assert not np.array_equal(layer["q"]["kernel"], params["layers"][1]["q"]["kernel"])


def test_an_engine_needs_no_more_than_a_configuration_and_a_tokenizer(tmp_path):
    path = save_tokenizer(make_qwen2(tmp_path / "model", vocab=272))
    for file in path.glob("*.safetensors*"):
        file.unlink()
    with start_engine(path, tmp_path, load_format="dummy") as llm:
        outputs = llm.generate(random_prompts([9, 30]), SamplingParams(max_tokens=5))
        assert all(len(output.token_ids) >= 1 for output in outputs)
