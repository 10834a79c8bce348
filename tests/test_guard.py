"""What stands between the network and the server: keys, headers, slow and broken clients."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from nanochat import guard
from nanochat.engine import Engine
from nanochat.openai_api import Reply
from nanochat.server import create_app
from nanochat.service import Ticket
from tests.helpers import serve, wait_for
from tests.test_server import CHAT, HELLO, http_request


def test_an_api_key_is_asked_for(engine: Engine) -> None:
    with TestClient(create_app([engine], "tiny", api_key="secret")) as client:
        assert client.post(CHAT, json=HELLO).status_code == 401
        assert client.post(CHAT, json=HELLO, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/api/runs").status_code == 401
        for scheme in ("Bearer", "bearer"):
            assert client.post(CHAT, json=HELLO, headers={"Authorization": f"{scheme} secret"}).status_code == 200
        for given in ("Basic secret", "secret", "Bearer", ""):
            assert client.post(CHAT, json=HELLO, headers={"Authorization": given}).status_code == 401
        pages = ("/", "/health", "/metrics", "/docs", "/openapi.json", "/runs", "/ui/index.html")
        answers = {path: client.get(path).status_code for path in pages}
        assert 401 not in answers.values() and {answers[path] for path in pages[:-1]} == {200}, answers


def test_the_description_says_where_a_key_is_asked_for(engine: Engine) -> None:
    """So /docs has a field for it."""
    for key, schemes in (("secret", {"HTTPBearer"}), (None, set())):
        with TestClient(create_app([engine], "tiny", api_key=key)) as client:
            described = client.get("/openapi.json").json()
        asked = {scheme for entry in described["paths"][CHAT]["post"].get("security", []) for scheme in entry}
        assert asked == set(described["components"].get("securitySchemes", {})) == schemes


def test_a_browser_may_ask_what_it_may_send_before_it_sends_the_key(engine: Engine) -> None:
    """To a page of another origin; and clients that write two spaces are understood."""
    origin = {"Origin": "http://other.example", "Access-Control-Request-Method": "POST"}
    app = create_app([engine], "tiny", api_key="secret", cors_origins=["http://other.example"])
    with TestClient(app) as client:
        assert client.options(CHAT, headers=origin).status_code == 200
        assert client.post(CHAT, json=HELLO, headers={"Authorization": "Bearer  secret"}).status_code == 200


def test_headers_have_an_end_and_come_in_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HEAD_TIMEOUT_S", 0.5)
    with serve(create_app([engine], "tiny", api_key="secret")) as port:
        silent, slow, endless = (socket.create_connection(("127.0.0.1", port)) for _ in range(3))
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTT")
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                endless.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 2**16)
        for connection, end in ((silent, b""), (slow, b"}"), (endless, b"Invalid HTTP request received.")):
            received = _read_all(connection)
            assert received.endswith(end) and received.count(b"200 OK") == (connection is slow)
            connection.close()
        again = socket.create_connection(("127.0.0.1", port))
        again.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in again.recv(1000)
        again.sendall(b"GET /health HTT")  # as late as in the first request
        assert _read_all(again).count(b"HTTP/1.1 ") == 0
        again.close()


def test_only_headers_must_come_in_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer may take longer, and so may a connection's next request, also where headers come in pieces."""

    async def slow_answer(ticket: Ticket, reply: Reply) -> AsyncIterator[str]:
        yield "data: a\n\n"
        await asyncio.sleep(0.5)
        yield "data: [DONE]\n\n"

    monkeypatch.setattr("nanochat.server.chat_chunks", slow_answer)
    monkeypatch.setattr(guard, "HEAD_TIMEOUT_S", 0.3)
    with serve(create_app([engine], "tiny")) as port:
        connection, request = (
            socket.create_connection(("127.0.0.1", port), timeout=10),
            http_request({**HELLO, "stream": True}),
        )
        for _ in range(2):
            connection.sendall(request[:40])
            time.sleep(0.1)
            connection.sendall(request[40:])
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                more = connection.recv(2**16)
                assert more, "the connection was ended"
                received += more
            assert received.startswith(b"HTTP/1.1 200 OK") and b"[DONE]" in received
            time.sleep(0.4)
        connection.close()


