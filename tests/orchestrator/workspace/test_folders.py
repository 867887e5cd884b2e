"""The workspace: whole files or none, and a clear word when nothing can be written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator import cli
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import (
    damage_as_user_error,
    read_json,
    read_json_object,
    write_json,
)
from orchestrator.workspace.folders import (
    WORKSPACE_FILE_NAME,
    check_name_option,
    is_valid_name,
    open_workspace,
)
from orchestrator.workspace.provenance import RECIPE_VERSION, content_key, file_key


def test_the_environment_names_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IIET_WORKSPACE", str(tmp_path / "here"))
    assert open_workspace().root == tmp_path / "here"
    assert open_workspace(tmp_path / "there").root == tmp_path / "there"


def test_the_store_is_in_the_workspace_unless_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    space = open_workspace(tmp_path)
    assert space.tracking_uri == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert space.tracking_uri == "http://127.0.0.1:1"


def test_a_workspace_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(UserError, match="--workspace"):
        open_workspace(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_workspace_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match="cannot write"):
        open_workspace(tmp_path)


@pytest.fixture
def used(tmp_path: Path) -> Path:
    """A workspace with a run in it."""
    workspace = open_workspace(tmp_path / "used")
    run = workspace.runs / "toy"
    write_json(run / "job.json", {"job": {"run_folder": str(run)}})
    return workspace.root


@pytest.mark.parametrize("is_recorded", [True, False])
def test_a_copied_workspace_is_refused(used: Path, tmp_path: Path, is_recorded: bool) -> None:
    copy = Path(shutil.copytree(used, tmp_path / "copy"))
    if not is_recorded:  # As workspaces were before they knew their place.
        (copy / WORKSPACE_FILE_NAME).unlink()
    before = sorted(copy.rglob("*"))
    for _ in range(2):
        with pytest.raises(UserError, match=f"{copy} was copied or moved from {used}"):
            open_workspace(copy)
    assert sorted(copy.rglob("*")) == before
    open_workspace(used)


def test_a_moved_workspace_goes_on_until_another_lies_in_its_old_place(
    used: Path, tmp_path: Path
) -> None:
    moved = used.rename(tmp_path / "moved")
    for _ in range(2):
        assert open_workspace(moved).root == moved
    (used / "artifacts").mkdir(parents=True)  # MLflow makes them anew.
    open_workspace(moved)
    open_workspace(used)
    with pytest.raises(UserError, match="which is a workspace as well"):
        open_workspace(moved)
    shutil.rmtree(used)
    assert open_workspace(moved.rename(used)).root == used


def test_tokens_alone_can_be_copied(used: Path, tmp_path: Path) -> None:
    (used / "tokens" / "abc").mkdir(parents=True)
    shutil.copytree(used / "tokens", tmp_path / "other" / "tokens")
    assert open_workspace(tmp_path / "other").root == tmp_path / "other"


def test_the_same_folder_under_two_paths_is_no_copy(used: Path, tmp_path: Path) -> None:
    # As a second mount of it would look.
    other = tmp_path / "mount"
    (used / WORKSPACE_FILE_NAME).unlink()
    write_json(used / "runs" / "b" / "job.json", {"job": {"run_folder": f"{other}/runs/b"}})
    other.symlink_to(used)
    assert open_workspace(used).root == used


@pytest.mark.parametrize("record", ["7", "[]", '{"root": 7}', '{"job": {"run_folder": 7}}'])
def test_a_record_of_another_form_is_passed_over(used: Path, record: str) -> None:
    (used / WORKSPACE_FILE_NAME).write_text(record)
    (used / "runs" / "toy" / "job.json").write_text(record)
    assert open_workspace(used).root == used


OLDER_RUN = Path(__file__).parents[2] / "fixtures" / "older" / "run_iiet"
"""A run as version 0.1 left it."""


def test_a_workspace_of_another_version_is_refused_and_left_as_it_is(
    used: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = used / "runs" / "toy" / "job.json"
    older = json.loads((OLDER_RUN / "job.json").read_text())
    record.write_text(json.dumps({**older, "job": {"run_folder": str(record.parent)}}))
    write_json(used / WORKSPACE_FILE_NAME, {"root": str(used), "records_name": []})
    before = {path: path.read_bytes() for path in used.rglob("*") if path.is_file()}
    for _ in range(2):
        assert cli.main(["report", "--workspace", str(used)]) == 2
        text = " ".join(capfd.readouterr().err.split())
        assert "trainings of another version of this program" in text
        assert "`iiet-orch import OLD_CHECKPOINT`" in text
    assert {path: path.read_bytes() for path in used.rglob("*") if path.is_file()} == before
    own = {"key": older["key"], "job": {"run_folder": str(record.parent)}}
    write_json(record, {**own, "recipe_version": RECIPE_VERSION + 1})
    with pytest.raises(UserError, match="another version"):
        open_workspace(used)
    write_json(record, {**own, "recipe_version": RECIPE_VERSION})
    open_workspace(used)
    assert read_json(used / WORKSPACE_FILE_NAME)["recipe_version"] == RECIPE_VERSION


def test_json_is_whole_or_named_as_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    assert read_json(path) is None
    write_json(path, {"x": 1})
    assert read_json(path) == {"x": 1}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]
    path.write_text('{"x":')
    with pytest.raises(UserError, match="damaged"):
        read_json(path)


@pytest.mark.parametrize("name", ["toy", "A b", "1,1,0", "r=2 + x", "überschau", "a..b"])
def test_a_name_is_that_of_a_folder(name: str) -> None:
    assert is_valid_name(name)
    assert check_name_option(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "../a", "/a", "a\\b", "a\n", "-x", "é" * 101, 7, None]
)
def test_what_could_lead_elsewhere_is_no_name(name: object) -> None:
    assert not is_valid_name(name)


def _damage(path: Path, how: str) -> None:
    path.unlink(missing_ok=True)
    if how == "a folder":
        path.mkdir(parents=True)
    elif how == "a link to itself":
        path.symlink_to(path)
    else:
        contents = {
            "empty": b"",
            "cut off": b'{"x": 1',
            "not UTF-8": b'{"x": "\xff"}',
            "deep": b"[" * 100_000 + b"]" * 100_000,
            "no object": b"[1, 2]",
            "a long integer": b'{"x": ' + b"9" * 5000 + b"}",
        }
        path.write_bytes(contents[how])


@pytest.mark.parametrize(
    "how",
    [
        "a folder", "a link to itself", "empty", "cut off", "not UTF-8", "deep", "no object",
        "a long integer",
    ],
)  # fmt: skip
def test_a_damaged_object_is_named_with_its_cure(tmp_path: Path, how: str) -> None:
    path = tmp_path / "a.json"
    _damage(path, how)
    with pytest.raises(UserError) as caught:
        read_json_object(path, remedy="do this")
    text = str(caught.value)
    assert text.startswith(f"{path} is damaged (")
    assert text.endswith("; do this")
    assert len(text) < len(str(path)) + 300


def test_a_flipped_bit_in_a_number_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    stored = {"accuracy": 0.4462, "loss": float("inf"), "by task": {"x": [1, 2.5, None]}}
    write_json(path, stored)
    assert read_json(path) == stored
    text = path.read_text()
    path.write_text(text.replace("0.4462", "0.5462"))
    with pytest.raises(UserError, match="its content is not what was written"):
        read_json(path)
    path.write_text(json.dumps(stored))
    assert read_json(path) == stored, "files of earlier versions have no checksum"


@pytest.mark.parametrize(
    "read",
    [lambda v: v["x"], lambda v: v["a"]["b"], lambda v: int(v["a"]), lambda v: v["a"].items()],
)
def test_a_value_of_another_kind_is_named_with_its_file(
    tmp_path: Path, read: Callable[[Any], object]
) -> None:
    with (
        pytest.raises(UserError, match=r"a\.json is damaged"),
        damage_as_user_error(tmp_path / "a.json"),
    ):
        read({"a": "text"})


def test_keys_depend_on_content_and_on_nothing_else(tmp_path: Path) -> None:
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"x" * 3_000_000)
    two.write_bytes(b"x" * 3_000_000)
    assert file_key(one) == file_key(two)
    two.write_bytes(b"x" * 2_999_999 + b"y")
    assert file_key(one) != file_key(two)
