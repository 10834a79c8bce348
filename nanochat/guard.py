"""Checks requests before anything is parsed, and adds their ids to the replies.

Used by server.py and, for connections, by scripts/chat_web.py.
"""

from __future__ import annotations

import asyncio
import hmac
import math
import re
import uuid
from typing import Any

import h11
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanochat.openai_api import RequestError

OPEN_PATHS = ("/", "/health", "/metrics", "/docs", "/openapi.json", "/runs", "/favicon.ico")  # need no API key
OPEN_PREFIXES = ("/ui/", "/static-offline-docs/")
MAX_HEAD_BYTES = 1 << 16  # of a request's headers, and of its trailers
MAX_WAITING_BYTES = 1 << 19  # of the requests that a connection sends while one is being answered
MAX_BODY_BYTES = 2 << 20
HEAD_TIMEOUT_S = BODY_TIMEOUT_S = 30.0  # for the headers of a request to arrive, and for its body
REQUEST_ID = re.compile(rb"[!-~]{1,128}")  # of clients; others get one of ours
READ_TIMEOUT_S = 60.0  # for the client to read some of an answer that fills the buffers


class StrictConnection(h11.Connection):
    """Refuses a body with two lengths: a proxy that believes the other takes the rest for its next client's request.

    See RFC 9112, section 6.1.
    """

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request) and {name for name, _ in event.headers} >= {b"content-length", b"transfer-encoding"}:
            raise h11.RemoteProtocolError("both Content-Length and Transfer-Encoding")
        return event


class CarefulProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which answers one request at a time and bounds headers; what it leaves open is closed here.

    A connection is ended whose next headers do not come in time, that sends many requests ahead, or does not read its answers.
    """

    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        self.conn = StrictConnection(h11.SERVER, MAX_HEAD_BYTES)
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) + len(data) > MAX_WAITING_BYTES:
            self.transport.abort()
            return
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._stop_watching()
        self._stop_waiting()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(math.inf)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting()

    def _watch_reader(self, waiting: float) -> None:
        """Close the connection if no less waits to be read than the last time; look again later."""
        if (size := self.transport.get_write_buffer_size()) >= waiting:
            self.transport.abort()
        else:
            self._unread = self.loop.call_later(READ_TIMEOUT_S, self._watch_reader, size)

    def _stop_waiting(self) -> None:
        if self._unread is not None:
            self._unread.cancel()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP; after a request whose answer has begun, it is too late: only close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _watch_head(self) -> None:
        """Start the time limit for the next request's headers, or stop it once they have arrived."""
        if self.conn.their_state is not h11.IDLE:
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None

    def _should_upgrade(self) -> bool:
        """Never: clients that offer WebSocket or HTTP/2 (such as curl --http2) are answered in HTTP/1.1, without a warning."""
        return False


class Guard:
    """Refuses, before parsing, requests without the API key or for another host name, and bodies too large or too slow."""

    def __init__(self, app: ASGIApp, api_key: str | None, hosts: list[str] | None) -> None:
        self.app, self.api_key, self.hosts = app, api_key, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        scope["request_id"] = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}".encode()
        send = _with_request_id(scope["request_id"], send)
        try:
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            receive = await self._body(headers, receive)
        except RequestError as error:
            close = {"Connection": "close"} if error.status in (408, 413) else None
            await JSONResponse(error.body(), status_code=error.status, headers=close)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """Stops DNS rebinding: a web page whose name suddenly resolves to this machine still sends that name."""
        host = re.sub(r":\d*$", "", headers.get(b"host", b"").decode("latin-1")).lower()
        if self.hosts is not None and host and host not in self.hosts:
            way_out = f"ask it as {self.hosts[0]}, or start it with --allow-host {host[:100]} or with --api-key"
            raise RequestError(f"this server is not {host[:100]!r}: {way_out}", 403)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.api_key is None or path in OPEN_PATHS or path.startswith(OPEN_PREFIXES):
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.api_key.encode("utf-8")):
            raise RequestError("this server needs an API key: send Authorization: Bearer KEY", 401, code="invalid_api_key")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Read the whole body within its limits; returns the `receive` that replays it to the app."""
        too_large = RequestError(f"the body is larger than {MAX_BODY_BYTES:,} bytes: send less", status=413)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            raise too_large

        async def read() -> tuple[bytes, bool]:
            """(the body, whether the client is gone)."""
            body = bytearray()
            message: Message = {"more_body": True}
            while message.get("more_body", False):  # a disconnect has none
                message = await receive()
                body.extend(message.get("body", b""))
                if len(body) > MAX_BODY_BYTES:
                    raise too_large
            return bytes(body), message["type"] == "http.disconnect"

        try:
            body, gone = await asyncio.wait_for(read(), BODY_TIMEOUT_S)
        except asyncio.TimeoutError:
            raise RequestError(f"the request did not arrive within {BODY_TIMEOUT_S:g} s", status=408) from None
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return waiting.pop() if waiting else ({"type": "http.disconnect"} if gone else await receive())

        return replay


def _with_request_id(request_id: bytes, send: Send) -> Send:
    """The `send` that adds X-Request-Id, by which OpenAI's clients name a reply."""

    async def send_named(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
        await send(message)

    return send_named
