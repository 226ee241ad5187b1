"""What finds no room is answered with status 507 and the reason, whoever was writing."""

from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from flexllm_jax.server.http import errors


@pytest.fixture
def client():
    app = FastAPI()
    errors.install(app)

    @app.post("/write")
    async def write(path: str) -> None:
        Path(path).write_bytes(b"x")

    return TestClient(app, raise_server_exceptions=False)


def test_a_full_disk_is_507(client):
    answer = client.post("/write", params={"path": "/dev/full"})
    assert answer.status_code == 507
    error = answer.json()["error"]
    assert error["type"] == "insufficient_storage_error"
    assert error["message"].startswith("nothing was kept: No space left on device; free space")


def test_another_failure_to_write_stays_one_of_the_server(client, tmp_path):
    assert client.post("/write", params={"path": str(tmp_path)}).status_code == 500
