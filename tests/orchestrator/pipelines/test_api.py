"""The Python API: lazy names, and a small project from pretraining to a picked model."""

from __future__ import annotations

import ast
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from fake_runs import end_trials, trained
from small_size import SMALL

import orchestrator


def test_every_name_exists_and_editors_see_the_same_names():
    assert set(orchestrator.__all__) <= set(dir(orchestrator))
    with pytest.raises(AttributeError, match="no attribute 'swep'"):
        _ = orchestrator.swep
    tree = ast.parse(Path(str(orchestrator.__file__)).read_text(encoding="utf-8"))
    typed = {
        (node.module, alias.name)
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for _, name in typed} == set(orchestrator.__all__)
    for module, name in typed:
        assert getattr(import_module(str(module)), name) is getattr(orchestrator, name)


@pytest.fixture(scope="module")
def settings() -> orchestrator.Settings:
    # The models are those of the workspace, the students are not.
    changes = ["distillation.training.num_steps=4", "sweep.num_schedules=2"]
    changes += ["data.passage_characters=4000"]  # As the shipped toy has it.
    return orchestrator.read_settings(None, [*SMALL, *changes])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, small_sweep) -> orchestrator.Workspace:
    """A workspace whose models were trained by a command, and are found again."""
    folder = tmp_path_factory.mktemp("api") / "workspace"
    return orchestrator.Workspace(shutil.copytree(small_sweep, folder))


@pytest.mark.slow
def test_a_project_runs_from_pretraining_to_a_picked_model(settings, workspace, monkeypatch):
    end_trials(monkeypatch, trained)
    plan = orchestrator.plan_pretrain(settings, workspace=workspace, name="another")
    assert plan.price.num_tokens == sum(e.num_tokens for e in plan.trainings_left) > 0
    assert orchestrator.plan_pretrain(settings, workspace=workspace).price.num_tokens == 0
    pretrained = orchestrator.pretrain(settings, workspace=workspace)
    full = pretrained.checkpoint.parent.name
    steps = pretrained.to_pandas()
    assert steps["step"].iloc[-1] == settings.training.num_steps
    assert steps["train/loss"].notna().any()

    influence = orchestrator.measure_influence(settings, workspace=str(workspace.root))
    assert influence.checkpoint == pretrained.checkpoint
    assert set(influence.to_pandas().columns) >= {"layer", "correction", "influence"}

    baselines = [run.name for run in workspace.runs.iterdir() if run.name not in (full, "another")]
    with_baselines = settings.sweep.model_copy(update={"baseline_runs": tuple(baselines)})
    settings = settings.model_copy(update={"sweep": with_baselines})
    dry_run = orchestrator.plan_sweep(settings, workspace=workspace, teacher=full, name="mine")
    assert "to train" in set(dry_run.to_pandas()["state"])
    result = orchestrator.sweep(settings, workspace=workspace, teacher=full, name="mine")
    assert result.failures == {}
    trials = result.to_pandas()
    roles = trials["role"].value_counts().to_dict()
    assert roles == {"teacher": 1, "trial": 2, "baseline": 2}
    assert trials["cost/evaluations"].notna().all()
    assert trials["quality/accuracy"].notna().all()
    assert len(trials) == len(result.trials)

    evaluated = orchestrator.evaluate(
        settings, workspace=workspace, models=[full], schedules=["1", "0"]
    )
    table = evaluated.to_pandas()
    assert set(table["model"]) == {"r=1", "r=0"}
    assert {"task", "metric", "value", "stderr"} <= set(table.columns)

    report = orchestrator.report(workspace=workspace, sweeps=["mine"])
    assert report.page is not None
    assert report.page.is_file()
    assert report.to_pandas().equals(trials)
    # A notebook shows the picture and the table, and a line where it shows no HTML.
    shown = report._repr_html_()
    assert all(part in shown for part in ("<svg", "NFE", report.title))
    assert repr(report).startswith("ReportResult(title=")
    assert len(repr(report)) < 400

    picked = orchestrator.plan_pick("mine", workspace=workspace, best=True)
    assert picked.sentence
    assert picked.to_pandas()["method"].tolist() == ["iiet"]
    [text] = orchestrator.generate(["The"], workspace=workspace, model=full, max_new_tokens=4)
    assert isinstance(text, str)
