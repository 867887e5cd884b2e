"""A disk without room ends any command with a sentence, even where the log cannot be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from orchestrator.cli.session import open_session
from orchestrator.workspace.errors import RunFailed


def test_no_room_is_said_in_a_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(RunFailed, match=f"no room is left on the disk of {tmp_path}"),
        open_session(tmp_path, "pretrain", verbose=False),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
