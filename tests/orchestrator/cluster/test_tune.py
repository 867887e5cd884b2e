"""Trials under Ray Tune: side by side, tried again, reported, and none takes the others along."""

from __future__ import annotations

import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from changed_trials import in_folder, with_job
from commands import Started, wait_until
from lm_eval_tasks import write_choices
from pretended_cluster import environment_without_ray
from pretended_ray import idle_ray, train_here
from same_run import events

from orchestrator.cluster import tune as module
from orchestrator.cluster.placement import Placement
from orchestrator.cluster.ray import address_variables
from orchestrator.cluster.tune import (
    RESTART_PAUSES_SECONDS,
    TrialFunction,
    TuneProcess,
    run_queue,
)
from orchestrator.planning.machine import Node
from orchestrator.records.evaluation import Suite
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.settings import ClusterSettings, SweepSettings, resolve_settings
from orchestrator.sweeping.states import (
    RunningSweep,
    competing_trials,
    early_stops,
    trial_states,
)
from orchestrator.sweeping.trial import run_trial
from orchestrator.training.objective import VALIDATION_METRIC
from orchestrator.workspace.errors import Interrupted, RunFailed, UserError
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import find_checkpoints, step_of


class WatchedSweep(RunningSweep):
    """A sweep that remembers how many trials ran at the same time, and in which threads it was
    watched."""

    def __init__(self, plan: SweepTrials, *, watch: Callable[[], None] = lambda: None) -> None:
        super().__init__(plan, trial_states(plan, SweepSettings()))
        self.most_at_once = 0
        self.threads = set[int]()
        self._watch_too = watch

    def take(self) -> Trial | None:
        trial = super().take()
        self.most_at_once = max(self.most_at_once, self.num_taken)
        return trial

    def watch(self) -> None:
        self.threads.add(threading.get_ident())
        self._watch_too()

    @property
    def statuses(self) -> dict[str, str]:
        """Key of a trial -> how far it is."""
        return {key: state.status for key, state in self.states.items()}


def run_sweep(
    queue: WatchedSweep,
    function: TrialFunction,
    folder: Path,
    sweep: SweepSettings | None = None,
    **options: Any,
) -> None:
    """Run the trials of a sweep under Ray Tune."""
    cluster = options.pop("cluster", ClusterSettings())
    options |= {"num_trials": queue.num_ready, "watch": queue.watch}
    run_queue(function, queue, folder / "ray", sweep or SweepSettings(), cluster, **options)
    assert queue.is_over
    assert not (folder / "ray").exists(), "nothing of Tune's own stays"


def with_trials(plan: SweepTrials, *names: str) -> SweepTrials:
    """Return a plan of trials that differ in their names only."""
    student = plan.trials[1]
    trials = [student.model_copy(update={"key": name, "label": name}) for name in names]
    return plan.model_copy(update={"trials": tuple(trials)})


@pytest.mark.slow
def test_failures_are_tried_again_then_reported_while_the_rest_continues(
    ray_session, tiny_plan, tmp_path
):
    folder = str(tmp_path)

    def function(trial: Trial, process: TuneProcess) -> Trial | None:
        import torch

        name = trial.label
        earlier = len(list(Path(folder).glob(f"{name}.*")))
        (Path(folder) / f"{name}.{earlier}").write_text(str(os.getpid()))
        if name == "killed" and earlier == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "always":
            raise ValueError("bad luck")
        if name == "mistaken":
            raise UserError("type something else")
        if name == "stopped" and earlier == 0:
            return None  # By somebody else, so it waits again.
        assert process.device == "cpu"
        return trial.with_numbers("quality", {"threads": torch.get_num_threads()})

    names = ["always", "killed", "mistaken", "fine", "stopped"]
    queue = WatchedSweep(with_trials(tiny_plan, *names))
    run_sweep(queue, function, tmp_path, SweepSettings(max_failures_per_trial=1))
    assert queue.failures == {"always": "ValueError: bad luck", "mistaken": "type something else"}
    assert queue.results_by_key.keys() == {"killed", "fine", "stopped"}
    for result in queue.results_by_key.values():
        assert result.numbers == {"quality/threads": 1}, "two CPUs, two trials, a thread each"
    attempts = {name: len(list(tmp_path.glob(f"{name}.*"))) for name in names}
    assert attempts == dict(zip(names, (2, 2, 1, 1, 2), strict=True))
    processes = {path.read_text() for path in tmp_path.glob("*.[0-9]")}
    assert len(processes) < sum(attempts.values()), "processes serve again"
    assert queue.most_at_once == 2
    assert queue.threads == {threading.get_ident()}


