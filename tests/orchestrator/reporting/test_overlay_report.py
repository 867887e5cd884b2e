"""Several sweeps on one front: shared results once, sweeps distinguished, notes on other tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.reporting.front_axes import parse_axes
from orchestrator.reporting.results import StoredSweep, load_sweep_results
from orchestrator.reporting.sweep_report import write_sweep_report
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace


@pytest.fixture
def workspace(tmp_path: Path, sample_results: list[Trial]) -> Workspace:
    """Two sweeps that share the teacher and the baselines; the second one's trials are better."""
    space = open_workspace(tmp_path / "ws")
    trials = [result for result in sample_results if result.role == "trial"]
    others = [result for result in sample_results if result.role != "trial"]
    better = [
        t.model_copy(update={"key": f"b{t.key}"}).with_numbers(
            "quality", {"accuracy": t.numbers["quality/accuracy"] + 0.01}
        )
        for t in trials[::2]
    ]
    for name, own in (("first", trials), ("second", better)):
        facts = {"Settings": {"training.seed": "0", "name": name}}
        suite = TrialSuite(suite="heldout-1", tokens_folder=name)
        results = tuple(r.model_copy(update={"suite": suite}) for r in (*others, *own))
        StoredSweep(name=name, key=name, results=results, facts=facts).store(space)
    return space


def test_sweeps_share_a_front_and_are_distinguished(workspace: Workspace) -> None:
    written = write_sweep_report(workspace, "first", "second", "first")
    assert written.folder == workspace.overlays / "first+second"
    assert {path.suffix for path in written.files} >= {".png", ".html", ".md", ".csv", ".json"}
    front = written.report.front
    assert len(front.points) == 3 + 9 + 5
    # A trial of the first sweep stays where the second one has none as cheap.
    better = [point.cost for point in front.members if front.sweep_of[point.result.key] == "second"]
    assert {6.0, 10.0} <= set(better)
    assert {name: len(part.members) > 1 for name, part in front.by_sweep.items()} == {
        "first": True,
        "second": True,
    }
    assert written.report.notes == []
    facts = written.report.facts
    assert facts["Settings: the same in all"] == {"training.seed": "0"}
    assert facts["Settings: second"] == {"name": "second"}
    rows = json.loads((written.folder / "front.json").read_text("utf-8"))["results"]
    assert sum(row["role"] == "teacher" for row in rows) == 1


def test_an_overlay_on_other_axes_has_its_own_folder(workspace: Workspace) -> None:
    written = write_sweep_report(workspace, "first", "second", axes=parse_axes("kv", "bits"))
    assert written.folder.name == "first+second-bits-kv"
    assert written.report.front.axes.cost == "cost/kv_bytes_per_token"


def test_different_tasks_have_a_note(workspace: Workspace) -> None:
    suite = TrialSuite(suite="heldout-2", tokens_folder="elsewhere")
    sweep = load_sweep_results(workspace, "second")
    results = tuple(r.model_copy(update={"suite": suite}) for r in sweep.results)
    sweep.model_copy(update={"results": results}).store(workspace)
    written = write_sweep_report(workspace, "first", "second")
    [note] = written.report.notes
    assert "not measured on the same tasks and texts (suite heldout-1 / heldout-2)" in note
    assert written.report.sentences[0] == note


def test_an_unknown_sweep_is_a_user_error(workspace: Workspace) -> None:
    with pytest.raises(UserError, match=r"'third'.*first, second"):
        write_sweep_report(workspace, "first", "third")


def test_milliseconds_of_different_sweeps_come_with_a_warning(workspace: Workspace) -> None:
    [note] = write_sweep_report(workspace, "first", "second", axes=parse_axes("ms")).report.notes
    assert "measured separately for each sweep" in note


def test_only_names_that_two_sweeps_share_include_the_sweep(workspace: Workspace) -> None:
    said = " ".join(write_sweep_report(workspace, "first", "second").report.sentences)
    assert "vanilla (accuracy" in said
    assert "0,1,1,1,0,1 (second)" in said
