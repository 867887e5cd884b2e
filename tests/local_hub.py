"""A Hugging Face hub on this machine: the endpoints that downloads and uploads of models use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKEN = "hf_of_the_tests"


class LocalHub:
    """Repositories of models in memory."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        """Repository to its files."""
        self.private: dict[str, Any] = {}
        """Repository to what its creation said about its privacy."""
        self.gated: set[str] = set()
        self.requests: list[str] = []
        """Method and path of all requests."""
        self.address = ""

    def add(self, repository: str, folder: Path) -> None:
        """Add the files of a folder as a repository."""
        self.files[repository] = {
            path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()
        }

    def commit(self, repository: str) -> str:
        """Return the hash of a repository's content."""
        texts = [f"{name}:{_digest(data)}" for name, data in sorted(self.files[repository].items())]
        return _digest("\n".join([repository, *texts]).encode())


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """Run a hub for a `with` block."""
    hub = LocalHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    # It looks for its end 100 times a second, not twice.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.hub.private[name] = asked.get("private", asked.get("visibility"))
            self.hub.files.setdefault(name, {})
            self._answer(200, {"url": f"{self.hub.address}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": modes})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.hub.files[match[1]][line["value"]["path"]] = content
            oid = self.hub.commit(match[1])
            url = f"{self.hub.address}/{match[1]}/commit/{oid}"
            self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})
        else:
            self._answer(404, {"error": "not played"})

    def _get(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._answer(200 if known else 401, {"name": "me", "type": "user"} if known else {})
            return
        model = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        repository = (model or file or [None, ""])[1]
        headers = {}
        if repository not in self.hub.files:
            headers["X-Error-Code"] = "RepoNotFound"
            self._answer(404, {"error": "Repository not found"}, headers)
            return
        commit = self.hub.commit(repository)
        revision = model[3] if model else file[2] if file else None
        files = self.hub.files[repository]
        if revision not in (None, "main", commit):
            self._answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        elif repository in self.hub.gated:
            self._answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        elif model and model[2] == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                for name, data in files.items()
            ]
            self._answer(200, entries)
        elif model:
            siblings = [{"rfilename": name} for name in files]
            self._answer(200, {"id": repository, "sha": commit, "siblings": siblings})
        elif file and file[3] in files:
            data = files[file[3]]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_digest(data)}"'}
            self._answer(200, data, headers)
        else:
            self._answer(404, {"error": "no file"}, {"X-Error-Code": "EntryNotFound"})

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
