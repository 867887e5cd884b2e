"""Checks of one node, without Ray: shared memory, and a workspace that is not shared."""

from __future__ import annotations

from pathlib import Path

import pytest
from installed_package import PACKAGE, install, on_path

from orchestrator.cluster import node_checks
from orchestrator.cluster.node_checks import CODE, versions
from orchestrator.cluster.shared_memory import check_shared_memory
from orchestrator.workspace.errors import UserError

MIB = 2**20


def test_an_object_store_must_fit_into_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    check_shared_memory(64 * MIB, 64 * MIB)
    check_shared_memory(64 * MIB, None)
    with pytest.raises(UserError, match=r"takes 128 MiB, .* 64 MiB; .*--shm-size"):
        check_shared_memory(128 * MIB, 64 * MIB)
    monkeypatch.setenv("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", "1")
    check_shared_memory(128 * MIB, 64 * MIB)


def test_a_node_answers_in_the_workspace_that_it_shares(tmp_path: Path) -> None:
    with node_checks._shared_text(tmp_path) as text:
        (folder,) = tmp_path.iterdir()
        assert node_checks._workspace_problem(folder, text, "a") == ""
        assert (folder / "a").read_text() == text
    assert not folder.exists()


def test_another_folder_and_locks_that_do_not_reach_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_checks, "SEEN_SECONDS", 0.0)
    missing = node_checks._workspace_problem(tmp_path / "missing", "text", "a")
    assert "does not see" in missing
    (tmp_path / "text").write_text("of another run")
    assert node_checks._workspace_problem(tmp_path, "text", "a") == missing
    # As on a file system that keeps locks to each node: nobody seems to hold it.
    (tmp_path / "text").write_text("text")
    assert "gets locks" in node_checks._workspace_problem(tmp_path, "text", "a")


def test_code_is_part_of_the_versions() -> None:
    assert {"python", "torch", "ray", CODE} <= set(versions())
    assert versions() == versions()


def test_a_package_that_one_node_lacks_is_named_with_the_node(tmp_path: Path) -> None:
    """The node and this machine are one process, with and without the package on its path."""
    without = versions()
    sites = {}
    for version in ("1.0", "1.1"):
        install(
            tmp_path / version,
            {},
            {"iiet_orch.data_sources": {"letters": "letters:Letters"}},
            version=version,
        )
        with on_path(tmp_path / version):
            sites[version] = versions()
    address = "the node 10.0.0.7"
    node_checks._check_versions(sites["1.0"], sites["1.0"], address)
    node_checks._check_versions(sites["1.0"], without, address)  # Nothing here can need it.
    for theirs, words in (
        (
            without,
            rf"^{address} lacks the package {PACKAGE}, and this machine has version 1\.0; in",
        ),
        (sites["1.1"], rf"^{address} has {PACKAGE} 1\.1, and this machine has 1\.0; install the"),
    ):
        with pytest.raises(UserError, match=words):
            node_checks._check_versions(theirs, sites["1.0"], address)
    with pytest.raises(UserError, match=rf"^this machine lacks the package mlflow, and {address} "):
        node_checks._check_versions(without, {**without, "mlflow": "not installed"}, address)
