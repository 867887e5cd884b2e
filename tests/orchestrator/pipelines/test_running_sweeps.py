"""One process at a time runs a sweep, and nothing of it is planned twice."""

from __future__ import annotations

import os
import shutil
import socket
from functools import partial

import pytest
from fake_runs import end_trials, finished
from fake_tracking import untracked
from lm_eval_tasks import write_choices
from refusals import refused

from orchestrator.pipelines.context import Context
from orchestrator.pipelines.upkeep import list_workspace
from orchestrator.settings import resolve_settings
from orchestrator.sweeping import stages
from orchestrator.sweeping.stages import plan_sweep
from orchestrator.sweeping.sweep import run_sweep
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import Interrupted, UserError
from orchestrator.workspace.layout import Workspace


@pytest.fixture
def workspace(workspace, tiny_tokens, trained_run) -> Workspace:
    """A workspace with tokens and a teacher."""
    shutil.copytree(tiny_tokens, workspace.tokens / tiny_tokens.name)
    shutil.copytree(trained_run, workspace.runs / "teacher")
    return workspace


@pytest.mark.parametrize(
    ("name", "changes"), [(None, []), ("mine", []), ("mine", ["sweep.num_schedules=3"])]
)
def test_a_sweep_is_refused_while_it_runs_and_not_once_it_has_ended(workspace, name, changes):
    plan_of = partial(plan_sweep, workspace=workspace, teacher="teacher", name=name)
    plan = plan_of(resolve_settings({}))
    second_plan = plan_of(resolve_settings({}, changes))
    refusals: list[str] = []
    states: list[str] = []

    class Refused(Progress):
        def start(self, *_: object, **__: object) -> None:
            pytest.fail("it runs twice at the same time")

    class CallsAgain(Progress):
        def start(self, *_: object, **__: object) -> None:
            with pytest.raises(UserError) as caught:
                run_sweep(second_plan, Context(workspace, Refused()))
            refusals.append(str(caught.value))
            states.extend(e["state"] for e in list_workspace(workspace, "sweeps").entries["sweeps"])
            raise Interrupted("the first call has ended")

    for _ in range(2):
        with pytest.raises(Interrupted):
            run_sweep(plan, Context(workspace, CallsAgain()))
    assert states == ["running", "running"]
    assert len(refusals) == 2
    for refusal in refusals:
        assert f"process {os.getpid()} on {socket.gethostname()}" in refusal
    assert not workspace.sweeps.exists(), "nothing was written that a later call could continue"


@pytest.mark.slow
def test_what_is_planned_is_not_planned_again_when_it_runs(workspace, tmp_path, monkeypatch):
    tasks = write_choices(tmp_path / "tasks", "choices", ["a b", "c d"])
    evaluation = ["evaluation.suite=choices", f"evaluation.include_path={tasks}"]
    settings = resolve_settings({}, ["influence.num_tokens=64", *evaluation])
    plan_of = partial(plan_sweep, settings, workspace=workspace, teacher="teacher", name="s")
    context = untracked(workspace)
    end_trials(monkeypatch, finished)

    unmeasured = plan_of()
    assert not unmeasured.is_complete
    assert unmeasured.bound
    assert len(unmeasured.trials.trials) == 1, "the teacher alone"
    result = run_sweep(unmeasured, context)
    assert [trial.label for trial in result.trials] == ["teacher", "2,1", "1,1", "1,0", "0,0"]

    # Another sweep is refused under this name, as soon as its trials are known.
    folder = workspace.sweeps / "s"
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    fewer = settings.model_copy(
        update={"sweep": settings.sweep.model_copy(update={"num_schedules": 2})}
    )
    with refused(UserError, "--name s", "another name"):
        plan_sweep(fewer, workspace=workspace, teacher="teacher", name="s")
    unchecked = plan_sweep(fewer, workspace=workspace, teacher="teacher").changed(name="s")
    trials = unchecked.trials.model_copy(update={"name": "s"})
    with refused(UserError, "--name s", "another name"):
        run_sweep(unchecked.changed(planned_trials=trials), context)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before

    for trial in result.trials:
        trial.result_path.unlink()
    complete = plan_of()
    assert complete.is_complete
    monkeypatch.setattr(stages, "trials_of_teachers", pytest.fail)
    monkeypatch.setattr(stages, "plan_influence", pytest.fail)
    second_result = run_sweep(complete, context)
    assert [trial.key for trial in second_result.trials] == [trial.key for trial in result.trials]
