"""One process at a time runs a sweep, and nothing of it is planned twice."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from fake_runs import end_trials, finished
from fake_tracking import untracked
from small_size import SMALL

from orchestrator.pipelines import sweep_stages, sweeps
from orchestrator.pipelines.context import Context
from orchestrator.pipelines.sweep_stages import plan_sweep
from orchestrator.settings import read_settings, resolve_settings
from orchestrator.workspace.errors import Interrupted, UserError
from orchestrator.workspace.layout import open_workspace


def test_the_same_sweep_is_refused_while_it_runs_and_not_once_it_has_ended(tmp_path, monkeypatch):
    plan = plan_sweep(read_settings("toy", SMALL, {}), workspace=tmp_path)
    context = Context(workspace=open_workspace(tmp_path))
    refusals: list[str] = []

    @contextmanager
    def call_again(*_: object) -> Iterator[None]:
        with pytest.raises(UserError) as caught:
            sweeps.run_sweep(plan, context)
        refusals.append(str(caught.value))
        raise Interrupted("the first call has ended")
        yield

    monkeypatch.setattr(sweeps, "joined_cluster", call_again)
    for _ in range(2):
        with pytest.raises(Interrupted):
            sweeps.run_sweep(plan, context)
    assert len(refusals) == 2
    for refusal in refusals:
        assert f"process {os.getpid()} on {socket.gethostname()}" in refusal


@pytest.mark.slow
def test_what_is_planned_is_not_planned_again_when_it_runs(
    tmp_path, trained_run, tiny_tokens, monkeypatch
):
    workspace = open_workspace(tmp_path)
    shutil.copytree(tiny_tokens, workspace.tokens / tiny_tokens.name)
    teacher = shutil.copytree(trained_run, workspace.runs / "teacher") / "step_00000002"
    settings = resolve_settings({}, ["influence.num_tokens=64", "evaluation.num_items=4"])
    plan_of = partial(plan_sweep, settings, workspace=workspace, teacher=teacher, name="s")
    context = untracked(workspace)
    end_trials(monkeypatch, finished)
    # The made-up text is too poor for held-out tasks.
    monkeypatch.setattr(sweeps.trial_plans, "load_tasks", lambda *_: {})

    unmeasured = plan_of()
    assert not unmeasured.is_complete
    assert unmeasured.bound
    assert len(unmeasured.trials.trials) == 1, "the teacher alone"
    result = sweeps.run_sweep(unmeasured, context)
    assert [trial.label for trial in result.trials] == ["teacher", "2,1", "1,1", "1,0", "0,0"]

    for trial in result.trials:
        trial.result_path.unlink()
    complete = plan_of()
    assert complete.is_complete
    monkeypatch.setattr(sweeps.trial_plans, "plan_students", pytest.fail)
    monkeypatch.setattr(sweep_stages, "plan_influence", pytest.fail)
    second_result = sweeps.run_sweep(complete, context)
    assert [trial.key for trial in second_result.trials] == [trial.key for trial in result.trials]
