"""`list` on a small workspace with real trainings, and locks that are really held."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from same_run import stop_at

from orchestrator import cli
from orchestrator.cli.session import open_session
from orchestrator.records.trial import SweepTrials
from orchestrator.training.trainer import run_job
from orchestrator.workspace.files import read_json
from orchestrator.workspace.journal import Journal, read_tail
from orchestrator.workspace.layout import (
    RUN_LOCK_NAME,
    WORKERS_LOCK_NAME,
    Workspace,
    open_workspace,
)
from orchestrator.workspace.locks import lock_file

Run = Callable[..., str]


@pytest.fixture
def space(tmp_path) -> Workspace:
    return open_workspace(tmp_path)


@pytest.fixture
def run(space, capsys) -> Run:
    """Runs a command in the workspace and returns what it prints, in one line."""

    def command(*words: str, code: int = 0) -> str:
        assert cli.main([*words, "--workspace", str(space.root)]) == code
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    return command


def _files(root: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.fixture
def two_runs(tiny_job, space) -> Path:
    """A finished run, and one of 8 steps that was stopped after 3, whose folder is returned."""
    run_job(tiny_job("runs/whole", num_steps=2))
    run_job(tiny_job("runs/half", num_steps=8), should_stop=stop_at(3))
    return space.runs / "half"


def _store_sweep(space: Workspace, plan: SweepTrials) -> None:
    plan = plan.model_copy(update={"name": "my-sweep"})
    plan.write(space.sweeps / "my-sweep" / "plan.json")


def test_runs_are_listed_with_their_states_and_nothing_is_written(
    space, two_runs, run, capsys, monkeypatch
):
    before = _files(space.root)
    listed = json.loads(run("list", "--json"))
    assert listed["workspace"] == str(space.root)
    runs = {entry["name"]: entry for entry in listed["runs"]}
    assert runs["whole"]["state"] == "finished"
    assert runs["half"]["state"] == "stopped at 3/8"
    assert runs["half"]["schedule"] == [2, 1]
    real = sum(p.stat().st_size for p in (space.runs / "whole").rglob("*") if p.is_file())
    assert runs["whole"]["bytes"] == real
    names = {entry["name"] for entry in listed["checkpoints"]}
    assert names == {"runs/whole/step_00000002", "runs/half/step_00000003"}
    assert run("list", "running").startswith("nothing runs in")
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["list", "runs", "--workspace", str(space.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "stopped at 3/8" in "".join(lines)
    assert _files(space.root) == before
    assert "'trials', 'sweeps', 'models'" in run("list", "trails", code=2)


def test_a_mistyped_workspace_is_not_made(tmp_path, capfd):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("a")
    for root, words in product(
        (tmp_path / "none", texts), ("list", "list running", "ui", "ui --sync", "clean", "report")
    ):
        assert cli.main([*words.split(), "--workspace", str(root)]) == 2
        error = capfd.readouterr().err
        assert str(root) in error
        assert ("holds other files" in error) == (words == "report" and root == texts)
        assert {*tmp_path.rglob("*")} == {texts, texts / "a.txt"}


def test_a_sweep_counts_its_finished_trials(space, tiny_plan, run):
    _store_sweep(space, tiny_plan)
    first = tiny_plan.trials[0]
    first.write(first.result_path)
    [sweep] = json.loads(run("list", "sweeps", "--json"))["sweeps"]
    assert (sweep["finished"], sweep["trials"]) == (1, len(tiny_plan.trials))
    assert sweep["state"] == "interrupted"
    [trial] = json.loads(run("list", "trials", "--json"))["trials"]
    assert (trial["state"], trial["label"]) == ("finished", first.label)
    assert trial["sweeps"] == ["my-sweep"]


def test_a_sweep_whose_trials_failed_says_so_until_it_is_started_again(space, tiny_plan, run):
    _store_sweep(space, tiny_plan)
    journal = Journal(space.sweeps / "my-sweep")
    for event, state in (
        ("started", "interrupted"), ("failed", "failed"), ("finished", "failed"),
        ("started", "interrupted"),
    ):  # fmt: skip
        journal.event(event)
        assert f" {state}, 0 of {len(tiny_plan.trials)} " in run("list", "sweeps")
    journal.close()


def test_status_shows_a_running_training_and_its_sweep(space, tiny_plan, run):
    _store_sweep(space, tiny_plan)
    trial = next(trial for trial in tiny_plan.trials if trial.job)
    run_job(trial.job, should_stop=stop_at(15))
    with lock_file(Path(trial.folder) / WORKERS_LOCK_NAME):
        listed = json.loads(run("list", "running", "--json"))
        printed = run("list", "running")
    [activity] = listed["activities"]
    assert (activity["kind"], activity["label"]) == ("training", trial.label)
    assert (activity["step"], activity["steps"]) == (15, 20)
    tokens = 5 * trial.job.recipe.num_tokens_per_step
    assert activity["seconds_left"] == pytest.approx(tokens / activity["tokens_per_second"])
    [sweep] = listed["sweeps"]
    assert (sweep["name"], sweep["finished"]) == ("my-sweep", 0)
    assert f"sweep my-sweep: 0 of {len(tiny_plan.trials)} trials finished" in printed
    assert "step 15 of 20" in printed
    assert run("list", "running").startswith("nothing runs in")


def test_status_tells_queued_from_running_and_measured_trials(space, two_runs, tiny_plan, run):
    _store_sweep(space, tiny_plan)
    measured = next(trial for trial in tiny_plan.trials if not trial.job)

    def kinds(*locks: Path) -> dict[str, str]:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock_file(lock))
            activities = json.loads(run("list", "running", "--json"))["activities"]
        return {activity["name"]: activity["kind"] for activity in activities}

    assert kinds(space.runs / "new" / RUN_LOCK_NAME, two_runs / RUN_LOCK_NAME) == {
        "runs/new": "queued", "runs/half": "queued",
    }  # fmt: skip
    with lock_file(space.runs / "new" / RUN_LOCK_NAME):
        assert "queued runs/new: waits for Ray to start its workers" in run("list", "running")
        with lock_file(two_runs / WORKERS_LOCK_NAME):
            assert "queued runs/new: waits for runs/half" in run("list", "running")
    assert kinds(two_runs / RUN_LOCK_NAME, two_runs / WORKERS_LOCK_NAME) == {
        "runs/half": "training"
    }
    assert kinds(space.runs / "whole" / RUN_LOCK_NAME, Path(measured.folder) / RUN_LOCK_NAME) == {
        "runs/whole": "measuring", str(Path(measured.folder).relative_to(space.root)): "measuring",
    }  # fmt: skip


def test_after_a_resume_the_speed_is_not_that_of_before(two_runs, run):
    with lock_file(two_runs / WORKERS_LOCK_NAME):
        [before] = json.loads(run("list", "running", "--json"))["activities"]
        journal = Journal(two_runs)
        journal.event("resumed", step=3)
        journal.close()
        [after] = json.loads(run("list", "running", "--json"))["activities"]
    assert before["tokens_per_second"] > 0
    assert (after["tokens_per_second"], after["seconds_left"]) == (None, None)
    assert after["loss"] == before["loss"]


def test_status_shows_commands_and_what_is_prepared(space, run):
    with open_session(space.root, "sweep-threshold", verbose=None):
        assert f"command sweep-threshold: process {os.getpid()}" in run("list", "running")
    assert run("list", "running").startswith("nothing runs in")
    with lock_file(space.tokens / "sources" / "0123.lock"):
        listed = json.loads(run("list", "running", "--json"))
    kinds = {activity["kind"]: activity["name"] for activity in listed["activities"]}
    assert kinds == {"preparing": "tokens"}


FOREIGN = [None, "x", 3, 1e400, True, [], {"a": 1}]


def _replaced(value: Any) -> Iterator[Any]:
    """Yield a JSON value with the whole, and then each part, replaced by what has another type."""
    for foreign in FOREIGN:
        if type(foreign) is not type(value) and not (type(value) is float and foreign == 3):
            yield foreign
    if isinstance(value, list):
        yield from ([foreign, *value[1:]] for foreign in _replaced(value[0]))
    if isinstance(value, dict):
        for key, part in value.items():
            yield from ({**value, key: foreign} for foreign in _replaced(part))


def test_a_file_with_values_of_other_types_is_named_and_the_rest_is_listed(
    space, two_runs, tiny_plan, capfd
):
    _store_sweep(space, tiny_plan)
    changed_keys = {
        "runs/whole/done.json": "step",
        "runs/whole/job.json": "job",
        "sweeps/my-sweep/plan.json": "trials",
    }
    for path, key in changed_keys.items():
        file = space.root / path
        name = Path(path).parent.name
        original = file.read_text()
        stored = read_json(file)
        assert stored
        for text in (
            original,
            "[]",
            *(json.dumps({**stored, key: foreign}) for foreign in ("x", 1.5)),
        ):
            file.write_text(text)
            assert cli.main(["list", "--json", "--workspace", str(space.root)]) == 0
            printed = capfd.readouterr()
            listed = json.loads(printed.out)
            states = {entry["name"]: entry["state"] for entry in listed["runs"] + listed["sweeps"]}
            assert states["half"] == "stopped at 3/8"
            is_damaged = text is not original
            assert (states[name] == "damaged") == is_damaged, text
            assert (f"{path} is damaged" in "".join(printed.err.splitlines())) == is_damaged, text
        file.write_text(original)


def test_records_of_other_types_are_skipped(two_runs, run):
    journal = two_runs / "journal.jsonl"
    last = next(record for record in read_tail(two_runs) if record["kind"] == "metrics")
    with journal.open("a") as file:
        file.write("[" * 100_000 + "\n")
        for value in (*_replaced(last), {**last, "time": 10**30}):
            file.write(json.dumps(value) + "\n")
    assert "half stopped at 3/8 iiet 2,1" in run("list", "runs")
