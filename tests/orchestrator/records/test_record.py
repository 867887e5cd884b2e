"""Records come back from their files, also where the workspace was moved."""

from __future__ import annotations

from pathlib import Path

from sample_trials import sample_trial

from orchestrator.records.trial import SweepPlan
from orchestrator.workspace.layout import open_workspace


def test_paths_of_nested_records_follow_the_workspace(tmp_path: Path) -> None:
    root = open_workspace(tmp_path / "old").root
    trial = sample_trial(key="t", folder=f"{root}/trials/t", checkpoint="/elsewhere/step_1")
    plan = SweepPlan(
        key="k", name="n", kind="threshold", tokens_folder=f"{root}/tokens/f",
        teacher=f"{root}/runs/teacher/step_2", num_requested=1, trials=(trial,),
    )  # fmt: skip
    path = root / "sweeps" / "n" / "plan.json"
    plan.write(path)
    assert str(root) not in path.read_text()
    assert SweepPlan.read(path) == plan
    moved = root.rename(tmp_path / "new")
    found = SweepPlan.read(moved / "sweeps" / "n" / "plan.json")
    assert found is not None
    assert found.tokens_folder == f"{moved}/tokens/f"
    assert found.teacher == f"{moved}/runs/teacher/step_2"
    assert found.trials[0].folder == f"{moved}/trials/t"
    assert found.trials[0].checkpoint == "/elsewhere/step_1"


def test_outside_of_a_workspace_paths_stay_absolute(tmp_path: Path) -> None:
    trial = sample_trial(key="t", folder=f"{tmp_path}/trials/t")
    trial.write(tmp_path / "trial.json")
    assert type(trial).read(tmp_path / "trial.json") == trial
    assert f"{tmp_path}/trials/t" in (tmp_path / "trial.json").read_text()
