"""Models of the hub: fetched from a hub on this machine, taken from the cache, pushed, refused.

The hub is probed briefly, and `offline` also affects libraries that are already imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils.logging  # noqa: F401 - Its handler keeps the stderr of its import.
from huggingface_hub import ModelCard, constants
from refusals import refused

from orchestrator import cli
from orchestrator.data.store import MANIFEST_NAME, open_tokens
from orchestrator.models.folder import load_config, load_provenance
from orchestrator.models.hub import DRY_RUN, download, hub_problem, offline
from orchestrator.models.labels import name_with_owner
from orchestrator.models.load import load_model
from orchestrator.models.open import by_label, open_model, open_models
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.records.training import StoredJob, TrainingJob
from orchestrator.settings import TrainingSettings, resolve_settings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import JOB_NAME, Workspace, open_workspace
from orchestrator.workspace.provenance import RECIPE_VERSION

NAME = "hub:me/tiny"
TOKEN = "hf_of_the_tests"


class LocalHub:
    """Repositories of models in memory."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        """Repository to its files."""
        self.private: dict[str, Any] = {}
        """Repository to what its creation said about its privacy."""
        self.gated: set[str] = set()
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
    # The server looks for its end 100 times a second, not twice as by default.
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
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            creation = json.loads(body)
            name = f"{creation.get('organization') or 'me'}/{creation['name']}"
            self.hub.private[name] = creation.get("private", creation.get("visibility"))
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

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            self._answer(200 if known else 401, {"name": "me", "type": "user"} if known else {})
            return
        model = re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        repository = (model or file or [None, ""])[1]
        if repository not in self.hub.files:
            named = {"X-Error-Code": "RepoNotFound"}
            self._answer(404, {"error": "Repository not found"}, named)
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
            named = {"X-Repo-Commit": commit, "ETag": f'"{_digest(data)}"'}
            self._answer(200, data, named)
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


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[LocalHub]:
    """A hub on this machine, an empty cache, and no token."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with local_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


@pytest.fixture
def space(tmp_path, save_tiny) -> Workspace:
    """A workspace with one run, `tiny`."""
    workspace = open_workspace(tmp_path / "space")
    save_tiny(workspace.runs / "tiny")
    return workspace


def run(space: Path, *words: str) -> int:
    return cli.main([*words, "--workspace", str(space)])


def printed(capfd: pytest.CaptureFixture[str]) -> str:
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    return " ".join((captured.out + captured.err).split())


