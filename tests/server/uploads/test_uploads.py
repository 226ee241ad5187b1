"""Files in parts through the unmodified openai SDK."""

import asyncio
import hashlib
import json
import os

import openai
import pytest
from fastapi.testclient import TestClient

from flexllm_jax.config import build_config
from flexllm_jax.server.app import Server
from flexllm_jax.server.database import now
from flexllm_jax.server.uploads.store import UploadRow
from tests.server.running import LIMITED_KEY, make_config

ROWS = b"".join(json.dumps({"prompt": f"row {i}"}).encode() + b"\n" for i in range(200))


def test_a_file_in_parts_is_the_file(client, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROWS)
    md5 = hashlib.md5(ROWS).hexdigest()
    upload = client.uploads.upload_file_chunked(
        file=path, mime_type="application/jsonl", purpose="fine-tune", part_size=1000, md5=md5
    )
    assert (upload.status, upload.object, upload.bytes) == ("completed", "upload", len(ROWS))
    assert upload.expires_at == upload.created_at + 3600
    file = upload.file
    assert (file.filename, file.bytes, file.purpose) == ("rows.jsonl", len(ROWS), "fine-tune")
    assert client.files.content(file.id).read() == ROWS
    client.files.delete(file.id)


def start(client, size, **fields):
    ask = {"filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "batch"}
    return client.uploads.create(bytes=size, **ask | fields).id


def test_the_order_is_that_of_the_end(client):
    expires = {"anchor": "created_at", "seconds": 7200}
    upload = start(client, 6, expires_after=expires)
    parts = [client.uploads.parts.create(upload, data=data).id for data in (b"def", b"abc")]
    done = client.uploads.complete(upload, part_ids=parts[::-1])
    assert client.files.content(done.file.id).read() == b"abcdef"
    assert done.file.expires_at == done.file.created_at + 7200
    with pytest.raises(openai.BadRequestError, match="is completed"):
        client.uploads.complete(upload, part_ids=parts)
    with pytest.raises(openai.BadRequestError, match="is completed"):
        client.uploads.parts.create(upload, data=b"x")


def test_what_is_refused(server, client):
    other = server.client(LIMITED_KEY)
    upload = start(client, 5)
    part = client.uploads.parts.create(upload, data=b"abc").id
    stranger = client.uploads.parts.create(start(client, 5), data=b"ab").id
    complete, create = client.uploads.complete, client.uploads.create
    named = {"filename": "a", "mime_type": "text/plain", "purpose": "batch"}
    for ask, error, reason in (
        (lambda: client.uploads.parts.create(upload, data=b"abc"), 400, "more than the 5 bytes"),
        (lambda: client.uploads.parts.create(upload, data=b""), 400, "empty"),
        (lambda: complete(upload, part_ids=[part]), 400, "have 3 bytes, the upload has 5"),
        (lambda: complete(upload, part_ids=[part, stranger]), 400, "is no part of"),
        (lambda: complete(upload, part_ids=[part, part]), 400, "twice"),
        (lambda: create(bytes=200_001, **named), 413, "at most 200000"),
        (lambda: create(bytes=1, **named | {"purpose": "vision"}), 400, "purpose"),
        (lambda: other.uploads.parts.create(upload, data=b"ab"), 404, "no such upload"),
        (lambda: other.uploads.cancel(upload), 404, "no such upload"),
    ):
        with pytest.raises(openai.APIStatusError, match=reason) as refused:
            ask()
        assert refused.value.status_code == error
    rest = client.uploads.parts.create(upload, data=b"de").id
    with pytest.raises(openai.BadRequestError, match="md5"):
        complete(upload, part_ids=[part, rest], md5="0" * 32)
    assert client.uploads.cancel(upload).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="is cancelled"):
        complete(upload, part_ids=[part, rest])


def test_a_restart_goes_on_and_forgets_what_has_expired(chat_llama, tmp_path):
    """Storage counts the parts as long as they are there."""
    config = build_config(make_config(chat_llama, tmp_path), "test")
    folder = tmp_path / "server" / "uploads"

    def ask(server, path, **fields):
        return TestClient(server.app).post(f"/v1/uploads{path}", **fields).json()

    server, made = Server(config), []
    named = {"mime_type": "text/plain", "purpose": "batch", "bytes": 3}
    for name in ("late", "whole"):
        upload = ask(server, "", json=named | {"filename": name})["id"]
        part = ask(server, f"/{upload}/parts", files={"data": ("part", b"abc")})
        made += [upload, part["id"]]
    server.database.close()
    late, _, whole, rest = made
    left = folder / "part_left"
    left.write_bytes(b"of a process that was killed")
    os.utime(left, (1, 1))

    server = Server(config)
    storage, everybody = server.files.storage, server.keys.client(None)
    assert storage.total - storage.room(everybody) == 6

    def expire(session):
        session.get(UploadRow, late).expires_at = now()

    server.database.run_now(expire)
    asyncio.run(server.uploads.tidy())
    assert [path.name for path in folder.iterdir()] == [rest]
    assert "is expired" in ask(server, f"/{late}/cancel")["error"]["message"]
    done = ask(server, f"/{whole}/complete", json={"part_ids": [rest]})
    assert done["status"] == "completed" and list(folder.iterdir()) == []
    assert server.files.path(done["file"]["id"]).read_bytes() == b"abc"
    assert storage.total - storage.room(everybody) == 3
    server.database.close()
