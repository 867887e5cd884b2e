"""Checks of one node, without Ray: versions, a workspace that is not shared."""

from __future__ import annotations

from pathlib import Path

import pytest
from installed_package import PACKAGE, install, on_path

from orchestrator.cluster import ray
from orchestrator.cluster.ray import CODE, check_versions, locked_file, versions, workspace_problem
from orchestrator.workspace.errors import UserError


def test_a_workspace_is_shared_if_its_files_and_locks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "SEEN_SECONDS", 0.0)
    with locked_file(tmp_path) as path:
        assert workspace_problem(path) == ""
        assert "does not see" in workspace_problem(tmp_path / "missing")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(30, "read-only")))
            assert workspace_problem(path) == "cannot write or lock files (read-only)"
    assert not [*tmp_path.iterdir()]
    # As on a file system that keeps locks to each node: nobody seems to hold it.
    (tmp_path / "free").touch()
    assert "gets locks" in workspace_problem(tmp_path / "free")


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
    for theirs, found in ((without, "not installed"), (sites["1.1"], r"1\.1")):
        words = rf"^{PACKAGE}: {found} on {place}, and 1\.0 on this machine; install the same on"
        with pytest.raises(UserError, match=words):
            check_versions(theirs, sites["1.0"], place)
