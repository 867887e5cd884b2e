"""A cheap training of what a method adds proposes a schedule for the training that counts."""

from __future__ import annotations

import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from commands import run_here
from fake_runs import end_trials, trained
from fake_tracking import untracked
from sample_trials import sample_trial

from orchestrator.cli import main
from orchestrator.models.folder import load_config
from orchestrator.pipelines.influence import measure_influence
from orchestrator.pipelines.sweep_stages import plan_sweep
from orchestrator.pipelines.sweeps import run_sweep
from orchestrator.pipelines.training import plan_pretrain, run_pretrain, schedule_of_trial
from orchestrator.reporting.results import StoredSweep
from orchestrator.settings import Settings, resolve_settings
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
    assert planned["schedule"] == [1, 0]


@pytest.mark.slow
def test_a_cheap_training_of_what_is_added_proposes_the_schedule_of_a_retrofit(
    tmp_path, monkeypatch
):
    """The steps: a plain model; a training of its added weights alone; a sweep of their schedules;
    then the same plain model is trained under the schedule of a trial."""
    context = untracked(open_workspace(tmp_path))
    space = context.workspace
    end_trials(monkeypatch, trained)

    def settings(*assignments: str) -> Settings:
        tree = {
            "data": {"source": "depth", "depth": {"tasks": ["phop_2"], "length": 16}},
            "model": {"method_options": {"start": "identity"}, "corrections": 2},
            "training": {
                "num_steps": 4, "num_tokens_per_step": 256, "num_validation_tokens": 256,
                "warmup_steps": 1, "learning_rate": 0.01, "gate_rate_factor": 30,
            },
            "influence": {"num_tokens": 512},
            "evaluation": {"num_items": 20},
            "sweep": {"num_schedules": 3},
            "distillation": {"control": "pruned"},
        }  # fmt: skip
        return resolve_settings(tree, assignments)

    def trained_as(name: str, *assignments: str, source: str | None = None) -> Path:
        chosen = settings(*assignments)
        plan = plan_pretrain(chosen, workspace=space, source=source, name=name, local=True)
        return run_pretrain(plan, context).checkpoint

    sizes = {"num_layers": 3, "dim": 16, "num_heads": 2, "ffn_dim": 32, "method": "vanilla"}
    plain = (f"model.{name}={value}" for name, value in sizes.items())
    trained_as("plain", *plain, "model.method_options=null", "model.corrections=0")
    trained_as("probe", "training.trained_layers=added", source="plain")
    influence = measure_influence(settings(), workspace=space, model="probe")
    assert influence.schedules[0] == "2,2,2"
    assert influence.schedules[-1] == "0,0,0"

    sweep = plan_sweep(settings(), workspace=space, teacher="probe", name="where")
    result = run_sweep(sweep, context)
    proposed = [trial for trial in result.trials if trial.role == "trial"]
    assert len(proposed) == 3

    schedule = schedule_of_trial(f"where:{proposed[1].label}", workspace=space)
    assert 0 < schedule.num_corrections < 6
    retrofit = trained_as("retrofit", f"model.corrections={schedule}", source="plain")
    assert load_config(retrofit).corrections == schedule
