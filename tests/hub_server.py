"""A web server of this machine that has a folder's files, also in the layout of the Hugging Face hub. Used by
test_shard_cache.py.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def serve_folder(folder: Path) -> Iterator[type[HubServer]]:
    """Yields the class that answers, of which the attributes may be read and set."""
    handler = type("Handler", (HubServer,), {"root": folder, "requests": [], "cut": None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=functools.partial(server.serve_forever, 0.05), daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()


class HubServer(http.server.BaseHTTPRequestHandler):
    """Files below `root` at /files/, and in the hub's layout as the data set someone/texts.

    requests: "GET /files/a bytes=0-9" for each that came; cut: bytes that come of a larger file, None for all of them.
    """

    protocol_version = "HTTP/1.1"
    address: str
    root: Path
    requests: list[str]
    cut: int | None

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urllib.parse.unquote(self.path.split("?")[0])
        self.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        tree, api = "/api/datasets/someone/texts/tree/main", "/api/datasets/someone/texts"
        for prefix in ("/files/", "/datasets/someone/texts/resolve/main/"):
            if path.startswith(prefix) and (self.root / path.removeprefix(prefix)).is_file():
                return self._send_file((self.root / path.removeprefix(prefix)).read_bytes())
        if path.startswith(tree) and (folder := self.root / path.removeprefix(tree).strip("/")).is_dir():
            found = folder.rglob("*") if "recursive=true" in self.path.lower() else folder.iterdir()
            return self._send(json.dumps([self._entry(p) for p in sorted(found)]).encode())
        if path in (api, f"{api}/revision/main"):
            return self._send(json.dumps({"id": "someone/texts", "sha": "0" * 40, "tags": [], "siblings": []}).encode())
        code = "EntryNotFound" if "someone/texts" in path else "RepoNotFound"
        return self._send(b"", 403 if path.startswith("/closed") else 404, {"X-Error-Code": code})

    def _entry(self, path: Path) -> dict:
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": str(path.relative_to(self.root))}
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": str(path.relative_to(self.root))}

    def _send_file(self, body: bytes) -> None:
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        if "Range" not in self.headers:
            return self._send(body, 200, headers)
        begin, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
        begin, end = int(begin), min(int(end or len(body)), len(body) - 1)
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(body)}"
        return self._send(body[begin : end + 1], 206, headers)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            cut = self.cut if len(body) > 1000 else None
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None

    def log_message(self, *arguments: object) -> None:
        """Tests are quiet."""
