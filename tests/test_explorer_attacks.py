"""The explorer under attack, through real sockets: it stays bounded, answers others, and is silent.

The server runs in a process of its own, with an untrained model and little patience.
"""

import io
import json
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("starlette", reason="the extra 'explore' is not installed")

from starlette.testclient import TestClient

from equipoise.aggregate import GaussianMixture
from equipoise.explorer import View
from equipoise.explorer.connections import MAX_CONNECTIONS
from equipoise.explorer.server import MAX_UPLOAD_BYTES, make_app, make_server
from equipoise.model import VAE

PATIENCE = 1.5
SERVER = f"""
import torch
from equipoise.aggregate import GaussianMixture
from equipoise.explorer import connections
from equipoise.explorer.server import View, _listen, make_server
from equipoise.model import VAE
connections.PATIENCE, connections.PERIOD = {PATIENCE}, 0.1
model = VAE.build((1, 8, 8), latent_dim=2).eval()
mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
with _listen(0) as listener:
    server = make_server(View(model, mixture))
    print(listener.getsockname()[1], flush=True)
    server.run([listener])
"""


class Explorer:
    """A server in another process."""

    def __init__(self, process):
        self.process = process
        self.port = int(process.stdout.readline())

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def ask(self, content, is_last=False):
        """Send bytes, and return what comes back.

        After the last bytes the connection is closed halfway, and the server may not answer.
        """
        with self.connect() as connection:
            try:
                connection.sendall(content)
                if is_last:
                    connection.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it was closed already
            return read_all(connection, None if is_last else b"\r\n\r\n")

    def status(self, method, path, body=b"", **headers):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", body or None, headers, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def answers(self):
        return self.status("GET", "/about") == 200

    def mebibytes(self, name="VmHWM"):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024

    def connections(self):
        inodes = Path(f"/proc/{self.process.pid}/fd").iterdir()
        return len(list(inodes))


def read_all(connection, end=None):
    received = b""
    while end is None or end not in received:
        try:
            part = connection.recv(65536)
        except OSError:
            break
        if not part:
            break
        received += part
    return received


@pytest.fixture(scope="module")
def explorer():
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    found = Explorer(process)
    yield found
    process.terminate()
    assert process.communicate(timeout=20)[1] == "", "attacks leave no trace in the terminal"


@pytest.fixture(scope="module")
def client():
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    view = View(VAE.build((1, 8, 8), latent_dim=2).eval(), mixture)
    return TestClient(make_app(view), base_url="http://127.0.0.1:8769")


HOST = b"Host: 127.0.0.1:1\r\n"


def posted(path, *headers, body=b""):
    lines = [b"POST " + path + b" HTTP/1.1", HOST.strip(), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


TOO_LARGE = MAX_UPLOAD_BYTES + 1


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (posted(b"/inspect", b"Content-Length: %d" % TOO_LARGE, body=bytes(TOO_LARGE)), 413),
        (posted(b"/inspect", b"Content-Length: 99999999999999999999"), 413),
        (posted(b"/sample", b"Content-Length: 50000", body=bytes(50000)), 413),
        (posted(b"/inspect", b"Content-Length: -1"), 400),
        (posted(b"/inspect", b"Content-Length: 1e9"), 400),
        (posted(b"/inspect", b"Content-Length: 3", b"Content-Length: 4", body=b"abcd"), 400),
        (posted(b"/decode", b"Transfer-Encoding: gzip", body=b"3\r\nabc\r\n0\r\n\r\n"), 400),
        (posted(b"/decode", b"Transfer-Encoding: chunked", body=b"xyz\r\n"), 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n", 400),
        (b"GET /%00 HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET /../server.py HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET /%2e%2e/server.py HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET /..%2f..%2f..%2f..%2fetc/passwd HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET //etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET /%ff%fe HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET http://evil.example/about HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"DELETE /about HTTP/1.1\r\n" + HOST + b"\r\n", 405),
        (b"TRACE / HTTP/1.1\r\n" + HOST + b"\r\n", 405),
        (b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (b"GET /decode HTTP/1.1\r\n" + HOST + b"\r\n", 404),
        (posted(b"/sample", b"Origin: http://evil.example", b"Content-Length: 0"), 403),
        (posted(b"/sample", b"Origin: null", b"Content-Length: 0"), 403),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ],
)
def test_malformed_and_oversized_requests_are_refused(explorer, content, status):
    answer = explorer.ask(content)
    assert answer.startswith(b"HTTP/1.1 %d" % status), answer[:200]
    assert b"root:" not in answer
    assert b"import" not in answer
    assert explorer.answers()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 10**7 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 10**7 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 10**6 + b"\r\n",
        b"a" * 10**7,
    ],
    ids=["address", "header", "headers", "line"],
)
def test_a_head_is_bounded(explorer, head):
    assert re.match(rb"HTTP/1.1 400|$", explorer.ask(head))
    assert explorer.answers()


