"""Files are whole or reported as damaged, with a remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import (
    damage_as_user_error,
    read_json,
    write_json,
)


def test_json_is_whole_or_reported_as_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    assert read_json(path) is None
    write_json(path, {"x": 1})
    assert read_json(path) == {"x": 1}
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]
    path.write_text('{"x":')
    with pytest.raises(UserError, match="damaged"):
        read_json(path)


def test_a_flipped_bit_in_a_number_is_reported(tmp_path: Path) -> None:
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
def test_a_value_of_another_type_is_reported_with_its_file(
    tmp_path: Path, read: Callable[[Any], object]
) -> None:
    with (
        pytest.raises(UserError, match=r"a\.json is damaged"),
        damage_as_user_error(tmp_path / "a.json"),
    ):
        read({"a": "text"})