@pytest.mark.slow
def test_a_stop_waits_for_running_trials_and_starts_no_other(ray_session, tiny_plan, tmp_path):
    folder = str(tmp_path)

    def function(trial: Trial, process: TuneProcess) -> Trial | None:
        from orchestrator.terminal.stop import stop_requested

        path = Path(folder) / f"trial.{trial.key}"
        path.touch()
        while not stop_requested():
            time.sleep(0.01)
        path.write_text("saved")
        if trial.key == "0":
            raise OSError("no room")
        return None

    pressed: list[bool] = []

    def press() -> None:
        if len(list(tmp_path.glob("trial.*"))) == 2 and not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    plan = with_trials(tiny_plan, *map(str, range(20)))
    queue = WatchedSweep(plan, watch=press)
    with pytest.raises(Interrupted, match="0 of 20 trials are finished"):
        run_sweep(queue, function, tmp_path)
    assert {path.read_text() for path in tmp_path.glob("trial.*")} == {"saved"}
    assert queue.failures == {"0": "OSError: no room"}
    assert queue.statuses["1"] == "interrupted"
    assert queue.num_of("to train") == 18


def run_with_two(plan: SweepTrials, folder: Path, **options: Any) -> WatchedSweep:
    """Train trials on two workers each, and return how they ended."""
    queue = WatchedSweep(plan)
    sweep = SweepSettings(workers_per_trial=2, trials_at_once=5)
    run_sweep(queue, run_trial, folder, sweep, **options)
    return queue


@pytest.mark.long
def test_a_trial_that_asha_ends_saves_its_state_frees_its_workers_and_can_go_on(
    tiny_plan, tiny_tokens, ray_session, tmp_path
):
    import ray

    tasks = write_choices(tmp_path / "tasks", "choices", ["a b"])
    suite = Suite(tokens_folder=str(tiny_tokens), tasks=("choices",), include_folder=str(tasks))
    student = tiny_plan.trials[1].model_copy(update={"suite": suite})
    good, bad = (
        in_folder(
            with_job(
                student,
                {"num_steps": 400, "learning_rate": rate, "validate_every_steps": 20},
            ),
            tmp_path / name, key=name, label=name,
        )
        for name, rate in (("good", 1e-2), ("bad", 1e-7))
    )  # fmt: skip
    plan = tiny_plan.model_copy(update={"kind": "iterations", "trials": (good, bad)})
    sweep = resolve_settings({}, ["sweep.asha=true"]).sweep
    competitors = competing_trials(plan, sweep)
    first_sweep = run_with_two(plan, tmp_path / "first", competitors=competitors)
    assert first_sweep.statuses == {"good": "finished", "bad": "stopped early"}
    stop = early_stops(plan, sweep)["bad"]
    assert (stop.step, stop.competitor) == (100, "good")
    [saved] = find_checkpoints(Path(bad.folder))
    assert stop.step <= step_of(saved) < 400
    num_cpus = ray.cluster_resources()["CPU"]
    wait_until(lambda: ray.available_resources().get("CPU") == num_cpus, ray.available_resources)

    # The shares of a model are those of the trial's workers, not of the cluster's.
    sharded = ClusterSettings(num_workers=4, parallel="fsdp", num_shards=4)
    second_sweep = run_with_two(plan, tmp_path / "second", cluster=sharded)
    assert second_sweep.results_by_key["bad"] == bad.result()
    [resumed] = events(bad.job, "resumed")
    assert (resumed["num_workers"], resumed["step"]) == (2, step_of(saved))
    assert (resumed["parallel"], resumed["num_shards"]) == ("fsdp", 2)


