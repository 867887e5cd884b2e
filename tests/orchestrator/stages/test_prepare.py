"""Stage `prepare`: done once, found again, redone cleanly after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.data.tokens import TEMPORARY_PREFIX, open_tokens
from orchestrator.errors import UserError
from orchestrator.settings import DataSettings
from orchestrator.stages import prepare as stage
from orchestrator.stages.prepare import describe, prepare
from orchestrator.workspace import Workspace, open_workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "workspace")


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    texts = [f"Text {i} says that the sea has {i * 13} kinds of fish." for i in range(200)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    return DataSettings(source="files", files=(str(tmp_path / "*.txt"),), vocab_size=300)


def no_reading(*arguments: object) -> None:
    raise AssertionError("the source was read again")


def test_finished_work_is_found_again(
    workspace: Workspace, settings: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepare(settings, workspace)
    assert folder == workspace.tokens / open_tokens(folder, verify=True).fingerprint
    monkeypatch.setattr(stage, "read_documents", no_reading)
    assert prepare(settings, workspace) == folder
    assert "200 documents" in describe(folder)
    with pytest.raises(AssertionError, match="read again"):
        prepare(settings.model_copy(update={"vocab_size": 301}), workspace)


def test_a_changed_file_is_read_again(
    workspace: Workspace, settings: DataSettings, tmp_path: Path
) -> None:
    first = prepare(settings, workspace)
    (tmp_path / "b.txt").write_text("Another text is here for the fish to read.")
    second = prepare(settings, workspace)
    assert second != first
    (tmp_path / "b.txt").unlink()
    assert prepare(settings, workspace) == first


def test_damaged_tokens_are_made_again(workspace: Workspace, settings: DataSettings) -> None:
    folder = prepare(settings, workspace)
    (folder / "train.bin").write_bytes(b"")
    assert prepare(settings, workspace) == folder
    assert open_tokens(folder, verify=True)


def test_a_mistake_leaves_no_tokens(workspace: Workspace, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="the corpus is empty"):
        prepare(DataSettings(source="files", files=(str(tmp_path / "empty.txt"),)), workspace)
    with pytest.raises(UserError, match="no file matches"):
        prepare(DataSettings(source="files", files=("nowhere/*.txt",)), workspace)
    assert not list(workspace.tokens.rglob("*.bin"))


def test_a_killed_preparation_is_redone(workspace: Workspace, settings: DataSettings) -> None:
    # The child stops dead in the middle of writing, as a power cut would stop it.
    code = (
        "import os, signal\n"
        "from pathlib import Path\n"
        "from orchestrator.data import tokens\n"
        "from orchestrator.settings import DataSettings\n"
        "from orchestrator.stages.prepare import prepare\n"
        "from orchestrator.workspace import open_workspace\n"
        "tokens._check_counts = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"settings = DataSettings.model_validate_json({settings.model_dump_json()!r})\n"
        f"prepare(settings, open_workspace(Path({str(workspace.root)!r})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(workspace.tokens.glob(f"{TEMPORARY_PREFIX}*"))
    folder = prepare(settings, workspace)
    assert open_tokens(folder, verify=True)
    assert not list(workspace.tokens.glob(f"{TEMPORARY_PREFIX}*"))
