"""Checks of one node, without Ray: shared memory, versions, a workspace that is not shared."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from installed_package import PACKAGE, install, on_path

from orchestrator.cluster import nodes
from orchestrator.cluster.nodes import (
    CODE,
    check_shared_memory,
    check_versions,
    locked_text,
    versions,
    workspace_problem,
)
from orchestrator.workspace.errors import UserError

MIB = 2**20


def test_an_object_store_must_fit_into_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    check_shared_memory(64 * MIB, 64 * MIB)
    check_shared_memory(64 * MIB, None)
    with pytest.raises(UserError, match=r"takes 128 MiB, .* 64 MiB; .*--shm-size"):
        check_shared_memory(128 * MIB, 64 * MIB)
    monkeypatch.setenv("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", "1")
    check_shared_memory(128 * MIB, 64 * MIB)


def test_a_workspace_is_shared_if_its_files_and_locks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SEEN_SECONDS", 0.0)
    with locked_text(tmp_path) as (path, text):
        assert path
        assert workspace_problem(path, text) == ""
        assert "does not see" in workspace_problem(path, "of another run")
        assert "does not see" in workspace_problem(tmp_path / "missing", text)
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", lambda *_: (_ for _ in ()).throw(OSError(30, "read-only")))
            assert workspace_problem(path, text) == "cannot write files (read-only)"
    assert not [*tmp_path.iterdir()]
    # As on a file system that keeps locks to each node: nobody seems to hold it.
    (tmp_path / "text").write_text("text")
    assert "gets locks" in workspace_problem(tmp_path / "text", "text")


def test_a_package_that_one_node_lacks_is_named_with_the_node(tmp_path: Path) -> None:
    """The node and this machine are one process, with and without the package on its path."""
    without = versions()
    assert {"python", "torch", "ray", CODE} <= set(without)
    sites = {}
    for version in ("1.0", "1.1"):
        entry = {"iiet_orch.data_sources": {"letters": "letters:Letters"}}
        install(tmp_path / version, {}, entry, version=version)
        with on_path(tmp_path / version):
            sites[version] = versions()
    place = "the node 10.0.0.7"
    check_versions(sites["1.0"], sites["1.0"], place)
    check_versions(sites["1.0"], without, place)  # Nothing here can need it.
    for theirs, words in (
        (without, rf"^{place} lacks the package {PACKAGE}, and this machine has version 1\.0; in"),
        (sites["1.1"], rf"^{place} has {PACKAGE} 1\.1, and this machine has 1\.0; install the"),
    ):
        with pytest.raises(UserError, match=words):
            check_versions(theirs, sites["1.0"], place)
    with pytest.raises(UserError, match=rf"^this machine lacks the package mlflow, and {place} "):
        check_versions(without, {**without, "mlflow": "not installed"}, place)