def test_what_an_earlier_try_has_reported_is_not_reported_again(tiny_plan, tmp_path, monkeypatch):
    trial = in_folder(tiny_plan.trials[1], tmp_path / "trial")

    def validate(step: int, loss: float) -> None:
        journal = Journal(trial.job.folder)
        journal.metrics(step, {VALIDATION_METRIC: loss})
        journal.close()

    validate(5, 2.0)
    idle_ray(monkeypatch, Node(2))
    train_here(monkeypatch, lambda _: validate(10, 1.5))
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(module.tune, "report", reports.append)
    placement = Placement(jobs_at_once=1, workers=2, cpus=1)
    TuneProcess(trial, placement, ClusterSettings()).train_on_workers(trial.job)
    assert reports == [{module.STEP: 10, module.LOSS: 1.5}]


NO_MEMORY = (
    "2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: "
    "127.0.0.1, ID: dc26) was 5.81GB used / 23.54GB limit (0.246860)\nOOM kill reason: ...\nTop 10 "
    "memory users: PID\tMEM(GB)\tCOMMAND\n999\t0.68\t/usr/bin/python --token SECRET\n17\t0.61\tgimp"
)


@pytest.mark.parametrize("num_shortages", [0, 3, 4])
def test_tune_starts_again_three_times_when_memory_ran_low(
    num_shortages, tiny_plan, tmp_path, monkeypatch
):
    starts: list[str] = []
    queue = WatchedSweep(with_trials(tiny_plan, "a", "b"))

    class Tuner:
        def __init__(self, *_: Any, run_config: Any, **__: Any) -> None:
            pass

        def fit(self) -> None:
            trial = queue.take()
            starts.append(trial.key)
            if len(starts) <= num_shortages:
                raise RuntimeError(f"Caught unexpected exception: {NO_MEMORY}")
            queue.on_end(trial.key, trial, "")
            while trial := queue.take():
                queue.on_end(trial.key, trial, "")

    monkeypatch.setattr(module.tune, "Tuner", Tuner)
    idle_ray(monkeypatch, Node(2))
    monkeypatch.setattr(module, "RESTART_PAUSES_SECONDS", (0.0,) * len(RESTART_PAUSES_SECONDS))
    facts = "5.81 of 23.54 GB were used; the largest processes were python (process 999) 0.68 GB, "
    if num_shortages > 3:
        with pytest.raises(RunFailed, match=re.escape(facts)):
            run_sweep(queue, lambda trial, _: trial, tmp_path)
        assert queue.failures == {}
        assert not queue.is_over
    else:
        run_sweep(queue, lambda trial, _: trial, tmp_path)
        assert queue.statuses == {"a": "finished", "b": "finished"}
    assert starts == ["a"] * len(starts)
    assert len(starts) == min(num_shortages + 1, 4)
    assert len(queue.notes) == min(num_shortages, 3)
    assert all(facts in note and "SECRET" not in note for note in queue.notes)


@pytest.mark.parametrize(("most", "num_cpus", "at_once"), [(2, 8, 2), (None, 3, 3), (5, 3, 3)])
def test_no_more_trials_run_at_once_than_the_settings_say_and_the_nodes_hold(
    most, num_cpus, at_once, tiny_plan, tmp_path, monkeypatch
):
    queue = WatchedSweep(with_trials(tiny_plan, *map(str, range(7))))

    class Tuner:
        """Asks for trials until it gets none, then ends the oldest."""

        def __init__(self, *_: Any, tune_config: Any, **__: Any) -> None:
            self.suggest = tune_config.search_alg.suggest

        def fit(self) -> None:
            while not queue.is_over:
                while isinstance(self.suggest(""), dict):
                    pass
                oldest = next(queue.with_status("taken")).trial
                queue.on_end(oldest.key, oldest, "")

    monkeypatch.setattr(module.tune, "Tuner", Tuner)
    idle_ray(monkeypatch, Node(num_cpus))
    sweep = SweepSettings(trials_at_once=most)
    run_sweep(queue, lambda trial, _: trial, tmp_path, sweep)
    assert len(queue.results_by_key) == 7
    assert queue.most_at_once == at_once