def test_the_documented_limits_of_a_request_are_those_that_hold() -> None:
    page = (Path(__file__).parent.parent / "docs" / "serving.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"must arrive within {guard.HEAD_TIMEOUT_S:g} seconds and may have {guard.MAX_HEAD_BYTES >> 10} KB." in page
    assert f"another {guard.BODY_TIMEOUT_S:g} seconds and may have {guard.MAX_BODY_BYTES >> 20} MB." in page
    assert f"reads nothing of its answer for {guard.READ_TIMEOUT_S:g} seconds is cut off" in page


def test_slow_and_broken_clients_do_not_stop_the_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies that never end, garbage, readers of one byte: the next request is served, and the slow one gets its answer."""
    import httpx

    monkeypatch.setattr(guard, "BODY_TIMEOUT_S", 0.5)
    app = create_app([engine], "tiny")
    with serve(app) as port:
        crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        crowd[0].sendall(http_request(HELLO)[:-10])
        crowd[1].sendall(b"\x00\xff garbage\r\n\r\n")
        crowd[2].sendall(http_request({**HELLO, "stream": True}))
        assert httpx.post(f"http://127.0.0.1:{port}{CHAT}", json=HELLO, timeout=30).status_code == 200
        refused = _read_all(crowd[0])  # whose body may still come, and is no request
        assert b" 408 " in refused and b"connection: close" in refused.lower()
        received = b""
        crowd[2].settimeout(10)
        while b"[DONE]" not in received:
            received += crowd[2].recv(1)
        for connection in crowd:
            connection.close()


def _read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    connection.settimeout(10)
    received = b""
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(2**16):
            received += more
    return received


def test_only_a_body_that_was_not_read_closes_the_connection(engine: Engine) -> None:
    with TestClient(create_app([engine], "tiny", api_key="secret")) as client:
        for content, key, status in ((b"{}", "wrong", 401), (b"x" * (guard.MAX_BODY_BYTES + 1), "secret", 413)):
            response = client.post(CHAT, content=content, headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == status
            assert (response.headers.get("connection") == "close") == (status == 413)


@pytest.mark.parametrize(
    ("length", "is_read"), [("x", False), (guard.MAX_BODY_BYTES, True), (guard.MAX_BODY_BYTES + 1, False)]
)
def test_a_body_that_is_told_to_be_too_large_is_not_read(length: str | int, is_read: bool) -> None:
    headers = [(b"content-length", str(length).encode())]
    scope = {"type": "http", "path": "/", "method": "POST", "headers": headers}
    read, answered = [], []

    async def receive() -> dict:
        read.append(1)
        return {"type": "http.request", "body": b"{}"}

    async def app(scope: object, receive: object, send: object) -> None:
        pass

    async def send(message: dict) -> None:
        answered.append(message.get("status"))

    asyncio.run(guard.Guard(app, None, None)(scope, receive, send))
    assert (bool(read), answered[:1]) == ((True, []) if is_read else (False, [413]))


def test_a_request_may_be_sent_while_another_is_answered(engine: Engine) -> None:
    with serve(create_app([engine], "tiny")) as port:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.settimeout(20)
        connection.sendall(http_request({**HELLO, "stream": True, "max_tokens": 100, "ignore_eos": True}))
        received = connection.recv(100)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        while received.count(b"HTTP/1.1 200 OK") < 2:
            more = connection.recv(2**16)
            assert more, "the connection was ended"
            received += more
        connection.close()


@pytest.mark.parametrize("key", ["secret", "wrong"])
def test_what_follows_a_request_has_an_end(engine: Engine, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trailers behind an answered body, and requests sent ahead by the thousand, whose answers are not read."""
    monkeypatch.setattr(guard, "READ_TIMEOUT_S", 0.5)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n".encode()
    trailers = head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    health = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with serve(create_app([engine], "tiny", api_key="secret")) as port:
        for first, more in ((trailers, b"a: " + b"b" * 2**14 + b"\r\n"), (health, health * 500)):
            connection = socket.create_connection(("127.0.0.1", port), timeout=30)
            connection.sendall(first)
            with pytest.raises(ConnectionError):
                for _ in range(10_000):
                    connection.sendall(more)
            connection.close()


def test_a_client_that_leaves_frees_its_place_though_it_has_asked_for_more(engine: Engine) -> None:
    app = create_app([engine], "tiny")
    with serve(app) as port:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(2 * http_request({**HELLO, "max_tokens": 100_000, "ignore_eos": True, "stream": True}))
        assert connection.recv(100)
        connection.close()
        wait_for(lambda: not app.state.service.stats()["running"], "the text to be given up", 10)


def test_a_client_that_does_not_read_is_left(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that reads slowly is not."""
    ended = []

    async def long_answer(ticket: Ticket, reply: Reply) -> AsyncIterator[str]:
        try:
            while True:
                yield "x" * 2**16
                await asyncio.sleep(0)
        finally:
            ended.append(ticket)

    monkeypatch.setattr("nanochat.server.chat_chunks", long_answer)
    monkeypatch.setattr(guard, "READ_TIMEOUT_S", 2.0)
    silent, slow = socket.socket(), socket.socket()
    slow.settimeout(60)
    end = time.monotonic()
    with serve(create_app([engine], "tiny")) as port, silent, slow:
        for connection in (silent, slow):
            connection.connect(("127.0.0.1", port))
            connection.sendall(http_request({**HELLO, "stream": True}))
        began = time.monotonic()
        while not ended or time.monotonic() < end + 3:
            assert slow.recv(2**16) and time.monotonic() < began + 60
            time.sleep(0.005)
            end = end if ended else time.monotonic()
        assert len(ended) == 1
        slow.close()
        wait_for(lambda: len(ended) == 2, "the other connection to end", 60)


@pytest.mark.parametrize("method", ["POST", "OPTIONS"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_body_has_one_length(engine: Engine, method: str, order: int) -> None:
    """Behind a proxy that goes by the other, what follows it is someone else's request."""
    lengths = "\r\n".join(["Content-Length: 2", "transfer-encoding: chunked"][::order])
    asked = (
        f"{method} {CHAT} HTTP/1.1\r\nHost: x\r\nOrigin: http://x\r\nAccess-Control-Request-Method: POST\r\n{lengths}\r\n\r\n"
    )
    health = "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with serve(create_app([engine], "tiny", cors_origins=["*"])) as port:
        for before in ("", health):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.sendall(f"{before}{asked}2\r\n{{}}\r\n0\r\n\r\n{health}".encode())
            received = _read_all(connection)
            assert received.count(b"HTTP/1.1 ") == received.count(b"HTTP/1.1 400 ") + (before != "")
            assert b"connection: close" in received and received.count(b"HTTP/1.1 400 ") == 1
            connection.close()


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_who_offers_another_protocol_is_answered_in_this_one(engine: Engine, protocol: str) -> None:
    """As curl --http2 and Java's clients do, with the body in a packet of its own."""
    request = http_request(HELLO)
    offer = f"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {protocol}\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    head, _, body = request.replace(b"\r\n", b"\r\n" + offer.encode(), 1).partition(b"\r\n\r\n")
    with serve(create_app([engine], "tiny")) as port:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(head + b"\r\n\r\n")
        time.sleep(0.1)
        connection.sendall(body)
        connection.settimeout(20)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200 OK")
        connection.close()


def test_whoever_reads_at_all_is_waited_for() -> None:
    """However long a large answer takes: what counts is that less of it waits than the last time."""
    connection, later, ended = guard.CarefulProtocol.__new__(guard.CarefulProtocol), [], []
    connection.loop = SimpleNamespace(call_later=lambda seconds, call, waiting: later.append((call, waiting)))
    sizes = iter([900, 800, 100, 100])
    connection.transport = SimpleNamespace(get_write_buffer_size=lambda: next(sizes), abort=lambda: ended.append(True))
    connection._watch_reader(math.inf)
    for n in range(3):
        assert not ended
        call, waiting = later[n]
        call(waiting)
    assert ended and len(later) == 3


def test_nothing_on_the_way_keeps_a_stream(client: TestClient) -> None:
    """Neither caches nor a proxy that gathers what it passes on."""
    response = client.post(CHAT, json={**HELLO, "stream": True})
    expected = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}
    assert {name: response.headers.get(name) for name in expected} == expected
