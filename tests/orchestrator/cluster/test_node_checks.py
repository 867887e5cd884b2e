"""Checks of one node, without Ray: shared memory, and a workspace that is not shared."""

from __future__ import annotations

from pathlib import Path

import pytest

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
