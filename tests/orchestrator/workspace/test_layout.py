"""The workspace: where it is, who may use it, names in it, and paths relative to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from file_modes import only_readable
from refusals import refused

from orchestrator import cli
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import write_json
from orchestrator.workspace.layout import (
    WORKSPACE_FILE_NAME,
    absolute_path,
    check_name_option,
    is_valid_name,
    open_workspace,
    portable_path,
    workspace_root,
)
from orchestrator.workspace.provenance import RECIPE_VERSION


def test_the_workspace_and_its_mlflow_store_are_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("IIET_WORKSPACE", str(tmp_path / "here"))
    assert open_workspace().root == tmp_path / "here"
    space = open_workspace(tmp_path / "there")
    assert space.root == tmp_path / "there"
    assert space.tracking_uri == f"sqlite:///{tmp_path / 'there' / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert space.tracking_uri == "http://127.0.0.1:1"


def test_a_workspace_that_cannot_be_written_is_refused_if_the_command_must_write(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workspace"):
        open_workspace(tmp_path / "file")
    assert open_workspace(tmp_path).is_writable
    with only_readable(tmp_path):
        with refused(UserError, "workspace", "Permission denied"):
            open_workspace(tmp_path)
        assert not open_workspace(tmp_path, must_write=False).is_writable


def test_a_copied_workspace_is_used_where_it_is_and_one_of_another_version_not_at_all(
    tmp_path, capfd
):
    used = open_workspace(tmp_path / "used").root
    write_json(used / "runs" / "toy" / "job.json", {"job": {"run_folder": f"{used}/runs/toy"}})
    (used / "tokens" / "abc").mkdir(parents=True)
    copy = Path(shutil.copytree(used, tmp_path / "copy"))
    assert open_workspace(copy).root == copy
    assert str(used) not in (copy / WORKSPACE_FILE_NAME).read_text()
    shutil.copytree(used / "tokens", tmp_path / "other" / "tokens")
    assert open_workspace(tmp_path / "other").root == tmp_path / "other"
    for record in ({"root": "/a"}, {"recipe_version": RECIPE_VERSION}):
        write_json(used / WORKSPACE_FILE_NAME, record)
        before = {path: path.read_bytes() for path in used.rglob("*") if path.is_file()}
        assert cli.main(["report", "--workspace", str(used)]) == 2
        assert "another version" in " ".join(capfd.readouterr().err.split())
        assert {path: path.read_bytes() for path in used.rglob("*") if path.is_file()} == before


def test_a_path_to_another_place_is_not_a_valid_name():
    for name in ("toy", "A b", "1,1,0", "r=2 + x", "überschau", "a..b"):
        assert is_valid_name(name)
        assert check_name_option(name) == name
    invalid_names: tuple[object, ...] = (
        *("", ".", "..", ".hidden", "a/b", "../a", "/a", "a\\b", "a\n", "-x", "é" * 101, 7, None),
    )
    assert not any(map(is_valid_name, invalid_names))


def test_a_path_comes_back_from_its_stored_form(tmp_path):
    root = str(tmp_path)
    for path, stored in (
        (f"{root}/runs/a/step_1", "runs/a/step_1"),
        (f"{root}-copy/runs/a", f"{root}-copy/runs/a"),
        (root, root),
        ("/elsewhere/text.txt", "/elsewhere/text.txt"),
        ("", ""),
    ):
        assert portable_path(path, tmp_path) == stored
        assert absolute_path(stored, tmp_path) == path
        assert portable_path(path, None) == absolute_path(path, None) == path
    assert workspace_root(tmp_path) is None
    outer = open_workspace(tmp_path / "outer").root
    inner = open_workspace(outer / "runs" / "inner").root
    assert workspace_root(outer / "runs" / "a" / "job.json") == outer
    assert workspace_root(inner) == workspace_root(inner / "runs") == inner
