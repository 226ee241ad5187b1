"""Clients that send or read slowly, or never, hold up nobody: each limit is one of `server`."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from flexllm_jax.config import build_config
from flexllm_jax.server.app import Server
from flexllm_jax.server.http.connections import MAX_HEAD_BYTES
from flexllm_jax.server.run import http_server, listen
from tests.server.running import make_config

PATIENCE_S = 0.5
LIMITS = {
    "head_timeout_s": PATIENCE_S,
    "keep_alive_s": PATIENCE_S,
    "stalled_after_s": PATIENCE_S,
    "least_bytes_per_s": 1000,
    "host": "127.0.0.1",
}
KEYS = [{"name": name, "key": f"key-of-{name}"} for name in ("a", "b")]
GET = b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n"
UPLOAD = b"POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=B\r\n"


def form(data):
    head = b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--B\r\n'
    head += b'Content-Disposition: form-data; name="file"; filename="r"\r\n\r\n'
    return head + data + b"\r\n--B--\r\n"


def upload(data, key=None, stated=None):
    """The bytes of an upload; `stated`: another length than its own."""
    body = form(data)
    head = UPLOAD + b"Authorization: Bearer key-of-%s\r\n" % (key or "none").encode()
    return head + b"Content-Length: %d\r\n\r\n" % (stated or len(body)) + body


class Http:
    """The HTTP half of a server, in a thread; its engine is never started."""

    def __init__(self, model, folder, **section):
        config = make_config(model, folder)
        config["server"] |= LIMITS | section
        config = build_config(config, "test")
        self.server, self.listener = Server(config), listen(config)
        self.address = self.listener.getsockname()[:2]
        self.http = http_server(self.server)
        self.thread = threading.Thread(
            target=lambda: asyncio.run(self.http.serve(sockets=[self.listener]))
        )
        self.thread.start()

    def connect(self, data=b""):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.settimeout(10)
        connection.connect(self.address)
        connection.sendall(data)
        return connection

    def ask(self, data):
        """Status and body of the first answer."""
        with self.connect(data) as connection:
            return answer(connection)

    @property
    def used(self):
        return self.server.files.storage.total - self.server.files.storage._room(None, None)

    def close(self):
        self.http.should_exit = True
        for connection in list(self.http.server_state.connections):
            connection.loop.call_soon_threadsafe(connection.transport.abort)
        self.thread.join(10)
        self.server.database.close()


def answer(connection):
    """Status and body of an answer that says its length; (None, b"") when there is none."""
    file = connection.makefile("rb")
    with contextlib.suppress(ConnectionError):
        status = file.readline()
        headers = {}
        while (line := file.readline().strip()) and b":" in line:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        if status:
            return int(status.split()[1]), file.read(int(headers.get(b"content-length", 0)))
    return None, b""


def is_closed(connection, within_s=4 * PATIENCE_S):
    """Whether the server closes a connection."""
    connection.settimeout(within_s)
    with contextlib.suppress(TimeoutError):
        try:
            while connection.recv(65536):
                pass
        except ConnectionError:
            pass
        return True
    return False


def drip(connection, piece, every_s=0.1, for_s=8 * PATIENCE_S):
    """Send a piece again and again; seconds until the server had enough."""
    began = time.monotonic()
    connection.settimeout(every_s)
    while time.monotonic() - began < for_s:
        try:
            connection.sendall(piece)
            connection.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            continue
        except ConnectionError:
            pass
        return time.monotonic() - began
    return None


@pytest.fixture(scope="module")
def start(llama, tmp_path_factory):
    """Start a server with some limits."""
    with contextlib.ExitStack() as stack:

        def starting(**section):
            http = Http(llama, tmp_path_factory.mktemp("http"), **section)
            stack.callback(http.close)
            return http

        yield starting


@pytest.fixture(scope="module")
def http(start):
    return start(max_connections=100)


def test_uploads_that_stop_hold_up_no_other(http):
    idle = [http.connect(upload(b"", stated=1000)[:-9]) for _ in range(64)]
    began = time.monotonic()
    assert http.ask(upload(b'{"text": "a"}\n'))[0] == 200
    assert time.monotonic() - began < PATIENCE_S
    for connection in idle:
        status, body = answer(connection)
        assert status == 408 and "too slowly" in json.loads(body)["error"]["message"]
        assert is_closed(connection)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"GET /version HT",
        b"GET /version HTTP/1.1\r\nHost: a\r\n",
        b"\r\n",
        GET + b"GET /ver",
    ],
)
def test_a_head_has_its_time(http, head):
    whole = head.startswith(GET)
    stopped, dripping = http.connect(head), http.connect(head)
    if whole:
        assert answer(stopped)[0] == answer(dripping)[0] == 200
    taken = drip(dripping, b"x" if head.strip() else b"\r\n")
    assert taken is not None and taken < 4 * PATIENCE_S
    assert answer(stopped)[0] == 408 or is_closed(stopped)


@pytest.mark.parametrize("path", [b"/v1/files", b"/v1/completions"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_has_its_rate(http, chunked, path):
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 9000"
    begin, piece = form(b"")[: -len(b"\r\n--B--\r\n")], b"x"
    if chunked:
        begin, piece = b"%x\r\n%s\r\n" % (len(begin), begin), b"1\r\nx\r\n"
    head = UPLOAD.replace(b"/v1/files", path)
    connection = http.connect(head + framing + b"\r\n\r\n" + begin)
    taken = drip(connection, piece)
    assert taken is not None and PATIENCE_S / 2 < taken < 4 * PATIENCE_S
    assert answer(connection)[0] == 408


def test_a_burst_is_no_credit_and_a_steady_client_is_served(http):
    data = b"x" * 100_000
    burst = http.connect(upload(data, stated=len(data) + 500))
    began = time.monotonic()
    assert answer(burst)[0] == 408 and time.monotonic() - began < 4 * PATIENCE_S
    steady, whole = http.connect(), upload(b"x" * 4000)
    for start in range(0, len(whole), 300):
        steady.sendall(whole[start : start + 300])
        time.sleep(0.1)  # 3,000 bytes a second, for longer than the patience lasts
    assert answer(steady)[0] == 200


def test_heads_trailers_and_pipelines_have_an_end(http):
    size = 2 * MAX_HEAD_BYTES
    for head in (
        b"GET /version HTTP/1.1\r\nHost: a\r\nX: " + b"x" * size + b"\r\n\r\n",
        b"GET /version HTTP/1.1\r\n" + b"X: x\r\n" * (size // 6) + b"\r\n",
        b"GET /" + b"x" * size,
        b"\r\n" * size,
    ):
        with http.connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(head)
            assert answer(connection)[0] in (431, None)
            assert is_closed(connection)
    chunked = UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
    trailing = http.connect(chunked)
    with contextlib.suppress(ConnectionError):
        trailing.sendall(b"X: " + b"x" * 2 * size)
    assert is_closed(trailing)
    few = http.connect(GET * 5)
    assert [answer(few)[0]] == [200] and not few._closed
    many = http.connect()
    with contextlib.suppress(ConnectionError):
        many.sendall(GET * 2000)
    assert is_closed(many)
    assert http.ask(GET)[0] == 200


def test_an_answer_that_is_not_read_is_given_up(http):
    data = b"x" * 20_000_000
    file_id = json.loads(http.ask(upload(data))[1])["id"]
    get = b"GET /v1/files/" + file_id.encode() + b"/content HTTP/1.1\r\nHost: a\r\n\r\n"
    never, slow, steady = (http.connect(get) for _ in range(3))
    for each in (never, slow, steady):
        each.recv(1)
    open_before = len(http.http.server_state.connections)
    assert open_before >= 3
    end, read = time.monotonic() + 4 * PATIENCE_S, 1
    while time.monotonic() < end:
        slow.recv(1)
        read += len(steady.recv(1 << 16))
        time.sleep(0.05)
    assert len(http.http.server_state.connections) <= open_before - 2
    while read < len(data):
        piece = steady.recv(1 << 20)
        assert piece
        read += len(piece)
    for connection in (never, slow, steady):
        connection.close()


def test_when_there_are_too_many_connections_an_idle_one_makes_room(start):
    http = start(max_connections=10, head_timeout_s=60, keep_alive_s=60, stalled_after_s=60)
    idle = [http.connect() for _ in range(10)]
    new = http.connect(GET)
    assert answer(new)[0] == 200
    assert is_closed(idle[0]) and not any(is_closed(c, 0.01) for c in idle[1:])
    busy = [http.connect(upload(b"x", stated=1000)) for _ in range(10)]
    time.sleep(0.2)
    assert all(is_closed(c, 0.1) for c in (*idle, new))
    status, body = http.ask(GET)
    assert status == 503 and "too many connections" in body.decode()
    assert not any(is_closed(c, 0.01) for c in busy)


def test_without_a_key_no_body_is_read(start):
    http = start(api_keys=KEYS, max_connections=10)
    connection = http.connect(upload(b"x", stated=50_000))
    assert answer(connection)[0] == 401
    assert is_closed(connection)


def test_bodies_take_limited_memory_and_one_key_leaves_some_to_another(start):
    http = start(api_keys=KEYS, max_bodies_bytes=90_000, stalled_after_s=60)

    def post(key, size):
        head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        head += b"Authorization: Bearer key-of-%s\r\nContent-Length: %d\r\n\r\n"
        return http.connect(head % (key, size) + b" " * (size - 1))  # all but the last

    held = post(b"a", 40_000)
    time.sleep(0.2)
    more = post(b"a", 40_000)
    more.sendall(b" ")
    assert answer(more)[0] == 429
    other = post(b"b", 20_000)
    other.sendall(b" ")
    assert answer(other)[0] == 400  # it was read; it is no JSON
    held.sendall(b" ")
    assert answer(held)[0] == 400
    again = post(b"a", 40_000)  # what was held is given back
    again.sendall(b" ")
    assert answer(again)[0] == 400


def test_racing_uploads_stay_within_the_storage(start):
    http = start(max_storage_bytes=100_000, max_connections=200)
    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(lambda _: http.ask(upload(b"x" * 9000)), range(90)))
    kept = [json.loads(body) for status, body in answers if status == 200]
    assert {status for status, _ in answers} == {200, 413}
    assert 5 <= len(kept) <= 11
    assert http.used == sum(file["bytes"] for file in kept)  # what failed is given back
    for file in kept:
        delete = b"DELETE /v1/files/" + file["id"].encode() + b" HTTP/1.1\r\nHost: a\r\n\r\n"
        with ThreadPoolExecutor(4) as pool:
            assert 200 in {status for status, _ in pool.map(http.ask, [delete] * 4)}
    assert http.used == 0
    assert list(http.server.files.folder.iterdir()) == []


def test_one_keys_files_leave_room_for_anothers(start):
    limited = {"name": "c", "key": "key-of-c", "storage_bytes": 5000}
    http = start(api_keys=[*KEYS, limited], max_storage_bytes=80_000)

    def fill(key, size=4000):
        count = 0
        while http.ask(upload(b"x" * size, key))[0] == 200:
            count += 1
        return count

    counts = [fill("a"), fill("b"), fill("c")]
    assert 8 <= counts[0] <= 10 and 4 <= counts[1] <= 5 and counts[2] == 1
    assert fill("a") == 0