def test_what_a_trial_died_of_is_its_last_error_and_want_of_memory_is_no_failure(
    tiny_plan, tmp_path
):
    queue = WatchedSweep(with_trials(tiny_plan, "short", "raised", "lost", "silent"))
    while queue.take():
        pass
    placement = Placement(jobs_at_once=1, workers=1, cpus=1)
    suggester = module.Suggester(queue, placement, None)
    listener = module.Listener(queue, suggester)

    def tune_trial(key: str, *texts: str, pickled: Exception | None = None) -> SimpleNamespace:
        """Return a trial of Tune with the files that Tune writes for its errors."""
        written = tmp_path / f"{key}.txt"
        pickles = tmp_path / f"{key}.pkl"
        written.write_text("".join(f"Failure # 1 (occurred at noon)\n{text}\n" for text in texts))
        if pickled:
            pickles.write_bytes(pickle.dumps(pickled))
        return SimpleNamespace(
            config={"key": key}, error_file=str(written), pickled_error_file=str(pickles)
        )

    error = ValueError("bad luck")
    listener.on_trial_error(trial=tune_trial("raised", "lost", "bad luck", pickled=error))
    listener.on_trial_error(trial=tune_trial("lost", "bad luck", "the node died", pickled=error))
    listener.on_trial_error(trial=tune_trial("silent"))
    reasons = queue.failures
    assert reasons.pop("silent")
    assert reasons == {"raised": "ValueError: bad luck", "lost": "the node died"}
    assert not suggester.is_short_of_memory

    listener.on_trial_recover(trial=tune_trial("short", NO_MEMORY))
    assert suggester.is_short_of_memory, "no other trial starts until the running ones have ended"
    assert listener.shortage == NO_MEMORY
    listener.on_trial_error(trial=tune_trial("short", NO_MEMORY, "bad luck", pickled=error))
    assert queue.statuses["short"] == "taken", "it starts again with the next Tune"


SHORT_OF_MEMORY = """
import sys
from pathlib import Path
from orchestrator.cluster import tune
from orchestrator.records.trial import SweepTrials
from orchestrator.settings import ClusterSettings, SweepSettings
from orchestrator.sweeping.states import RunningSweep, trial_states
from orchestrator.workspace.errors import RunFailed

def run(trial, process):
    import time
    time.sleep(1000)

plan = SweepTrials.model_validate_json(sys.argv[1])
sweep = SweepSettings(max_failures_per_trial=0)
queue = RunningSweep(plan, trial_states(plan, sweep))
tune.RESTART_PAUSES_SECONDS = (0.0,)
try:
    tune.run_queue(run, queue, Path(sys.argv[2]), sweep, ClusterSettings(), num_trials=1)
except RunFailed as error:
    for note in queue.notes:
        print("again", note)
    print("failed", error)
assert not queue.failures, queue.failures
"""


@pytest.mark.slow
def test_ray_ends_trials_when_memory_runs_low_and_says_who_has_it(tiny_plan, tmp_path):
    local = {name: value for name, value in address_variables("local").items() if value}
    variables = environment_without_ray() | local | {"RAY_memory_usage_threshold": "0.001"}
    process = Started(
        with_trials(tiny_plan, "any").model_dump_json(), str(tmp_path / "ray"),
        code=SHORT_OF_MEMORY, environment=variables,
    )  # fmt: skip
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    outcome_lines = [line for line in printed.splitlines() if line.startswith(("again", "failed"))]
    assert [line.split()[0] for line in outcome_lines] == ["again", "failed"], printed
    for line in outcome_lines:
        assert re.search(r"[\d.]+ of [\d.]+ GB were used; .* \(process \d+\) [\d.]+ GB", line)
