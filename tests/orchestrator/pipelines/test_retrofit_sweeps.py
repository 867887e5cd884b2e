"""A sweep whose teacher starts from a plain model: its stages, its plan, a stop in each of them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from fake_runs import end_trials, finished
from fake_tracking import untracked
from pretended_ray import train_here
from same_run import stop_at

from orchestrator.pipelines.upkeep import list_workspace
from orchestrator.records.training import TrainingJob
from orchestrator.records.training_state import DIVERGED_EVENT
from orchestrator.records.trial import SOURCE, SOURCE_CONTINUED
from orchestrator.reporting.results import CONTROLS_TITLE
from orchestrator.settings import SETTINGS_NAME, read_settings, resolve_settings
from orchestrator.sweeping.retrofit import EQUAL_TOKENS, training_flops
from orchestrator.sweeping.stages import plan_sweep
from orchestrator.sweeping.sweep import SweepResult, run_sweep
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import Interrupted, RunFailed
from orchestrator.workspace.journal import record_event
from orchestrator.workspace.layout import Workspace, open_workspace

RECIPE = {"num_steps": 3, "num_tokens_per_step": 64, "warmup_steps": 1, "num_validation_tokens": 64}
TREE = {
    "data": {"source": "depth", "depth": {"tasks": ["phop_2"], "length": 16}},
    "model": {"num_layers": 2, "dim": 16, "num_heads": 2, "ffn_dim": 32, "corrections": 1},
    "source_training": {**RECIPE, "num_steps": 4},
    "training": RECIPE,
    "distillation": {"training": RECIPE},
    "influence": {"num_tokens": 64},
    "evaluation": {"num_items": 4},
    "sweep": {"num_schedules": 2},
}


class Machine:
    """Runs trainings in this process, and can be stopped in one."""

    def __init__(self) -> None:
        self.trained: list[TrainingJob] = []
        """Trainings in the order in which they ended; none is made twice."""
        self.fails_at_rate: float | None = None
        """Peak learning rate of trainings that fail."""
        self.diverging_rates: tuple[float, ...] = ()
        """Peak learning rates of trainings that diverge."""
        self.diverged: list[TrainingJob] = []
        self.finishes = 1000
        """After so many more trainings, the next one is stopped at its second step."""

    def train(self, job: TrainingJob) -> None:
        if not self.finishes:
            assert not run_job(job, should_stop=stop_at(1)).finished
            raise Interrupted("stopped")
        if job.recipe.learning_rate == self.fails_at_rate:
            raise RunFailed("the worker is lost")
        if (
            job.model.method == "vanilla"
            and job.initial_folder
            and job.recipe.learning_rate in self.diverging_rates
        ):
            self.diverged.append(job)
            run_job(job, should_stop=stop_at(1))
            record_event(job.folder, DIVERGED_EVENT, step=1, text="the loss is not finite")
            raise RunFailed("the loss is not finite")
        self.finishes -= 1
        self.trained.append(job)
        assert run_job(job).finished


@pytest.fixture
def machine(monkeypatch) -> Machine:
    machine = Machine()
    train_here(monkeypatch, lambda job: machine.train(job))
    end_trials(monkeypatch, finished)
    return machine


def run(workspace: Workspace, *assignments: str, teacher: Path | None = None) -> SweepResult:
    settings = resolve_settings(TREE, assignments)
    plan = plan_sweep(settings, workspace=workspace, teacher=teacher)
    return run_sweep(plan, untracked(workspace))


def checkpoints_of(result: SweepResult) -> dict[str, Path]:
    return {trial.label: Path(str(trial.checkpoint)) for trial in result.trials}


@pytest.mark.slow
def test_source_teacher_and_controls_are_trained_one_after_another(machine, workspace):
    planned = plan_sweep(resolve_settings(TREE), workspace=workspace)
    assert not workspace.runs.exists(), "a plan writes nothing"
    plan_json = json.loads(planned.to_text())
    assert plan_json["source_controls"][SOURCE]["flops"] == 0, "it is measured alone"
    assert plan_json["source_controls"][SOURCE_CONTINUED]["num_trainings"] == 3

    result = run(workspace)
    roles = {trial.label: trial.role for trial in result.trials}
    assert roles == {
        "teacher": "teacher", "1,1": "trial", "0,0": "trial", SOURCE: SOURCE,
        SOURCE_CONTINUED: SOURCE_CONTINUED, EQUAL_TOKENS: "baseline",
    }  # fmt: skip
    source, teacher, *candidates, continued = machine.trained
    assert [job.model.method for job in machine.trained] == ["vanilla", "iiet", *["vanilla"] * 3]
    checkpoints = checkpoints_of(result)
    assert checkpoints[SOURCE].parent == source.folder
    for job in (teacher, *candidates, continued):
        assert job.initial_folder == str(checkpoints[SOURCE])
    assert training_flops(continued) >= training_flops(teacher) > training_flops(candidates[0])
    flops = sum(map(training_flops, machine.trained))
    assert sum(e.total_flops for e in planned.pretraining_left) == pytest.approx(flops)
    assert plan_json["source_controls"][SOURCE_CONTINUED]["flops"] == pytest.approx(
        sum(map(training_flops, (*candidates, continued)))
    )
    assert result.page is not None
    assert "The teacher against source_continued:" in result.page.read_text("utf-8")
    stored = read_settings(teacher.folder / SETTINGS_NAME)
    assert (stored.training.source, stored.source_training) == (str(checkpoints[SOURCE]), None)

    # The same controls belong to the trained teacher.
    of_trained_teacher = run(
        workspace, "source_training=null", "sweep.num_schedules=3", teacher=checkpoints["teacher"]
    )
    assert len(machine.trained) == 5
    assert {SOURCE, SOURCE_CONTINUED, EQUAL_TOKENS} <= checkpoints_of(of_trained_teacher).keys()


@pytest.mark.slow
def test_a_sweep_that_is_stopped_in_each_training_loses_nothing(machine, workspace, tmp_path):
    expected = run(open_workspace(tmp_path / "undisturbed"))
    machine.trained.clear()
    machine.finishes = 0
    for _ in range(5):
        with pytest.raises(Interrupted):
            run(workspace)
        machine.finishes = 1
    result = run(workspace)
    # Keys hold the hashes of the weights.
    assert [trial.key for trial in result.trials] == [trial.key for trial in expected.trials]
    assert len(machine.trained) == len({job.run_folder for job in machine.trained}) == 5


@pytest.mark.slow
def test_a_list_says_how_a_sweep_goes_on_that_was_stopped_in_its_first_stage(machine, workspace):
    def listed() -> list[dict[str, Any]]:
        return list_workspace(workspace, "sweeps").entries["sweeps"]

    states = []

    def stop(_: TrainingJob) -> None:
        states.extend(entry["state"] for entry in listed())
        raise Interrupted("stopped")

    train = machine.train
    machine.train = stop
    with pytest.raises(Interrupted):
        run(workspace)
    assert states == ["running"]
    [entry] = listed()
    assert entry["state"] == "interrupted"
    program, command, file, *options = shlex.split(entry["command"])
    assert (program, command) == ("iiet-orch", "sweep")
    assert options == ["--workspace", str(workspace.root)]

    machine.train = train
    plan = plan_sweep(read_settings(Path(file)), workspace=workspace)
    result = run_sweep(plan, untracked(workspace))
    assert [(entry["name"], entry["state"]) for entry in listed()] == [(result.name, "finished")]


@pytest.mark.slow
def test_a_control_that_fails_or_is_not_wanted_is_missing_on_the_page(machine, workspace):
    machine.fails_at_rate = 4e-3  # Twice the teacher's.
    result = run(workspace)
    with pytest.raises(RunFailed, match=SOURCE_CONTINUED):
        result.raise_failures()
    assert {"teacher", "0,0", SOURCE} <= checkpoints_of(result).keys()
    assert SOURCE_CONTINUED not in checkpoints_of(result)
    assert result.page is not None
    assert "source_continued: missing" in result.page.read_text("utf-8")
    machine.fails_at_rate = None
    assert SOURCE_CONTINUED in checkpoints_of(run(workspace)), "the same call tries it again"

    result = run(workspace, "sweep.source_controls=[source]", "sweep.num_schedules=3")
    assert SOURCE_CONTINUED not in checkpoints_of(result)
    assert result.page is not None
    assert "source_continued: missing" in result.page.read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("rates", [(4e-3,), (2e-3, 4e-3)])
def test_a_candidate_that_diverges_is_out_and_no_failure(machine, workspace, rates):
    machine.diverging_rates = rates
    for _ in range(2):  # The same call tries it no more.
        result = run(workspace)
        result.raise_failures()
        assert [job.recipe.learning_rate for job in machine.diverged] == [*rates]
        is_continued = len(rates) == 1  # The teacher's rate is left.
        assert (SOURCE_CONTINUED in checkpoints_of(result)) == is_continued
        assert (EQUAL_TOKENS in checkpoints_of(result)) == is_continued
    if is_continued:
        assert machine.trained[-1].recipe.learning_rate == 2e-3
        assert "diverged at 0.004" in result.sweeps[0].facts[CONTROLS_TITLE][SOURCE_CONTINUED]
    else:
        assert "diverges" in result.sweeps[0].facts[CONTROLS_TITLE][SOURCE_CONTINUED]
