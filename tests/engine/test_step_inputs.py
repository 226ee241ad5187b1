"""What the host sends of a step: no page tables, only pages that are new in them."""

from dataclasses import replace

import jax
import numpy as np

from flexllm_jax.config import Config
from flexllm_jax.engine.device.step import write_pages
from flexllm_jax.engine.memory.sizes import EngineSizes
from flexllm_jax.engine.memory.step_inputs import PAGE_WRITES, page_writes
from flexllm_jax.models.config import ModelConfig
from kernels_pallas.backend import XLA


def test_tables_get_new_pages_and_keep_the_others():
    random = np.random.default_rng(0)
    tables = random.integers(0, 99, (9, 400)).astype(np.int32)
    new = [
        (2, 0, random.integers(0, 99, 400).tolist()),
        (3, 17, [5]),
        (8, 1, random.integers(0, 99, 399).tolist()),
        (0, 300, random.integers(0, 99, 100).tolist()),
        (5, 0, random.integers(0, 99, 400).tolist()),
        (3, 17, [6, 7]),  # later in the same step: a sequence that starts again
    ]
    expected, written = tables.copy(), tables
    for row, first, pages in new:
        expected[row, first : first + len(pages)] = pages
    calls = list(page_writes(new, tables.shape))
    assert len(calls) == 2 and {places.shape for places in calls} == {(2, PAGE_WRITES)}
    for places in calls:
        assert len(set(places[0].tolist())) == PAGE_WRITES
        written = jax.jit(write_pages)(written, places)
    np.testing.assert_array_equal(written, expected)
    assert not list(page_writes([], tables.shape))


def test_a_step_of_many_long_sequences_sends_little(llama):
    """Llama 3.1's context of 131,072 tokens, 256 requests: the tables would be 9 MB a step."""
    config = Config.model_validate(
        {
            "model": {"path": str(llama)},
            "cache": {"page_size": 16},
            "scheduler": {"max_sequences": 256, "max_tokens_per_step": 2048},
        }
    )
    sizes = EngineSizes.from_config(config, ModelConfig.from_hf(llama), "gpu", XLA)
    sizes = replace(sizes, max_model_len=131_072)
    most = max(shape.size for shape in sizes.step_shapes.values())
    assert 4 * (most + 2 * PAGE_WRITES) < 100_000
