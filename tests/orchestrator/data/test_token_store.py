"""Opening and verifying token folders: damage is found and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from orchestrator.data.prepared import MANIFEST_NAME, verify_data
from orchestrator.data.token_store import open_tokens
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.whole_folders import VERIFIED_NAME


@pytest.fixture
def folder(tmp_path: Path, tiny_tokens: Path) -> Path:
    return Path(shutil.copytree(tiny_tokens, tmp_path / "tokens"))


def test_a_damaged_file_is_named(folder: Path) -> None:
    data = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    open_tokens(folder)
    with pytest.raises(UserError, match=r"is damaged: train\.bin was changed after writing"):
        verify_data(folder)
    (folder / "train.bin").write_bytes(data[:-2])
    with pytest.raises(UserError, match=r"train\.bin is damaged: .* bytes instead of"):
        open_tokens(folder)
    (folder / "train.bin").unlink()
    with pytest.raises(UserError, match=r"train\.bin is missing; delete the folder .* run"):
        open_tokens(folder)
    with pytest.raises(UserError, match="no prepared tokens"):
        open_tokens(folder / "nowhere")


def test_a_manifest_without_a_value_is_damaged(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text('{"format": 1, "fingerprint": "f"}')
    with pytest.raises(
        UserError, match=rf"{MANIFEST_NAME} is damaged .*dtype.*; delete the folder"
    ):
        open_tokens(folder)


def test_another_format_and_a_damaged_stamp_do_not_count_as_verified(folder: Path) -> None:
    (folder / VERIFIED_NAME).write_text("{")
    for name in ("train.bin", "validation.bin", "validation.jsonl", "tokenizer.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="is missing"):
        verify_data(folder)
    (folder / MANIFEST_NAME).write_text('{"format": 99}')
    with pytest.raises(UserError, match="another version"):
        verify_data(folder)
