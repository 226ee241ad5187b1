"""Shared by all tests: how XLA compiles, small checkpoints, and one engine that most tests use.

Compiling is what costs time here, so programs are compiled without optimization (the numbers are
the same) and kept in a cache beside pytest's own. This has to be said before jax is imported.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_llama, save_tokenizer
from tests.engines import given_back, start_engine

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
