"""Trials under Ray Tune: side by side, tried again, reported, and none takes the others along."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from orchestrator.settings import SweepSettings
from orchestrator.workspace.errors import UserError

pytestmark = pytest.mark.slow


def attempts(folder: str, name: str) -> int:
    return len(list(Path(folder).glob(f"{name}.*")))


def test_more_trials_than_cpus_all_end(ray_session: None, tmp_path: Path) -> None:
    from orchestrator.cluster.ray_tune import TrialContext, TrialHooks, run_trials
    from orchestrator.cluster.tune_callback import TrialReport

    def trial(parameters: dict[str, Any], context: TrialContext) -> dict[str, Any]:
        import torch

        return {
            "square": parameters["x"] ** 2,
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "device": context.device,
        }

    heard: list[TrialReport] = []
    threads: set[int] = set()

    def on_result(report: TrialReport) -> None:
        heard.append(report)
        threads.add(threading.get_ident())

    trials = {str(x): {"x": x} for x in range(5)}
    reports = run_trials(trial, trials, tmp_path / "ray", hooks=TrialHooks(on_result=on_result))
    results = [reports[key].result or {} for key in trials]
    assert [result["square"] for result in results] == [0, 1, 4, 9, 16]
    assert {result["threads"] for result in results} == {1}, "two CPUs, two trials, a thread each"
    assert {result["device"] for result in results} == {"cpu"}
    assert len({result["pid"] for result in results}) <= 2, "processes serve again"
    assert {report.key: report for report in heard} == reports
    assert threads == {threading.get_ident()}
    assert not (tmp_path / "ray").exists()


def test_failures_are_tried_again_then_reported_while_the_rest_goes_on(
    ray_session: None, tmp_path: Path
) -> None:
    from orchestrator.cluster.ray_tune import TrialContext, run_trials

    folder = str(tmp_path)

    def trial(parameters: dict[str, Any], context: TrialContext) -> dict[str, Any]:
        name = parameters["name"]
        earlier = len(list(Path(folder).glob(f"{name}.*")))
        (Path(folder) / f"{name}.{earlier}").touch()
        if name == "once" and earlier == 0:
            raise RuntimeError("a hiccup")
        if name == "killed" and earlier == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "always":
            raise ValueError("bad luck")
        if name == "mistaken":
            raise UserError("type something else")
        return {"name": name}

    names = ["always", "once", "killed", "mistaken", "fine", "also fine"]
    reports = run_trials(
        trial,
        {name: {"name": name} for name in names},
        tmp_path / "ray",
        SweepSettings(max_failures_per_trial=2),
    )
    for name in ("once", "killed", "fine", "also fine"):
        assert reports[name].result == {"name": name}
        assert reports[name].error is None
    assert reports["always"].result is None
    assert reports["always"].error == "ValueError: bad luck"
    assert reports["mistaken"].error == "type something else"
    assert attempts(folder, "always") == 3
    assert attempts(folder, "once") == attempts(folder, "killed") == 2
    assert attempts(folder, "mistaken") == attempts(folder, "fine") == 1


def test_a_stop_waits_for_running_trials_and_starts_no_other(
    ray_session: None, tmp_path: Path
) -> None:
    from orchestrator.cluster.ray_tune import TrialContext, TrialHooks, run_trials
    from orchestrator.cluster.tune_callback import TrialReport

    from orchestrator.workspace.errors import Interrupted

    folder = str(tmp_path)

    def trial(parameters: dict[str, Any], context: TrialContext) -> dict[str, Any]:
        import time

        from orchestrator.terminal.stop import stop_requested

        path = Path(folder) / f"trial.{parameters['x']}"
        path.touch()
        while not stop_requested():
            time.sleep(0.01)
        path.write_text("saved")
        if parameters["x"] == 0:
            raise OSError("no room")
        if parameters["x"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    pressed: list[bool] = []

    def watch(_: Any) -> None:
        if attempts(folder, "trial") == 2 and not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    heard: list[TrialReport] = []
    with pytest.raises(Interrupted, match="interrupted; 18 are left"):
        run_trials(
            trial,
            {f"{x:02d}": {"x": x} for x in range(20)},
            tmp_path / "ray",
            hooks=TrialHooks(
                on_result=heard.append,
                watch=watch,
                saved=lambda: "18 are left",
                seconds_to_save=lambda _: 60.0,  # Any busy machine is fast enough.
            ),
        )
    assert attempts(folder, "trial") == 2
    raised, died = sorted(heard, key=lambda report: report.key)
    assert (raised.error, raised.after_stop) == ("OSError: no room", True)
    assert "died" in str(died.error)
    assert died.after_stop, "what fails while it stops is told, not tried again"
    assert {path.read_text() for path in tmp_path.glob("trial.*")} == {"saved"}


def test_no_trials_are_no_work(tmp_path: Path) -> None:
    from orchestrator.cluster.ray_tune import run_trials

    assert run_trials(lambda parameters, context: {}, {}, tmp_path) == {}


def test_more_at_once_than_cpus_is_cut_down(ray_session: None, tmp_path: Path) -> None:
    from orchestrator.cluster.ray_tune import TrialContext, run_trials

    def trial(parameters: dict[str, Any], context: TrialContext) -> dict[str, Any]:
        return {"done": True}

    trials: dict[str, dict[str, Any]] = {key: {} for key in "abc"}
    reports = run_trials(trial, trials, tmp_path / "ray", SweepSettings(trials_at_once=50))
    assert [report.result for report in reports.values()] == [{"done": True}] * 3
