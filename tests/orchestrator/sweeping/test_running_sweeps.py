"""A sweep runs what is not finished, in an order that waits for weights and other processes, and
says what became of each trial."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from changed_trials import in_folder, stop_early, with_job
from fake_runs import end_trials, finished
from fake_tracking import FakeTracking

from iiet.cost import inference_cost
from orchestrator.cluster import tune
from orchestrator.evaluation import decode_timing
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.settings import resolve_settings
from orchestrator.sweeping.live import LiveSweep
from orchestrator.sweeping.run import STOPPED_TAG, SweepOutcome, SweepQueue, run_plan
from orchestrator.sweeping.trial import run_trial
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import Tracking
from orchestrator.workspace.errors import Interrupted, RunFailed
from orchestrator.workspace.journal import Journal, read_journal
from orchestrator.workspace.layout import RUN_LOCK_NAME, open_workspace
from orchestrator.workspace.locks import lock_file


class SweepTracking(FakeTracking):
    """Stands for MLflow, with what the sweep's own run shows."""

    @property
    def sweep(self) -> TrackedRun:
        [run] = [run for run in self.runs.values() if run.kind == "sweep"]
        return run

    @property
    def metrics(self) -> dict[str, float]:
        return {name: value for name, value, _ in self.sweep.points}

    @property
    def ended(self) -> dict[str, str]:
        trials = [run for run in self.runs.values() if run.parent]
        assert all(run.parent == self.sweep.key for run in trials)
        return {run.key: run.status for run in trials}


class Shown(Progress):
    """Remembers what was shown last."""

    def __init__(self) -> None:
        self.done, self.text, self.summary, self.notes = 0.0, "", "", list[str]()

    def advance(self, done: float, text: str = "", **_: Any) -> None:
        self.done, self.text = done, text

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self, summary: str) -> None:
        self.summary = summary


def queue_of(
    plan: SweepPlan, folder: Path, trials: list[Trial], progress: Progress | None = None
) -> SweepQueue:
    tracking = cast("Tracking", SweepTracking())
    found = {t.key: r for t in plan.trials if t not in trials and (r := t.result())}
    num_all = len(found) + len(trials)
    live = LiveSweep(plan, resolve_settings({}), tracking, folder, num_trials=num_all)
    return SweepQueue(trials, found, {}, live, progress or Progress(), num_all=num_all)


