"""Checks of one node, without Ray: versions, a workspace that is not shared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from installed_package import PACKAGE, install, on_path
from refusals import assert_names

from orchestrator.cluster import nodes
from orchestrator.cluster.nodes import CODE, locked_file, problem_of_node, versions

ROOT = Path(__file__).resolve().parents[3]


def test_a_workspace_is_shared_if_its_files_and_locks_are(tmp_path, monkeypatch):
    monkeypatch.setattr(nodes, "SEEN_SECONDS", 0.0)
    with locked_file(tmp_path) as path:
        assert problem_of_node(path, versions()) == ""
        assert "does not see" in problem_of_node(tmp_path / "missing", {})

        def refuse(*_: Any) -> None:
            raise OSError(30, "read-only")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", refuse)
            problem = problem_of_node(path, {})
        assert f"(read-only) in {tmp_path}" in problem
    assert not [*tmp_path.iterdir()]
    # As on a file system that keeps locks to each node: nobody seems to hold it.
    (tmp_path / "free").touch()
    assert "gets locks" in problem_of_node(tmp_path / "free", {})


def test_a_package_that_one_node_lacks_is_named_with_the_node(tmp_path):
    """The node and this machine are one process, with and without the package on its path."""
    without = versions()
    assert {"python", "torch", "ray", CODE} <= set(without)
    assert problem_of_node(None, without) == ""
    entry = {"iiet.influence_metrics": {"distance": "metrics:Distance"}}
    for version in ("1.0", "1.1"):
        install(tmp_path / version, {}, entry, version=version)
    with on_path(tmp_path / "1.0"):
        ours = versions()
        assert problem_of_node(None, ours) == problem_of_node(None, without) == ""
    assert f"{PACKAGE}: not installed" in problem_of_node(None, ours)
    with on_path(tmp_path / "1.1"):
        problem = problem_of_node(None, ours)
    assert_names(problem, f"{PACKAGE}: 1.1", "1.0")


def test_code_that_differs_by_a_line_is_another(tmp_path, monkeypatch):
    ours = versions()
    copied = tmp_path / "orchestrator" / "cluster" / "nodes.py"
    for package in ("iiet", "orchestrator"):
        shutil.copytree(ROOT / package, tmp_path / package)
    monkeypatch.setattr(nodes, "__file__", str(copied))
    assert problem_of_node(None, ours) == "", "another place does not matter"
    with (tmp_path / "iiet" / "model" / "mix.py").open("a", encoding="utf-8") as file:
        file.write("# another version\n")
    problem = problem_of_node(None, ours)
    assert problem.startswith(f"has {CODE}: ")
    assert "all nodes" in problem