@pytest.fixture
def push_output(hub, space, monkeypatch, capfd) -> str:
    """The model `hub:me/tiny`, which `export` has pushed; returns what it printed."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    options = ["--no-measure", "--push-to-hub", "me/tiny", "--private"]
    assert run(space.root, "export", "tiny", *options) == 0
    return printed(capfd)


def test_a_pushed_model_is_the_exported_folder_and_used_by_its_name(
    hub, space, push_output, tmp_path, capfd
):
    assert f"pushed: {hub.address}/me/tiny" in push_output
    folder = space.exports / "tiny"
    assert hub.files["me/tiny"] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.private["me/tiny"] in (True, "private")

    second_space = tmp_path / "other"
    third_space = tmp_path / "third"
    assert run(second_space, "import", NAME) == 0
    (checkpoint,) = (second_space / "runs" / "tiny").glob("step_*")
    assert load_provenance(checkpoint)["imported"]["from"] == "me/tiny"
    weights = load_model(checkpoint).state_dict()
    ours = load_model(next((space.runs / "tiny").glob("step_*"))).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in ours.items())
    # Commands that need a checkpoint import it at first use, and find it again.
    assert run(third_space, "generate", NAME, "--prompt", "abc", "-n", "2") == 0
    assert run(third_space, "export", NAME, "--no-measure", "--to", str(tmp_path / "e")) == 0
    assert [path.name for path in (third_space / "runs").iterdir()] == ["tiny"]
    assert load_model(tmp_path / "e").schedule == load_config(checkpoint).corrections
    # It has no tokens of this workspace, which a teacher needs.
    printed(capfd)
    assert run(third_space, "influence", NAME) == 2
    assert "tokenizer" in printed(capfd)
    # Models of one name are told apart by their owners.
    hub.add("you/tiny", folder)
    models = open_models([NAME, "hub:you/tiny"], space, ["1"])
    assert [*by_label(models)] == ["me/tiny r=1", "you/tiny r=1"]


def test_the_card_of_a_descendant_names_source_license_and_data_sets(
    hub, space, push_output, save_tiny, tiny_tokens, tmp_path
):
    hub.files["me/tiny"]["README.md"] = b"---\nlicense: apache-2.0\n---\n# Tiny\n"
    assert run(space.root, "import", NAME, "--name", "plain") == 0
    tokens = tmp_path / "texts" / tiny_tokens.name
    shutil.copytree(tiny_tokens, tokens)
    manifest = open_tokens(tokens).manifest
    settings = {**manifest.settings, "source": "hub", "hub_name": "me/texts"}
    manifest.model_copy(update={"settings": settings}).write(tokens / MANIFEST_NAME)
    parent = next((space.runs / "plain").glob("step_*"))
    for name in ("iterative", "student"):
        checkpoint = save_tiny(space.runs / name)
        job = TrainingJob(
            run_folder=str(checkpoint.parent),
            tokens_folder=str(tokens),
            model=load_config(checkpoint),
            recipe=TrainingSettings(),
            initial_folder=str(parent),
        )
        stored = StoredJob(recipe_version=RECIPE_VERSION, key=name, key_fields={}, job=job)
        stored.write(checkpoint.parent / JOB_NAME)
        parent = checkpoint
    assert run(space.root, "export", "student", "--no-measure", "--to", str(tmp_path / "out")) == 0
    metadata = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (metadata.base_model, metadata.license) == ("me/tiny", "apache-2.0")
    assert metadata.datasets == ["me/texts"]


def test_what_is_in_the_cache_needs_no_network(hub, push_output, monkeypatch):
    folder = download(NAME)
    assert name_with_owner(folder) == "me/tiny"
    monkeypatch.setenv("HF_ENDPOINT", _closed_address())
    assert download(NAME) == folder
    assert load_tokenizer(NAME).get_vocab_size() == 300
    model = open_model(folder, schedule="1")
    assert (model.label, model.is_external) == ("tiny r=1", True)
    with offline(DRY_RUN):
        assert download(NAME) == folder
        with refused(UserError, "dry run"):
            download("hub:me/other")
    with refused(UserError, "hub:me/other"):
        download("hub:me/other")


def test_only_files_of_a_model_are_downloaded(hub, space, push_output):
    hub.files["me/tiny"] |= {
        "consolidated.safetensors": b"the same again",
        "picture.png": b"large",
        "pytorch_model.bin": b"a pickle",
    }
    names = {path.name for path in download(NAME).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"consolidated.safetensors", "picture.png", "pytorch_model.bin"}


def _closed_address() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{server.getsockname()[1]}"


MISTAKES = [
    ("evaluate hub:me/none", "hub:me/none: the hub has no such model, or it is private"),
    ("evaluate hub:me/tiny@old", "the hub has no such branch, tag or commit of it"),
    ("import hub:me/gated", "hub:me/gated is gated: accept its terms"),
    ("import hub:a/b/c", "hub:a/b/c"),
    ("generate hub:me/none --prompt x", "the hub has no such model"),
    ("distill hub:me/tiny -r 0 --dry-run", "`iiet-orch import hub:me/tiny`"),
    ("evaluate me/tiny", "For a model of the Hugging Face hub write hub:me/tiny"),
    ("import me/tiny", "For a model of the Hugging Face hub write hub:me/tiny"),
    ("export tiny --push-to-hub me/x", "needs a token of the hub: set HF_TOKEN"),
    ("export tiny --push-to-hub me/x --token no", "Invalid user token"),
    ("export tiny --private", "are for --push-to-hub"),
    ("prepare --set data.tokenizer=hub:me/none", "the hub has no such model"),
]
NEEDS_NETWORK = [
    "evaluate hub:me/tiny",
    "benchmark hub:me/tiny",
    "evaluate tiny hub:me/tiny",
    "influence hub:me/tiny",
    "distill hub:me/tiny -r 0",
    "sweep-threshold hub:me/tiny",
    "generate hub:me/tiny --prompt x",
    "import hub:me/tiny",
    "import tiny --tokenizer hub:me/tiny",
    "export hub:me/tiny",
    "export tiny --push-to-hub me/tiny",
    "prepare --set data.tokenizer=hub:me/tiny",
]


def test_a_mistake_and_a_missing_network_are_one_sentence(hub, space, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hub.files |= {"me/tiny": {"config.json": b"{}"}, "me/gated": {}}
    hub.gated.add("me/gated")
    for command, sentence in MISTAKES:
        assert run(space.root, *command.split()) == 2, command
        assert sentence in printed(capfd)
    monkeypatch.setenv("HF_ENDPOINT", _closed_address())
    monkeypatch.chdir(space.runs)
    for command in NEEDS_NETWORK:
        assert run(space.root, *command.split()) == 2, command
        text = printed(capfd)
        assert "127.0.0.1 cannot be reached" in text
        assert NAME in text or "--push-to-hub me/tiny" in text
    assert not space.exports.exists()


DRY_RUNS = [
    "pretrain --from hub:me/none",
    "pretrain --set data.tokenizer=hub:me/none",
    "distill hub:me/none -r 1",
    "sweep-iterations --set data.tokenizer=hub:me/none",
    "sweep-threshold hub:me/none",
    "influence hub:me/none",
    "evaluate hub:me/none",
    "benchmark hub:me/none",
    "evaluate tiny --suite arc_easy",
]
"""What would need the hub."""


def test_a_dry_run_connects_to_nothing_also_where_a_run_needs_the_hub(
    hub, space, capfd, monkeypatch
):
    from orchestrator import plan_pretrain

    connections = list[str]()
    # Such as one that still tries to reach the server of an earlier test.
    threads_before = {*threading.enumerate()} - {threading.main_thread()}

    def refuse(*arguments: Any, **_: Any) -> None:
        if threading.current_thread() not in threads_before:
            connections.append(str(arguments))
        raise ConnectionRefusedError("no network in this test")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for command in DRY_RUNS:
        assert run(space.root, *command.split(), "--dry-run") in (0, 2)
        printed(capfd)
        assert not connections, command
    # In Python, too.
    with pytest.raises(UserError, match=DRY_RUN):
        plan_pretrain(resolve_settings({}), workspace=space, source="hub:me/none")
    assert not connections
    assert run(space.root, "evaluate", "hub:me/none") == 2
    assert connections, "without --dry-run it looks for the hub"


# The network


def test_the_probe_connects_to_the_endpoint_with_a_short_timeout(monkeypatch):
    addresses: list[tuple[Any, float]] = []

    def unreachable(address: Any, timeout: float) -> socket.socket:
        addresses.append((address, timeout))
        raise OSError("no route")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    assert "huggingface.co" in str(hub_problem())
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example:8080")
    assert "mirror.example" in str(hub_problem())
    hosts = [address for address, _ in addresses]
    assert hosts == [("huggingface.co", 443), ("mirror.example", 8080)]
    assert all(timeout <= 2 for _, timeout in addresses)
    # A proxy or the flag prevents it.
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("probed"))
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    assert hub_problem() is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_problem() == "HF_HUB_OFFLINE is set"


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_offline_affects_imported_libraries_and_is_undone(before, monkeypatch):
    from huggingface_hub import constants, is_offline_mode

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", before == "1")
    if before is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", before)
    with offline():
        assert is_offline_mode()
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert is_offline_mode() == (before == "1")
    assert os.environ.get("HF_HUB_OFFLINE") == before