def test_a_body_without_an_announced_size_is_bounded(explorer):
    before = explorer.mebibytes()
    chunk = b"100000\r\n" + bytes(0x100000) + b"\r\n"
    with explorer.connect() as connection:
        connection.sendall(posted(b"/inspect", b"Transfer-Encoding: chunked"))
        for _ in range(500):
            connection.sendall(chunk)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")
        # What comes after the answer is thrown away, and not for long.
        with pytest.raises(OSError, match=r"reset|pipe"):
            send_for_ever(connection, chunk)
    assert explorer.mebibytes() - before < 200
    assert explorer.answers()


def send_for_ever(connection, content):
    while True:
        connection.sendall(content)


SLOW = {
    "nothing": b"",
    "half a line": b"GET /abo",
    "half a head": b"GET /about HTTP/1.1\r\n" + HOST,
    "half a body": posted(b"/inspect", b"Content-Length: 1000", body=b"half"),
    "half a chunk": posted(b"/decode", b"Transfer-Encoding: chunked", body=b"10\r\nhalf"),
    "half a request after a whole one": b"GET /style.css HTTP/1.1\r\n" + HOST + b"\r\nGET /",
}


def test_slow_clients_are_left_while_others_are_served(explorer):
    """Each of them goes on to send a byte now and then, which does not help."""
    connections = {name: [explorer.connect() for _ in range(8)] for name in SLOW}
    for name, group in connections.items():
        for connection in group:
            connection.sendall(SLOW[name])

    started = time.monotonic()
    open_ = [connection for group in connections.values() for connection in group]
    for connection in open_:
        connection.setblocking(False)
    while open_:
        assert time.monotonic() - started < 20 * PATIENCE
        assert explorer.answers()
        for connection in list(open_):
            try:
                connection.send(b"a")
                while connection.recv(65536):
                    pass
                is_closed = True
            except BlockingIOError:
                is_closed = False
            except OSError:
                is_closed = True
            if is_closed:
                open_.remove(connection)
                connection.close()
        time.sleep(0.05)


def test_clients_that_do_not_read_are_left(explorer):
    """They ask again and again, until the buffers between us are full."""
    before = explorer.mebibytes()
    ask = (b"GET /explorer.js HTTP/1.1\r\n" + HOST + b"\r\n") * 200
    connections = [explorer.connect() for _ in range(10)]
    for connection in connections:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.5)
        try:
            for _ in range(50):
                connection.sendall(ask)
        except OSError:
            pass
    assert explorer.answers()
    started = time.monotonic()
    while explorer.connections() > 20:
        assert time.monotonic() - started < 20 * PATIENCE
        time.sleep(0.1)
    for connection in connections:
        connection.close()
    assert explorer.mebibytes() - before < 100


def test_many_connections_do_not_keep_the_page_from_answering(explorer):
    idle = []
    for number in range(4 * MAX_CONNECTIONS):
        connection = explorer.connect()
        connection.sendall(
            [b"", b"GET / HT", posted(b"/inspect", b"Content-Length: 9")][number % 3]
        )
        idle.append(connection)
        if number % 50 == 0:
            assert explorer.answers()
    assert explorer.answers()
    assert explorer.connections() < MAX_CONNECTIONS + 30
    for connection in idle:
        connection.close()
    assert explorer.answers()


def test_many_heavy_requests_at_once_are_answered_or_put_off(explorer):
    body = json.dumps({"source": "mixture", "n": 64, "seed": 1}).encode()
    with ThreadPoolExecutor(60) as pool:
        found = list(pool.map(lambda _: explorer.status("POST", "/sample", body), range(180)))
    assert set(found) <= {200, 503}
    assert found.count(200) > 20
    assert explorer.answers()


def test_many_uploads_at_once_are_bounded_in_memory(explorer):
    picture = io.BytesIO()
    Image.fromarray(np.zeros((2000, 2000, 3), np.uint8)).save(picture, "BMP")
    body = picture.getvalue() + bytes(MAX_UPLOAD_BYTES - len(picture.getvalue()))
    assert len(body) == MAX_UPLOAD_BYTES
    before = explorer.mebibytes()
    # Half of them at once, so that a loaded machine takes each within the server's patience.
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: explorer.status("POST", "/inspect", body), range(24)))
    assert set(found) == {200}
    assert explorer.mebibytes() - before < 700
    assert explorer.answers()


