"""What stands between the network and the server: keys, headers, slow and broken clients."""

from __future__ import annotations

import contextlib
import socket

import pytest
from fastapi.testclient import TestClient

from nanochat import guard
from nanochat.engine import Engine
from nanochat.server import create_app
from nanochat.service import Limits
from tests.helpers import serve
from tests.test_server import CHAT, HELLO, _request


def test_an_api_key_is_asked_for(engine: Engine) -> None:
    with TestClient(create_app([engine], "tiny", api_key="secret")) as client:
        assert client.post(CHAT, json=HELLO).status_code == 401
        assert client.post(CHAT, json=HELLO, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/api/runs").status_code == 401
        for scheme in ("Bearer", "bearer"):
            assert client.post(CHAT, json=HELLO, headers={"Authorization": f"{scheme} secret"}).status_code == 200
        assert client.get("/").status_code == client.get("/health").status_code == client.get("/docs").status_code == 200


def test_headers_have_an_end_and_come_in_time(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "HEAD_TIMEOUT_S", 0.5)
    with serve(create_app([engine], "tiny", api_key="secret")) as port:
        silent, slow, endless = (socket.create_connection(("127.0.0.1", port)) for _ in range(3))
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTT")
        with contextlib.suppress(ConnectionError):
            for _ in range(64):
                endless.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 2**16)
        for connection, end in ((silent, b""), (slow, b"}"), (endless, b"Connection: close\r\n\r\n")):
            connection.settimeout(10)
            received = b""
            with contextlib.suppress(ConnectionError):
                while more := connection.recv(2**16):
                    received += more
            assert received.endswith(end) and received.count(b"200 OK") == (connection is slow)
            connection.close()


def test_slow_and_broken_clients_do_not_stop_the_others(engine: Engine) -> None:
    """Bodies that never end, garbage, readers of one byte: the next request is served, and the slow one gets its answer."""
    import httpx

    app = create_app([engine], "tiny", Limits(body_timeout_s=0.5))
    with serve(app) as port:
        crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        crowd[0].sendall(_request(HELLO)[:-10])
        crowd[1].sendall(b"\x00\xff garbage\r\n\r\n")
        crowd[2].sendall(_request({**HELLO, "stream": True}))
        assert httpx.post(f"http://127.0.0.1:{port}{CHAT}", json=HELLO, timeout=30).status_code == 200
        crowd[0].settimeout(10)
        assert b" 408 " in crowd[0].recv(100)
        received = b""
        crowd[2].settimeout(10)
        while b"[DONE]" not in received:
            received += crowd[2].recv(1)
        for connection in crowd:
            connection.close()
