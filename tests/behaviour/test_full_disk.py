"""On a full disk a command ends with one sentence, even if it cannot write its log."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from orchestrator.cli.session import open_session
from orchestrator.workspace.errors import RunFailed


def test_a_full_disk_is_reported_in_one_sentence(tmp_path: Path) -> None:
    with (
        pytest.raises(RunFailed, match=f"no space is left on the disk of {tmp_path}"),
        open_session(tmp_path, "pretrain", verbose=None),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
