"""A plain model gets a front: one command leaves out layers, distills, measures, and picks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_runs import end_trials, finished, trained
from fake_tracking import untracked
from pretended_ray import train_here
from refusals import refused
from transformers import AutoModelForCausalLM

from orchestrator.models.load import load_model
from orchestrator.models.open import open_model
from orchestrator.pipelines.models import plan_pick, run_pick
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.retrofit import training_flops
from orchestrator.sweeping.stages import plan_sweep
from orchestrator.sweeping.students import TEACHER_CONTINUED
from orchestrator.sweeping.sweep import SweepResult, run_sweep
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import Interrupted, UserError
from orchestrator.workspace.layout import Workspace

RECIPE = {"num_steps": 3, "num_tokens_per_step": 64, "warmup_steps": 1, "num_validation_tokens": 64}
SIZES = {"num_layers": 6, "dim": 16, "num_heads": 2, "ffn_dim": 32}
TREE: dict[str, Any] = {
    "data": {"source": "depth", "depth": {"tasks": ["phop_2"], "length": 16}},
    "model": {"method": "vanilla", **SIZES},
    "training": RECIPE,
    "distillation": {"training": RECIPE},
    "influence": {"num_tokens": 64},
    "evaluation": {"num_items": 40},
    "sweep": {"num_schedules": 3},
}


def run(workspace: Workspace, *assignments: str, teacher: Path | None = None) -> SweepResult:
    settings = resolve_settings(TREE, assignments)
    plan = plan_sweep(settings, workspace=workspace, teacher=teacher)
    return run_sweep(plan, untracked(workspace))


@pytest.fixture
def trainings(monkeypatch) -> list[TrainingJob]:
    """Trainings before the trials, in the order in which they ended."""
    jobs: list[TrainingJob] = []

    def train(job: TrainingJob) -> None:
        jobs.append(job)
        assert run_job(job).finished

    train_here(monkeypatch, train)
    return jobs


@pytest.mark.slow
def test_a_plain_teacher_has_a_front_and_a_picked_student_is_a_plain_model(
    trainings, workspace, monkeypatch, tmp_path
):
    end_trials(monkeypatch, trained)
    bounds = "evaluation.retention={phop_2: 90}"
    result = run(workspace, bounds)
    teacher, *students, continued = result.trials
    assert (teacher.role, teacher.label) == ("teacher", "teacher")
    assert [trial.role for trial in students] == ["trial"] * 3
    assert [trial.model.num_layers for trial in students] == [5, 4, 3]
    assert (continued.role, continued.label) == ("baseline", TEACHER_CONTINUED)
    assert len(trainings) == 1, "nothing but the teacher is trained before the trials"

    # The control has the FLOPs of the costliest student, and all of the teacher's layers.
    most = max(training_flops(trial.job) for trial in students)
    assert continued.model.num_layers == 6
    assert most <= training_flops(continued.job) < most * (1 + 1 / continued.job.recipe.num_steps)
    assert continued.job.initial_folder == students[0].job.initial_folder

    # Students begin as the teacher without the layers that they leave out.
    smallest = students[-1]
    schedule = str(smallest.teacher_schedule)
    assert smallest.job.kept_layers == tuple(
        layer for layer, part in enumerate(_parts(schedule)) if part != "x"
    )

    # Again, nothing is trained or measured.
    end_trials(monkeypatch, lambda trial: pytest.fail(f"{trial.label} runs again"))
    assert [t.key for t in run(workspace, bounds).trials] == [t.key for t in result.trials]

    picked = plan_pick(workspace=workspace, cheapest=True, to=tmp_path / "picked")
    folder = run_pick(picked, untracked_with_registry(workspace)).folder
    assert folder is not None
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert plain.config.num_hidden_layers == 3
    tokens = torch.arange(12).view(1, 12) % 5
    with torch.no_grad():
        ours = load_model(Path(str(smallest.checkpoint)))(tokens)
        torch.testing.assert_close(plain(tokens).logits, ours, rtol=0, atol=1e-5)


def _parts(schedule: str) -> list[str]:
    """Write out `0,x*2` as its layers."""
    parts = []
    for part in schedule.split(","):
        sign, _, times = part.partition("*")
        parts += [sign] * int(times or 1)
    return parts


def untracked_with_registry(workspace: Workspace) -> Any:
    """Return a context that registers no model."""
    context = untracked(workspace)
    context.tracking.register = lambda model: False
    return context


@pytest.mark.slow
def test_a_teacher_with_corrections_may_lose_layers_and_corrections(
    trainings, workspace, monkeypatch
):
    """Reallocation: a student may leave a layer out and correct another one."""
    end_trials(monkeypatch, finished)
    result = run(
        workspace,
        "model.method=iiet",
        "model.corrections=1",
        "sweep.leave_out_layers=2",
        "sweep.schedules=['x,x,1,0,1,0']",
        "sweep.num_schedules=9",
    )
    students = {trial.schedule_text: trial for trial in result.trials if trial.role == "trial"}
    own = students["x,x,1,0,1,0"]
    assert own.model.num_layers == 4
    assert tuple(own.model.corrections) == (1, 0, 1, 0)
    assert own.model.corrections.num_evaluations == 6, "as many as the source has"
    assert min(trial.model.num_layers for trial in students.values()) == 4
    assert students["1,1,1,1,1,1"].model.num_layers == 6


@pytest.mark.slow
def test_pruned_students_are_measured_in_the_teachers_checkpoint(trainings, workspace, monkeypatch):
    end_trials(monkeypatch, trained)
    result = run(workspace, "distillation.control=pruned", "sweep.num_schedules=2")
    pruned = [trial for trial in result.trials if trial.role == "trial"]
    assert [trial.model.num_layers for trial in pruned] == [5, 3]
    assert all(trial.job is None for trial in pruned)
    assert len({trial.key for trial in pruned}) == 2
    opened = open_model(pruned[1].folder, workspace)
    assert opened.decoder().config.num_layers == 3
    assert opened.label.endswith(f"r={pruned[1].teacher_schedule}")
    assert TEACHER_CONTINUED not in {trial.label for trial in result.trials}, "nothing is trained"


@pytest.mark.slow
def test_a_plain_sweep_that_is_stopped_trains_nothing_twice(trainings, workspace, monkeypatch):
    ended: list[str] = []
    is_stopped = False

    def end(trial: Trial) -> Trial:
        nonlocal is_stopped
        if len(ended) == 2 and not is_stopped:
            is_stopped = True
            raise Interrupted("stopped")
        ended.append(trial.key)
        return finished(trial)

    end_trials(monkeypatch, end)
    with pytest.raises(Interrupted):
        run(workspace)
    result = run(workspace)
    assert is_stopped
    assert len(trainings) == 1
    assert len(ended) == len(set(ended))
    assert set(ended) == {trial.key for trial in result.trials}
    assert [trial.role for trial in result.trials] == ["teacher", *["trial"] * 3, "baseline"]


@pytest.mark.parametrize(
    ("assignments", "names"),
    [
        (["sweep.leave_out_layers=6"], ["sweep.leave_out_layers=6"]),
        (["sweep.leave_out_layers=none"], ["sweep.leave_out_layers=none"]),
        (["sweep.elastic=true"], ["sweep.elastic", "sweep.leave_out_layers"]),
        (["sweep.budgets=[2]"], ["sweep.budgets", "3"]),
        (["sweep.schedules=['0,x,0']"], ["sweep.schedules", "0,x,0", "6"]),
        (["sweep.schedules=['x*6']"], ["sweep.schedules", "at least one layer"]),
        (["sweep.schedules=['1,x,0,0,0,0', uniform]"], ["sweep.schedules", "1,x,0,0,0,0"]),
    ],
)
def test_what_leaves_no_front_is_refused_by_the_name_of_the_setting(assignments, names, workspace):
    with refused(UserError, *names):
        plan_sweep(resolve_settings(TREE, assignments), workspace=workspace)
    assert not workspace.runs.exists()
