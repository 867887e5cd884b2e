"""Content keys depend on content alone."""

from __future__ import annotations

from pathlib import Path

from orchestrator.workspace.provenance import content_key, file_key


def test_keys_depend_on_content_alone(tmp_path: Path) -> None:
    assert content_key({"a": 1, "b": [1, 2]}) == content_key({"b": [1, 2], "a": 1})
    assert content_key({"a": 1}) != content_key({"a": 2})
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"x" * 3_000_000)
    two.write_bytes(b"x" * 3_000_000)
    assert file_key(one) == file_key(two)
    two.write_bytes(b"x" * 2_999_999 + b"y")
    assert file_key(one) != file_key(two)