def test_what_was_stopped_is_told_and_trained_on_without_stopping(
    tiny_plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped, better = tiny_plan.trials[1], tiny_plan.trials[2]
    rated = with_job(stopped, {"learning_rate": 1.0})
    better = better.model_copy(update={"job": rated.job})
    trials = (tiny_plan.trials[0], stopped, better, *tiny_plan.trials[3:])
    plan = tiny_plan.model_copy(update={"kind": "iterations", "trials": trials})
    for trial in trials:
        if trial is not stopped:
            finished(trial)
    sweep = resolve_settings({}, ["sweep.asha=true"]).sweep
    stop = stop_early(stopped, better, sweep, 30)
    asked: list[str] = []

    def end(trial: Trial) -> str:
        asked.append(trial.key)
        return "no luck"

    end_trials(monkeypatch, end)
    tracking = SweepTracking()

    def outcome_of(*assignments: str) -> SweepOutcome:
        settings = resolve_settings({}, assignments)
        workspace = open_workspace(tmp_path)
        return run_plan(plan, settings, workspace, tracking=cast("Tracking", tracking))

    outcome = outcome_of("sweep.asha=true")
    assert asked == []
    assert outcome.stopped == {stopped.label: stop.text}
    assert outcome.failures == {}
    assert [result.key for result in outcome.results] == [t.key for t in trials if t != stopped]
    assert outcome.reused == {result.key for result in outcome.results}
    assert better.label in tracking.sweep.tags[STOPPED_TAG]
    assert tracking.metrics == {"sweep/trainings_saved": pytest.approx(0.25)}
    records, _ = read_journal(Path(str(tracking.sweep.journal)))
    assert len(records) == 2, "the front over time, from what was found finished"
    assert tracking.ended.pop(stopped.key) == "KILLED"
    assert set(tracking.ended.values()) == {"KILLED", "FINISHED"}

    outcome = outcome_of()
    assert (outcome.stopped, outcome.failures) == ({}, {stopped.label: "no luck"})
    assert asked == [stopped.key]
    assert tracking.ended[stopped.key] == "FAILED"


def test_what_a_stored_teacher_costs_is_counted_once(
    tiny_plan: SweepPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(trial: Trial) -> Trial:
        assert trial.job is None or trial.job.teacher_cache
        return finished(trial)

    end_trials(monkeypatch, end)
    tracking = SweepTracking()
    settings = resolve_settings({}, ["distillation.teacher_cache=true"])
    outcome = run_plan(
        tiny_plan, settings, open_workspace(tmp_path), tracking=cast("Tracking", tracking)
    )
    assert outcome.reused == frozenset()
    job = tiny_plan.trials[-1].job
    assert job
    num_tokens = job.recipe.num_steps * job.recipe.num_tokens_per_step
    forward = inference_cost(tiny_plan.trials[0].model).forward_flops_per_token
    assert tracking.metrics["sweep/teacher_tokens"] == num_tokens
    assert tracking.metrics["sweep/teacher_flops"] == num_tokens * forward


def test_progress_counts_ended_and_running_trials_and_what_is_saved(
    tiny_plan: SweepPlan, tmp_path: Path
) -> None:
    teacher, first, second, third, *_ = tiny_plan.trials
    finished(teacher)
    shown = Shown()
    queue = queue_of(tiny_plan, tmp_path / "s", [first, second, third], shown)
    assert queue.saved() == "1 of 4 trials are finished"
    taken = [queue.take() for _ in range(3)]
    assert {trial.key for trial in taken if trial} == {first.key, second.key, third.key}
    assert queue.take() is None
    for trial, step in ((first, 20), (second, 30)):
        journal = Journal(Path(trial.folder))
        journal.metrics(step, {"train/loss": 1.0})
        journal.close()
    queue.on_start(first.key)
    queue.watch()
    assert (shown.done, shown.text) == (1 + 0.9 * 20 / 40, first.label)
    assert queue.saved().startswith(f"1 of 4 trials are finished; trial {first.label}: ")
    queue.on_end(first.key, finished(first), "")
    queue.on_start(third.key)
    queue.watch()
    assert (shown.done, shown.text) == (2, "")
    (Path(third.folder) / "step_00000050").mkdir(parents=True)
    third_saved = f"trial {third.label}: saved at step 50"
    assert queue.saved() == f"2 of 4 trials are finished; {third_saved}", "it has begun"
    queue.on_end(third.key, None, "no luck")
    queue.watch()
    assert shown.done == 3
    assert shown.notes == [f"trial {third.label} failed: no luck"]
    assert queue.saved() == "2 of 4 trials are finished", "a failed one has no result"
    assert not queue.is_over
    queue.on_end(second.key, finished(second), "")
    assert queue.is_over
    assert queue.summary() == "4 trials, 1 of them found finished, 1 failed"


def test_what_travels_to_a_trial_is_small(tiny_plan: SweepPlan) -> None:
    sent = sum(len(trial.model_dump_json()) for trial in tiny_plan.trials)
    tokens = Path(tiny_plan.tokens_folder)
    assert sent < 4096 * len(tiny_plan.trials), "paths and settings; no weights, no tokens"
    assert sum(path.stat().st_size for path in tokens.rglob("*")) > sent


def without_tasks(monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
    """Make trials of this process and of Tune's measure nothing, which would take tasks.

    Args:
        fails: Whether an unfinished trial also fails.
    """
    run_trials = tune.run_trials

    def run(function: Any, *given: Any, **named: Any) -> None:
        def quick(trial: Trial, place: tune.TrialPlace) -> Trial | None:
            from orchestrator.sweeping import trial as module

            module.measure_trial = lambda one, _: one.with_numbers("quality", {"accuracy": 0.5})
            found: Trial | None = function(trial, place)
            if fails and not found:
                raise OSError("no room")
            return found

        run_trials(quick, *given, **named)

    monkeypatch.setattr(tune, "run_trials", run)
    monkeypatch.setattr("orchestrator.sweeping.trial.measure_trial", lambda one, _: one)
    monkeypatch.setattr(decode_timing, "SWEEP_PROMPT_TOKENS", 4)
    monkeypatch.setattr(decode_timing, "SWEEP_NEW_TOKENS", 2)


@pytest.mark.slow
def test_a_sweep_passes_over_what_another_is_at_and_comes_back_to_it(
    tiny_plan: SweepPlan, tmp_path: Path, ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tasks(monkeypatch)
    plan = tiny_plan.model_copy(update={"trials": tiny_plan.trials[:4]})
    left, made_elsewhere = plan.trials[2:]
    locks = {trial.key: ExitStack() for trial in (left, made_elsewhere)}
    for trial in (left, made_elsewhere):
        path = Path(trial.folder) / RUN_LOCK_NAME
        locks[trial.key].enter_context(lock_file(path))

    class Told(Shown):
        def note(self, text: str) -> None:
            super().note(text)
            assert [trial.result() is not None for trial in plan.trials] == [
                True,
                True,
                False,
                False,
            ]
            locks[left.key].close()  # Its process died.
            finished(made_elsewhere)
            locks[made_elsewhere.key].close()

        def finish(self, summary: str) -> None:
            if "trials" in summary:
                super().finish(summary)

    progress, tracking = Told(), SweepTracking()
    outcome = run_plan(
        plan, resolve_settings({}), open_workspace(tmp_path), progress=progress,
        tracking=cast("Tracking", tracking),
    )  # fmt: skip
    (waited,) = progress.notes
    assert waited.startswith("waiting for another process, which trains ")
    assert {left.label, made_elsewhere.label} <= {*waited.split(" trains ")[1].split("; ")}
    assert progress.summary == "4 trials, 1 made by another process meanwhile"
    assert outcome.reused == {made_elsewhere.key}
    assert outcome.failures == {}
    assert set(tracking.ended.values()) == {"FINISHED"}
    started = [
        [r.get("name") for r in read_journal(Path(t.folder))[0]].count("started")
        for t in plan.trials
    ]
    assert started == [0, 1, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupted_sweep_says_what_is_saved_and_a_trial_that_failed_meanwhile(
    fails: bool, tiny_plan: SweepPlan, tmp_path: Path, ray_session: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    without_tasks(monkeypatch, fails=fails)
    teacher, begun, *_ = tiny_plan.trials
    long = {"num_steps": 10**6, "checkpoint_every_steps": 10**6}
    begun = in_folder(with_job(begun, long), tmp_path / "trials" / "begun", key="begun")
    run_trial(teacher)
    plan = tiny_plan.model_copy(update={"trials": (teacher, begun)})

    class Pressing(Shown):
        def advance(self, done: float, text: str = "", **more: Any) -> None:
            super().advance(done, text, **more)
            if any(r["kind"] == "metrics" for r in read_journal(Path(begun.folder))[0]):
                os.kill(os.getpid(), signal.SIGINT)
                monkeypatch.setattr(self, "advance", lambda *_, **__: None)

    tracking = SweepTracking()
    with pytest.raises(RunFailed if fails else Interrupted) as caught:
        run_plan(
            plan, resolve_settings({}), open_workspace(tmp_path), progress=Pressing(),
            tracking=cast("Tracking", tracking),
        )  # fmt: skip
    text = str(caught.value)
    assert f"1 of 2 trials are finished; trial {begun.label}: saved at step " in text
    if fails:
        assert text.startswith(f"trial {begun.label} failed: OSError: no room; ")
    assert tracking.ended == {teacher.key: "FINISHED", "begun": "FAILED" if fails else "KILLED"}
    assert tracking.sweep.status == ("FAILED" if fails else "KILLED")
