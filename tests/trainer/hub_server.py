"""A small server that speaks as much of the Hugging Face hub's API as downloads need.

It imports the standard library only: the drills run this file in a pod too.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "acme/tiny-llama"
TOKEN = "hf_good"
LARGE = 1_000_000
"""Bytes above which a file is in LFS: it is named by its SHA-256."""


class HubServer(ThreadingHTTPServer):
    """Serves the files of one folder as `repo` at revision `main`, `v1` and COMMIT."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.repo = REPO
        self.gated = False
        """Files need TOKEN; what the repository is called and holds does not."""
        self.private = False
        """Nothing is told without TOKEN."""
        self.broken = False
        """Every answer is 503."""
        self.cut: dict[str, int] = {}
        """File -> bytes of its next download after which the connection breaks."""
        self.sent: dict[str, int] = {}
        """File -> bytes of its content that went out."""
        self.downloads: Counter[str] = Counter()
        """File -> how often its content was asked for."""
        self.spoil: set[str] = set()
        """Files whose next download has a wrong byte."""
        self.moved = False
        """`main` and `v1` lead elsewhere now: only COMMIT is served."""
        self.requests = 0
        self.on_request: Callable[[], object] = lambda: None
        """Called first for every request."""
        self.stall: dict[str, int] = {}
        """File -> bytes of its next download after which nothing more comes until `go_on` is set."""
        self.go_on = threading.Event()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must be."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(folder: Path) -> Iterator[HubServer]:
    """A running server."""
    with HubServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def redirect(monkeypatch: "pytest.MonkeyPatch", server: HubServer, home: Path) -> None:
    """Lead this process's hub client to the server: what the environment says once, when the client is imported."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        self.server.requests += 1
        self.server.on_request()
        path = unquote(urlsplit(self.path).path)
        if self.server.broken:
            self._refuse(503, "")
        elif self.server.private and not self._has_token():
            self._refuse(401, "RepoNotFound")
        elif info := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            self._tell(*info.groups())
        elif file := re.fullmatch(rf"/(?:datasets/)?{self.server.repo}/resolve/{COMMIT}/(.+)", path):
            self._send_file(file[1])
        else:
            self._refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def _tell(self, repo: str, what: str, revision: str) -> None:
        if repo != self.server.repo:
            self._refuse(404, "RepoNotFound")
        elif revision not in ((COMMIT,) if self.server.moved else ("main", "v1", COMMIT)):
            self._refuse(404, "RevisionNotFound")
        elif what == "revision":
            siblings = [{"rfilename": entry["path"], "blobId": entry["oid"]} | entry for entry in self._entries()]
            self._send_json({"id": self.server.repo, "sha": COMMIT, "siblings": siblings})
        else:
            self._send_json(self._entries())

    def _entries(self) -> list[dict[str, Any]]:
        return [self._entry(file) for file in sorted(self.server.folder.rglob("*")) if file.is_file()]

    def _entry(self, file: Path) -> dict[str, Any]:
        name = str(file.relative_to(self.server.folder))
        size, digest = file.stat().st_size, _etag(file)
        lfs = {"lfs": {"oid": digest, "sha256": digest, "size": size, "pointerSize": 134}} if size > LARGE else {}
        return {"type": "file", "path": name, "size": size, "oid": digest} | lfs

    def _send_file(self, name: str) -> None:
        if self.server.gated and not self._has_token():
            self._refuse(403, "GatedRepo")
            return
        file = self.server.folder / name
        content = file.read_bytes()
        start = int(re.sub(r"bytes=(\d+)-.*", r"\1", self.headers.get("Range", "bytes=0-")))
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_etag(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self._send_content(name, content[start:])

    def _send_content(self, name: str, content: bytes) -> None:
        self.server.downloads[name] += 1
        stalled = self.server.stall.pop(name, None)
        limit = self.server.cut.pop(name, stalled)
        part = content[:limit]
        if name in self.server.spoil:
            self.server.spoil.remove(name)
            part = part[:-1] + bytes([part[-1] ^ 1])
        self.server.sent[name] = self.server.sent.get(name, 0) + len(part)
        self.wfile.write(part)
        if stalled is not None:
            self.server.go_on.wait()
        self.close_connection = limit is not None

    def _send_json(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def _etag(file: Path) -> str:
    content = file.read_bytes()
    if len(content) > LARGE:
        return hashlib.sha256(content).hexdigest()
    header = f"blob {len(content)}\0".encode()  # small files are named as git names them
    return hashlib.sha1(header + content, usedforsecurity=False).hexdigest()
