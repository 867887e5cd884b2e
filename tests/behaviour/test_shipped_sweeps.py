"""Every shipped sweep, run from its file at a tiny size, all in one workspace."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from small_size import SMALL

from orchestrator.pipelines.context import Desk
from orchestrator.pipelines.sweep_files import run_file
from orchestrator.settings import read_settings
from orchestrator.settings.shipped import shipped_sweeps
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.folders import open_workspace

pytestmark = pytest.mark.slow

HERE = [
    *SMALL,
    "data.source=python", "data.tokenizer=train", "model.preset=tiny", "training.precision=fp32",
    "training.num_sequences_per_pass=null", "distillation.training.num_sequences_per_pass=null",
    "distillation.training.precision=fp32", "cluster.num_gpus=0", "cluster.num_workers=1",
    "evaluation.suite=heldout",
]  # fmt: skip
"""The small size, without the hub and GPUs that some files ask for."""

FRONTS = {
    "iterations": {"vanilla", "r = 0", "r = 1", "r = 2", "r = 3"},
    "methods": {"vanilla", "pcformer", "r = 0", "r = 1", "r = 3"},
    "paper-340m": {"teacher", "vanilla", "r = 0", "0,0,0", "3,3,3"},
    "paper-55m": {"teacher", "vanilla", "r = 0", "0,0,0", "3,3,3"},
    "toy": {"teacher", "vanilla", "r = 0", "0,0,0", "2,2,2"},
}
"""What stands on the front of each, schedules between the ends apart."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Desk:
    """A workspace for all of them; what is printed can be read from its console."""
    workspace = open_workspace(tmp_path_factory.mktemp("shipped"))
    return Desk(workspace, Progress(), Console(file=StringIO(), width=140))


def run(desk: Desk, name: str, *more: str, dry_run: bool = False) -> str:
    """Run a shipped sweep and return what it printed."""
    assert isinstance(desk.console.file, StringIO)
    before = len(desk.console.file.getvalue())
    run_file(read_settings(shipped_sweeps()[name], [*HERE, *more]), desk, dry_run=dry_run)
    return desk.console.file.getvalue()[before:]


def done_in(folder: Path) -> set[Path]:
    """Return the trainings in a folder that have come to their end."""
    return set(folder.glob("*/done.json"))


def test_each_is_run_here() -> None:
    assert {*FRONTS, "search"} == set(shipped_sweeps())


@pytest.mark.parametrize("name", FRONTS)
def test_a_shipped_sweep_ends_with_its_front(name: str, desk: Desk) -> None:
    [folder] = re.findall(r"report: (.*)/front\.html", run(desk, name))
    results = json.loads(Path(folder, "results.json").read_text())["results"]
    assert FRONTS[name] <= {result["label"] for result in results}


def test_what_is_known_of_a_plan_is_told_and_what_follows_later_is_named(desk: Desk) -> None:
    for name in ("iterations", "methods"):
        assert "vanilla" in run(desk, name, dry_run=True)
    told = run(desk, "toy", "training.seed=5", dry_run=True)
    assert "teacher" in told
    assert "then at most" in told


def test_a_search_goes_on_from_the_family(desk: Desk) -> None:
    options = ("search.num_trials=2", "search.trials_per_round=2")
    run(desk, "toy")
    before = done_in(desk.workspace.trials)
    planned = run(desk, "search", *options, dry_run=True)
    assert "tries at most 2 more of 27 schedules" in planned
    many = run(desk, "search", "search.num_trials=99", dry_run=True)
    assert "tries at most 24 more of 27 schedules" in many
    run(desk, "search", *options)
    after = done_in(desk.workspace.trials)
    assert len(after - before) == 2, "the family was not trained again"
    assert "search-" in run(desk, "search", *options)
    assert done_in(desk.workspace.trials) == after
