"""A client of the shared engine, and the adapter that its models begin with."""

import pytest

from tests.engine.calls.client import Client
from tests.engines import save_random_adapter


@pytest.fixture(scope="module")
def client(llm):
    return Client(llm)


@pytest.fixture(scope="module")
def start(llama, tmp_path_factory):
    return save_random_adapter(llama, tmp_path_factory.mktemp("start"))