def test_clients_that_leave_in_the_middle_leave_no_trace(explorer):
    for path, body in ((b"/inspect", b"half"), (b"/sample", b'{"source": "prior", "n": 64')):
        for _ in range(20):
            with explorer.connect() as connection:
                connection.sendall(posted(path, b"Content-Length: 1000", body=body))
    with explorer.connect() as connection:
        connection.sendall((b"GET /about HTTP/1.1\r\n" + HOST + b"\r\n") * 30)
    assert explorer.answers()


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_random_bytes_are_survived(explorer, count):
    rng = random.Random(count)
    whole = [
        posted(b"/sample", b"Content-Length: 40", body=b'{"source": "prior", "n": 1, "seed": 1}  '),
        b"GET /about HTTP/1.1\r\n" + HOST + b"\r\n",
        posted(
            b"/decode", b"Transfer-Encoding: chunked", body=b'f\r\n{"point":[0,0]}\r\n0\r\n\r\n'
        ),
    ]
    for _ in range(count):
        content = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(len(content))
            action = rng.randrange(3)
            if action == 0:
                content[place] = rng.randrange(256)
            elif action == 1:
                content[place:place] = rng.randbytes(rng.randint(1, 9))
            else:
                del content[place : place + rng.randint(1, 9)]
        answer = explorer.ask(bytes(content), is_last=True)
        assert re.match(rb"HTTP/1\.1 (200|3\d\d|4\d\d|501)|$", answer), (bytes(content), answer)
        assert b"500 Internal" not in answer
    assert explorer.answers()


# ---- what requests hold


NESTED = [
    b"[" * 8000,
    b'{"codes":' + b"[" * 4000 + b"]" * 4000 + b"}",
    b'{"point":' * 1000 + b"1" + b"}" * 1000,
]
HOSTILE = [
    *NESTED,
    b'{"codes": [[1, 2]], "codes": [[3, 4]]}',
    b'{"codes": [[1, Infinity]]}',
    b'{"codes": [["1", "2"]]}',
    b'{"codes": [[true, false]]}',
    b'{"codes": [[1, null]]}',
    b'{"codes": [[1], [1, 2]]}',
    b'{"codes": {"0": [1, 2]}}',
    b'{"codes": "12"}',
    b'{"codes": [[1e999, 0]]}',
    b'{"codes": [[' + b"9" * 400 + b", 0]]}",
    b'{"codes": [[' + b"9" * 5000 + b", 0]]}",
    b'{"point": [[0, 0]]}',
    b'{"point": {"a": 1}}',
    b'{"point": null}',
    b'{"source": {"a": 1}, "n": 1, "seed": 0}',
    b'{"source": "' + b"9" * 5000 + b'", "n": 1, "seed": 0}',
    b'{"source": "99", "n": 1, "seed": 0}',
    b'{"source": "-1", "n": 1, "seed": 0}',
    b'{"source": "\\ud800<script>", "n": 1, "seed": 0}',
    b'{"source": "prior", "n": 1.0, "seed": 0}',
    b'{"source": "prior", "n": 65, "seed": 0}',
    b'{"source": "prior", "n": 1, "seed": 4294967296}',
    b'{"source": "prior", "n": 1, "seed": -1}',
    b'{"index": 1e3}',
    b'{"index": "1"}',
    b'{"index": ' + b"1" * 5000 + b"}",
    b"\xff\xfe{\x00}\x00",
    b"\xef\xbb\xbf{}",
    b"null",
    b'"codes"',
    b"",
]


@pytest.mark.parametrize("body", HOSTILE, ids=lambda body: repr(body[:30]))
@pytest.mark.parametrize("path", ["/decode", "/sample", "/example"])
def test_hostile_values_are_refused(client, path, body):
    answer = client.post(path, content=body)
    assert answer.status_code in (400, 413)
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert len(answer.text) < 2000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(max_size=3), parts),
    max_leaves=8,
)


@settings(max_examples=150)
@given(st.sampled_from(["/decode", "/sample", "/example"]), st.data())
def test_any_json_is_answered(client, path, data):
    names = st.sampled_from(["point", "codes", "source", "n", "seed", "index", "x"])
    content = data.draw(JSON | st.dictionaries(names, JSON, max_size=4))
    answer = client.post(path, content=json.dumps(content).encode())
    assert answer.status_code in (200, 400)


@settings(max_examples=100)
@given(st.binary(max_size=300))
def test_any_upload_is_answered(client, upload):
    assert client.post("/inspect", content=upload).status_code == 400


def test_a_bug_is_told_once_and_answered(monkeypatch, tmp_path, caplog):
    def fail(*_):
        raise KeyError("weights")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.eye(2)[None])
    view = View(VAE.build((1, 8, 8), latent_dim=2).eval(), mixture)
    app = make_server(view).config.app
    monkeypatch.setattr(View, "sample", fail)
    client = TestClient(app, base_url="http://127.0.0.1:8769")
    for _ in range(3):
        answer = client.post("/sample", json={"source": "prior", "n": 1, "seed": 0})
        assert (answer.status_code, "this is a bug of equipoise" in answer.text) == (500, True)
    (record,) = caplog.records
    (file,) = tmp_path.iterdir()
    assert str(file) in record.getMessage()
    assert "KeyError: 'weights'" in file.read_text()
