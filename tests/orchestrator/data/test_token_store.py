"""Opening and verifying token folders: damage is found and named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from orchestrator.data.prepared import MANIFEST_NAME, verify_data
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import VERIFIED_NAME


@pytest.fixture
def folder(tmp_path: Path, tiny_tokens: Path) -> Path:
    return Path(shutil.copytree(tiny_tokens, tmp_path / "tokens"))


def test_another_format_and_a_damaged_stamp_do_not_count_as_verified(folder: Path) -> None:
    (folder / VERIFIED_NAME).write_text("{")
    for name in ("train.bin", "validation.bin", "validation.jsonl", "tokenizer.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="is missing"):
        verify_data(folder)
    (folder / MANIFEST_NAME).write_text('{"format": 99}')
    with pytest.raises(UserError, match="another version"):
        verify_data(folder)
