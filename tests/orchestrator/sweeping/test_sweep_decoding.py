"""The end of a sweep: drafts and cache strategies are measured once, for text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from iiet.schedule import IterationSchedule
from orchestrator.data.depth import write_depth
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.settings import DataSettings, Settings, resolve_settings
from orchestrator.settings.data import DepthSettings
from orchestrator.sweeping import decode
from orchestrator.sweeping.decode import with_decoding
from orchestrator.sweeping.plan import exact_cost
from orchestrator.sweeping.students import checkpoint_trial
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.layout import open_workspace


@pytest.fixture
def results(tiny_plan: SweepPlan, tmp_path: Path) -> list[Trial]:
    """A teacher, and its weights without corrections."""
    teacher = tiny_plan.trials[0]
    assert teacher.role == "teacher"
    config = teacher.model
    pruned = checkpoint_trial(
        "trial",
        "0,0",
        Path(str(teacher.checkpoint)),
        replace(config, schedule=IterationSchedule.none(2)),
        teacher.suite,
        open_workspace(tmp_path),
    )
    return [
        trial.with_numbers("cost", exact_cost(trial.model, config)) for trial in (teacher, pruned)
    ]


def measured(
    results: list[Trial], plan: SweepPlan, folder: Path, *, drafts: bool = True
) -> tuple[Trial, Trial]:
    settings: Settings = resolve_settings({}, [f"sweep.measure_drafts={str(drafts).lower()}"])
    full, pruned = with_decoding(results, plan, folder, settings, Progress())
    return full, pruned


def test_the_pruned_teacher_is_measured_as_the_teachers_draft(
    results: list[Trial], tiny_plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, pruned = measured(results, tiny_plan, tmp_path)
    names = {"decoding/acceptance", "decoding/exact_ms_per_token", "decoding/speed_up"}
    assert set(full.numbers) & names == set()
    assert set(pruned.numbers) >= names
    assert 0 <= pruned.metrics()["decoding/acceptance"] <= 1

    monkeypatch.setattr(decode, "_measure_drafts", pytest.fail)
    assert measured(results, tiny_plan, tmp_path) == (full, pruned)
    off = measured(results, tiny_plan, tmp_path, drafts=False)
    assert list(off) == results


def test_depth_tasks_are_not_generated(
    results: list[Trial], tiny_plan: SweepPlan, tmp_path: Path
) -> None:
    depth = DepthSettings(tasks=("phop_2",), num_symbols=2, length=8)
    tokens = write_depth(DataSettings(source="depth", depth=depth), tmp_path)
    plan = tiny_plan.model_copy(update={"tokens_folder": str(tokens)})
    assert list(measured(results, plan, tmp_path)) == results
