"""A Hugging Face hub on this machine: the parts of its HTTP interface that uploads and downloads of models use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

LARGE = (".safetensors", ".png", ".pt")
"""Files that the hub wants as large ones, which are uploaded before the commit."""


@dataclass
class Repository:
    """A model repository."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def sha(self) -> str:
        """The name of the last commit."""
        return hashlib.sha1(f"commit {self.commits}".encode()).hexdigest()


@dataclass
class FakeHub:
    """What the hub holds, and which faults it has."""

    url: str = ""
    tokens: dict[str, bool] = field(default_factory=lambda: {"hf_owner": True, "hf_reader": False})
    """Known tokens, and whether they may write."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    """Large files by hash: they stay when an upload breaks off."""
    uploads: list[str] = field(default_factory=list)
    """Hashes of the large files that were sent."""
    refuse_after: int | None = None
    """Number of large files after which uploads fail."""
    break_downloads: bool = False
    """Close the connection in the middle of large files."""


@contextmanager
def running() -> Iterator[FakeHub]:
    """Runs a hub on a free port of the loopback interface."""
    hub = FakeHub()

    class Handler(_Handler):
        held = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    held: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _send(self, status: int, content: bytes | Any = b"", headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            if self.held.break_downloads and len(data) > 20_000:
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
                return
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self._send(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _answer(self, body: bool = True) -> None:
        path = unquote(urlparse(self.path).path)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/":
            return self._send(200)
        if token and token not in self.held.tokens:
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(data), token)
        if match := re.fullmatch(r"/large/(\w+)", path):
            return self._receive(match[1], data)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path):
            return self._model(match[1], match[2] or "", data, token)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(data))
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self._resolve(match[1], match[2], token)
        self._error(404, "EntryNotFound")

    def _create(self, wanted: dict[str, Any], token: str) -> None:
        if not token:
            return self._send(401, {"error": "Invalid username or password."})
        if not self.held.tokens[token]:
            return self._send(403, {"error": "You don't have the rights to create a model under this namespace"})
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.held.repositories:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.held.url}/{name}"})
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.held.repositories[name] = Repository(private)
        self._send(200, {"url": f"{self.held.url}/{name}"})

    def _readable(self, name: str, token: str) -> Repository | None:
        repository = self.held.repositories.get(name)
        return None if repository is None or (repository.private and not token) else repository

    def _model(self, name: str, rest: str, data: bytes, token: str) -> None:
        repository = self._readable(name, token)
        if repository is None:
            return self._error(401 if not token else 404, "RepoNotFound")
        if rest.startswith("preupload/"):
            files = json.loads(data)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return self._send(200, {"files": modes})
        if rest.startswith("commit/"):
            if not self.held.tokens.get(token):
                return self._send(403, {"error": "no right to write"})
            return self._commit(repository, name, data)
        if rest.startswith("tree/"):
            return self._send(200, [_entry(path, content) for path, content in repository.files.items()])
        siblings = [{"rfilename": path} for path in repository.files]
        self._send(200, {"id": name, "modelId": name, "sha": repository.sha, "siblings": siblings, "tags": []})

    def _commit(self, repository: Repository, name: str, data: bytes) -> None:
        files = dict(repository.files)
        for line in data.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.held.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        repository.files, repository.commits = files, repository.commits + 1
        url = f"{self.held.url}/{name}/commit/{repository.sha}"
        self._send(200, {"success": True, "commitOid": repository.sha, "commitUrl": url, "hookOutput": ""})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for item in wanted["objects"]:
            there = item["oid"] in self.held.large
            actions = {} if there else {"actions": {"upload": {"href": f"{self.held.url}/large/{item['oid']}"}}}
            objects.append({**item, "authenticated": True, **actions})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _receive(self, oid: str, data: bytes) -> None:
        if self.held.refuse_after is not None and len(self.held.uploads) >= self.held.refuse_after:
            return self._send(400, {"error": "the disk is full"})
        assert hashlib.sha256(data).hexdigest() == oid
        self.held.uploads.append(oid)
        self.held.large[oid] = data
        self._send(200)

    def _resolve(self, name: str, path: str, token: str) -> None:
        repository = self._readable(name, token)
        if repository is None:
            return self._error(401 if not token else 404, "RepoNotFound")
        if path not in repository.files:
            return self._error(404, "EntryNotFound")
        content = repository.files[path]
        self._send(200, content, {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": repository.sha})


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
