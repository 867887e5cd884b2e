"""A trained teacher, whose sweeps several files plan."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iiet.iiad.pruning import InfluenceTable
from orchestrator.records.evaluation import Suite
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.students import Students
from orchestrator.workspace.layout import Workspace, open_workspace


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, trained_run) -> Path:
    copy = shutil.copytree(trained_run, tmp_path_factory.mktemp("runs") / "teacher")
    return copy / "step_00000002"


@pytest.fixture
def space(tmp_path) -> Workspace:
    return open_workspace(tmp_path)


@pytest.fixture
def table() -> InfluenceTable:
    """The teacher's influence: its family is 2,1 then 1,1 then 1,0 then 0,0."""
    return InfluenceTable(
        metric="cosine",
        value_rows=((0.5, 0.1), (0.3,)),
        error_rows=((0.0, 0.0), (0.0,)),
        num_tokens=64,
        layer_values=(0.2, 0.7),
    )


@pytest.fixture
def students(space, teacher, tiny_tokens) -> Callable[..., Students]:
    """A function that returns the teacher's students under settings, as `name=value` texts."""

    def make(*assignments: str, **suite: Any) -> Students:
        measured = Suite(**{"suite": "x", "tokens_folder": str(tiny_tokens), **suite})
        settings = resolve_settings({}, assignments)
        return Students(settings.sweep, settings.distillation, space, teacher, measured)

    return make
