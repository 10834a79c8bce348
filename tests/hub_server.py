"""A web server of this machine that has a folder's files, also in the layout of the Hugging Face hub. Used by
test_dataset.py, test_remote_sources.py, test_tasks.py (data sets), test_core_eval.py and test_hf_load.py (models, which can be
sent as well).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml


@contextlib.contextmanager
def serve_folder(folder: Path, kind: type[HubServer] | None = None) -> Iterator[type[HubServer]]:
    """Yields the class that answers, of which the attributes may be read and set; kind: what it derives from."""
    handler = type("Handler", (kind or HubServer,), {"root": folder, "requests": [], "cut": None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=functools.partial(server.serve_forever, 0.05), daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()


def ask_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Have huggingface_hub ask this server, which need not be there."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


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
        resolve = "/datasets/someone/texts/resolve"
        for prefix in ("/files/", f"{resolve}/main/", f"{resolve}/{'0' * 40}/"):
            if path.startswith(prefix) and (self.root / path.removeprefix(prefix)).is_file():
                return self._send_file((self.root / path.removeprefix(prefix)).read_bytes())
        path = path.replace(f"/tree/{'0' * 40}", "/tree/main")
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
        if self.command != "HEAD":
            cut = self.cut if len(body) > 1000 else None
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None

    def log_message(self, *arguments: object) -> None:
        """Tests are quiet."""


class ModelHub(HubServer):
    """The folder `root` as the model someone/model, private or not: it can be made, sent in one commit, and fetched."""

    private: bool | None = None

    def do_POST(self) -> None:
        self.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.path == "/api/validate-yaml":  # the front matter of a model card
            front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            errors = [] if isinstance(front, dict) else [{"message": "no front matter"}]
            return self._send(json.dumps({"errors": errors, "warnings": []}).encode())
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            if f"{asked.get('organization')}/{asked['name']}" != "someone/model":
                return self._send(b'{"error": "You may not write there"}', 403)
            type(self).private = asked.get("private") or asked.get("visibility") == "private"
            return self._send(json.dumps({"url": f"{self.address}/someone/model"}).encode())
        if self.path.startswith("/api/models/someone/model/preupload/"):
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._send(json.dumps({"files": files}).encode())
        if self.path.startswith("/api/models/someone/model/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    (self.root / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
                elif line["key"] == "deletedFile":
                    (self.root / line["value"]["path"]).unlink()
            url = f"{self.address}/someone/model/commit/{'0' * 40}"
            return self._send(json.dumps({"success": True, "commitOid": "0" * 40, "commitUrl": url}).encode())
        return self._send(b"", 404)

    def _answer(self) -> None:
        path = urllib.parse.unquote(self.path.split("?")[0])
        self.requests.append(f"{self.command} {path}")
        prefix = f"/someone/model/resolve/{'0' * 40}/"
        if path.startswith(prefix) and (self.root / path.removeprefix(prefix)).is_file():
            return self._send_file((self.root / path.removeprefix(prefix)).read_bytes())
        if path.startswith("/api/models/someone/model/tree/"):
            return self._send(json.dumps([self._entry(p) for p in sorted(self.root.iterdir())]).encode())
        if path.startswith("/api/models/someone/model"):
            siblings = [{"rfilename": p.name} for p in sorted(self.root.iterdir())]
            return self._send(json.dumps({"id": "someone/model", "sha": "0" * 40, "tags": [], "siblings": siblings}).encode())
        return self._send(b"", 404, {"X-Error-Code": "EntryNotFound" if "someone/model" in path else "RepoNotFound"})
