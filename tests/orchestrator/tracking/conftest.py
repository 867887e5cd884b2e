"""An experiment in a store of its own."""

from __future__ import annotations

import pytest

from orchestrator.tracking.tracker import Tracking, open_tracking
from orchestrator.workspace.layout import Workspace, open_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    # One store for all tests of the module: making a database takes seconds.
    return open_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def tracking(workspace) -> Tracking:
    return open_tracking(workspace, warn=pytest.fail)
