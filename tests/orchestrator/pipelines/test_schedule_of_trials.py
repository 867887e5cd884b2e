"""A trial of a sweep proposes the schedule of a training that counts: by its name, or its place."""

from __future__ import annotations

import json
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import pytest
from commands import run_here
from sample_trials import sample_trial

from orchestrator.cli import main
from orchestrator.pipelines.training import schedule_of_trial
from orchestrator.reporting.results import StoredSweep
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    """A workspace with a sweep, `two`: a teacher, a student of two seeds, and a vanilla model."""
    space = open_workspace(tmp_path)

    def trial(key: str, nfe: int, accuracy: float, **fields: Any) -> Any:
        numbers = {"cost": {"evaluations": nfe}, "quality": {"accuracy": accuracy}}
        return sample_trial(key=key, **numbers, **fields)

    seeds = [
        trial(f"s{n}", 3, 0.4, label=f"1,0, seed {n}", group="1,0", seed=n, schedule=(1, 0))
        for n in (0, 1)
    ]
    full = trial("full", 6, 0.5, role="teacher", label="teacher", schedule=(2, 2))
    plain = trial("plain", 2, 0.1, role="baseline", label="vanilla", method="vanilla")
    StoredSweep(name="two", key="k", results=(full, *seeds, plain)).store(space)
    return space


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("teacher", (2, 2)), ("2,2", (2, 2)), ("1,0", (1, 0)), ("1,0, seed 1", (1, 0)),
        ("best", (2, 2)), ("cheapest", (1, 0)),
    ],
)  # fmt: skip
def test_a_trial_is_named_as_its_table_shows_it_or_by_its_place(workspace, name, schedule):
    assert schedule_of_trial(f"two:{name}", workspace=workspace) == schedule


@pytest.mark.parametrize("name", ["two", "two:3,3", "three:1,0", "two:vanilla"])
def test_a_name_without_a_schedule_is_a_mistake(workspace, name):
    with pytest.raises(UserError):
        schedule_of_trial(name, workspace=workspace)


def test_a_command_takes_one_schedule(workspace):
    words = ["pretrain", "--schedule-of", "two:1,0", "--workspace", str(workspace.root)]
    with redirect_stderr(StringIO()) as printed:
        assert main([*words, "-r", "2"]) == 2
    assert "--schedule-of" in printed.getvalue()
    sizes = [
        "--set", "model.num_layers=2", "--set", "model.dim=16", "--set", "model.num_heads=2",
        "--dry-run", "--json",
    ]  # fmt: skip
    planned = json.loads(run_here(*words[:3], *sizes, workspace=workspace.root))
    assert planned["schedule"] == "1,0"
