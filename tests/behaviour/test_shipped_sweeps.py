"""Every shipped sweep runs from its file at a tiny size, all in one workspace."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from small_size import SMALL

from orchestrator import SweepResult, plan_sweep, sweep
from orchestrator.settings import Settings, read_settings
from orchestrator.settings.files import shipped_sweeps
from orchestrator.workspace.layout import Workspace, open_workspace

HERE = [
    *SMALL,
    "data.tokenizer=train", "model.preset=tiny",
    "training.num_sequences_per_pass=null", "distillation.training.num_sequences_per_pass=null",
    "cluster.num_gpus=0", "cluster.num_workers=1",
    "evaluation.suite=heldout",
]  # fmt: skip
"""The small size, without the hub and GPUs that some files ask for."""

PAPER = ["sweep.seeds=[0]", "sweep.budgets=[9, 3]", "data.validation_fraction=0.05"]
"""Budgets of this size, and longer held-out texts. Both sweeps of the paper are the same one then.
The sweep `claims` shows that several seeds give intervals."""
SEVERAL_TEACHERS = {
    "claims": ["sweep.seeds=[0, 1]", "sweep.budgets=[9, 6, 3]"],
    "paper-340m": PAPER,
    "paper-55m": PAPER,
}
SMALL_SOURCE = [
    "source_training.num_steps=12", "source_training.num_tokens_per_step=256",
    "source_training.num_validation_tokens=512",
]  # fmt: skip
"""Few steps of a source, so also of the controls that have as many training FLOPs as it."""
OPTIONS = {**SEVERAL_TEACHERS, "retrofit": SMALL_SOURCE}
TAUGHT = {"r = 3: 0,0,0", "r = 2: 2,2,2", "pcformer: 2,2,2"}
FRONTS = {
    "claims": {f"{name}, seed {seed}" for name in TAUGHT | {"vanilla", "r = 0"} for seed in (0, 1)},
    "demo": {
        *("teacher", "pcformer", "vanilla, 2 layers", "vanilla, 8 layers", "r = 0", "0,0,0"),
        "3,3,3",
    },
    "depth": {"teacher", "vanilla, 2 layers", "vanilla, 8 layers", "r = 0", "0,0,0", "3,3,3"},
    "iterations": {"vanilla", "r = 0", "r = 1", "r = 2", "r = 3"},
    "methods": {"vanilla", "pcformer", "r = 0", "r = 1", "r = 3"},
    "paper-340m": {f"{name}, seed 0" for name in ("vanilla", "r = 0", "r = 3", "pcformer")},
    "paper-55m": {f"{name}, seed 0" for name in ("vanilla", "r = 0", "r = 2", "pcformer")},
    "retrofit": {
        *("source", "source_continued", "source_continued, equal tokens"),
        *("scratch", "scratch_with_source", "teacher", "0,0,0", "3,3,3"),
    },
    "toy": {"teacher", "vanilla", "r = 0", "0,0,0", "2,2,2"},
}
"""Expected rows on the front of each sweep, without schedules between both ends."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, ray_session) -> Workspace:
    """One workspace for all shipped sweeps, so that they share their models."""
    return open_workspace(tmp_path_factory.mktemp("shipped"))


def settings_of(name: str, *more: str) -> Settings:
    # Instead of the hub, help texts of Python; the demo's depth tasks are generated.
    source = read_settings(shipped_sweeps()[name]).data.source
    assignments = [*HERE, f"data.source={'python' if source == 'hub' else source}"]
    return read_settings(shipped_sweeps()[name], [*assignments, *OPTIONS.get(name, ()), *more])


def run(workspace: Workspace, name: str, *more: str) -> SweepResult:
    result = sweep(settings_of(name, *more), workspace=workspace)
    assert not result.failures
    return result


def test_every_shipped_sweep_is_run_here():
    assert {*FRONTS, "search"} == set(shipped_sweeps())


@pytest.mark.long
@pytest.mark.parametrize("name", FRONTS)
def test_a_shipped_sweep_ends_with_its_front(name, workspace):
    result = run(workspace, name)
    assert result.page.is_file()
    stored = json.loads((result.folder / "results.json").read_text())["results"]
    assert FRONTS[name] <= {result_row["label"] for result_row in stored}
    if name in SEVERAL_TEACHERS:
        assert {claim["verdict"] for claim in result.to_json()["claims"]} != {"not measured"}
    else:
        assert len(result.to_pandas()) == len(result.trials)


@pytest.mark.long
def test_a_search_continues_from_the_family(workspace):
    def plan(*more: str) -> str:
        settings = settings_of("search", *more)
        return "\n".join(plan_sweep(settings, workspace=workspace).notes)

    def trained() -> set[Path]:
        return set(workspace.trials.glob("*/done.json"))

    options = ("search.num_trials=2",)
    run(workspace, "toy")
    before = trained()
    assert "2 more of 27" in plan(*options)
    assert "24 more of 27" in plan("search.num_trials=99")
    run(workspace, "search", *options)
    after = trained()
    assert len(after - before) == 2, "the family was not trained again"
    again = run(workspace, "search", *options)
    assert again.name.startswith("search-")
    assert trained() == after
    backend = JournalFileBackend(str(workspace.sweeps / again.name / "optuna.journal"))
    study = optuna.load_study(study_name=None, storage=JournalStorage(backend))
    complete = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert len(complete) == sum(trial.role == "trial" for trial in again.trials)
