"""An empty workspace, and a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.data.store import open_tokens
from orchestrator.workspace.layout import Workspace, open_workspace


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return open_workspace(tmp_path / "workspace")


@pytest.fixture
def tokenizer(tiny_tokens) -> Path:
    return open_tokens(tiny_tokens).tokenizer_path
