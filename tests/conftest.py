"""Shared by all tests: how XLA compiles, small checkpoints, and one engine that most tests use.

Compiling is what costs time here, so programs are compiled without optimization, in one piece and,
up to jax 0.10, without the newer emitters of fusions, which take twice as long (the numbers are the
same). They are kept in a cache beside pytest's own. This has to be said before jax is imported.
"""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    " --xla_cpu_parallel_codegen_split_count=1"
)
if version("jaxlib").startswith("0.10."):  # later ones have no such flag
    os.environ["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_cpu_use_fusion_emitters=false"

import pytest
import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_llama, save_tokenizer
from tests.engines import given_back, start_engine

settings.register_profile("nightly", max_examples=10_000)  # pytest --hypothesis-profile=nightly

# Files that take longest, longest first. They begin before all others, so that the workers end at
# about the same time.
LONGEST = (
    "tests/engine/test_tensor_parallel.py",
    "tests/scripts/test_processes.py",
    "tests/numerics/test_gradients.py",
    "tests/scripts/test_scripts.py",
    "tests/finetune/test_resume.py",
    "tests/engine/test_scheduler_options.py",
    "tests/numerics/test_bypasses.py",
    "tests/kernels/test_ragged_paged_attention.py",
    "tests/scripts/test_gpu_scripts.py",
    "tests/compile/test_collectives.py",
    "tests/server/test_faults.py",
    "tests/kernels/test_grouped_lora.py",
)


def pytest_collection_modifyitems(items):
    place = {path: i for i, path in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.split("::")[0], len(place)))


torch.set_num_threads(1)  # the models are small: threads would only wait for each other


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A Llama with llama3 RoPE scaling and grouped-query attention, and a byte-level tokenizer."""
    path = make_llama(tmp_path_factory.mktemp("llama"), vocab=272, rope_scaling="llama3")
    return save_tokenizer(path)


@pytest.fixture(scope="session")
def llama_reference(llama):
    """The same in transformers."""
    return AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def llm(llama, tmp_path_factory):
    """The engine most tests share: float32, a pool that six long requests overfill."""
    engine = start_engine(llama, tmp_path_factory.mktemp("runs"))
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def shared_engines_are_given_back():
    """No test leaves its jobs and adapters to the next, least of all one that fails."""
    with given_back():
        yield
