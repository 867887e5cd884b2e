"""Runs are created once, filled from journals without duplicates, and survive a dead server."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from orchestrator.records.measurement import TrackedModel
from orchestrator.tracking import (
    NOTE_TAG,
    NestedRun,
    TrackedRun,
    Tracking,
    open_tracking,
)
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import Workspace, open_workspace


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of the store; a client of a server makes a request for each."""
    counts: Counter[str] = Counter()
    for name in ("search_runs", "create_run", "get_run", "log_batch", "update_run_info"):
        method = getattr(SqlAlchemyStore, name)

        def counted(*given: Any, name: str = name, method: Any = method, **more: Any) -> Any:
            counts[name] += 1
            return method(*given, **more)

        monkeypatch.setattr(SqlAlchemyStore, name, counted)
    return counts


def stored(tracking: Tracking, run: TrackedRun) -> Run:
    assert run.run_id is not None
    return tracking.store.connect().get_run(run.run_id)


def client(tracking: Tracking) -> MlflowClient:
    return tracking.store.connect()


def test_a_key_has_one_run_under_each_parent(tracking: Tracking) -> None:
    sweep = tracking.run("one-run", name="sweep", kind="sweep")
    other = tracking.run("another", name="sweep", kind="sweep")
    trial = tracking.run("t", name="trial", kind="trial", parent=sweep)
    again = tracking.run("t", name="trial", kind="trial", parent=sweep)
    elsewhere = tracking.run("t", name="trial", kind="trial", parent=other)
    assert tracking.run("one-run", name="renamed", kind="sweep").run_id == sweep.run_id
    assert again.run_id == trial.run_id
    assert elsewhere.run_id != trial.run_id
    assert stored(tracking, trial).data.tags["mlflow.parentRunId"] == sweep.run_id
    assert stored(tracking, trial).data.tags["iiet.kind"] == "trial"


def test_the_same_values_at_the_same_step_add_no_points(tracking: Tracking) -> None:
    run = tracking.run("points", name="p", kind="sweep")
    values = {"a": 0.1, "b,none": math.inf, "c": math.nan, "d": -math.inf, "e": 1e-300, "f": 2.0}
    for _ in range(3):
        run.log_metrics(values)
    run.log_metrics({"a": 0.1}, step=7)  # The same value, later.
    run.log_metrics({"a": 0.1})  # The summary of a curve that has later points.
    assert run.run_id is not None  # It waits; MLflow joins equal points of one millisecond.
    run.log_metrics({"f": 3.0})
    assert run.run_id is not None
    run.log_metrics({"f": 2.0})  # The first value again, after another one.
    assert run.run_id is not None
    points = {
        name: [(p.step, p.value) for p in client(tracking).get_metric_history(run.run_id, name)]
        for name in ("a", "b_none", "c", "d", "e", "f")
    }
    assert points["a"] == [(0, 0.1), (7, 0.1)]
    assert [len(points[name]) for name in ("b_none", "c", "d", "e")] == [1, 1, 1, 1]
    assert [value for _, value in points["f"]] == [2.0, 3.0, 2.0]


def test_a_journal_record_is_copied_once(tracking: Tracking, tmp_path: Path) -> None:
    run = tracking.run("journal", name="j", kind="pretrain")
    journal = Journal(tmp_path)
    journal.metrics(10, {"train/loss": 5.0, "train/acc,none": 0.5})
    journal.event("checkpoint", step=10)
    run.log_journal(tmp_path)
    run.log_journal(tmp_path)
    journal.metrics(20, {"train/loss": 4.0})
    run.log_journal(tmp_path)
    journal.close()
    assert run.run_id is not None
    history = client(tracking).get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(10, 5.0), (20, 4.0)]
    assert stored(tracking, run).data.metrics["train/acc_none"] == 0.5


def test_a_resumed_training_repeats_no_step(
    tracking: Tracking, workspace: Workspace, tmp_path: Path
) -> None:
    run, journal = tracking.run("resumed", name="j", kind="pretrain"), Journal(tmp_path)
    for step in (1, 2, 3):
        journal.metrics(step, {"train/loss": 5.0 - step, "train/tokens_per_second": step})
    run.log_journal(tmp_path)
    assert run.run_id is not None
    # It goes on from its checkpoint at step 1; another process, which knows nothing, copies it.
    for step in (2, 3, 4):
        journal.metrics(step, {"train/loss": 5.0 - step, "train/tokens_per_second": 10.0 * step})
    journal.close()
    run.log_journal(tmp_path)
    other = open_tracking(workspace, warn=pytest.fail)
    again = other.run("resumed", name="j", kind="pretrain")
    again.log_journal(tmp_path)
    assert again.run_id == run.run_id
    history = client(tracking).get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 4), (2, 3), (3, 2), (4, 1)]


def test_a_copy_after_a_lost_answer_adds_no_point(
    tracking: Tracking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path)
    for step in range(5):
        journal.metrics(step, {"train/loss": float(step)})
    journal.close()
    run = tracking.run("lost answer", name="j", kind="pretrain")
    assert run.run_id is not None
    log_batch = MlflowClient.log_batch

    def stored_without_answer(*given: Any, **more: Any) -> None:
        log_batch(*given, **more)
        raise OSError("the connection was closed")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", stored_without_answer)
        patch.setattr(tracking._delivery, "_warn", lambda text: None)
        run.log_journal(tmp_path)
        tracking._delivery.wait()
    assert len(tracking.outbox.records()) == 1
    assert tracking.sync() == 1
    history = client(tracking).get_metric_history(run.run_id, "train/loss")
    assert [point.step for point in history] == list(range(5))


def test_a_run_has_the_times_of_its_training(tracking: Tracking) -> None:
    sweep = tracking.run("times", name="s", kind="sweep", started_ms=1_000)
    trial = NestedRun(
        key="timed", kind="trial", name="t", params={}, tags={}, metrics={"loss": 1.0},
        status="RUNNING", started_ms=2_000,
    )  # fmt: skip
    [run] = tracking.log_nested([trial], parent=sweep)
    assert stored(tracking, run).info.status == "RUNNING"
    assert stored(tracking, run).info.end_time is None
    failed = replace(trial, status="FAILED", ended_ms=3_000, tags={NOTE_TAG: "why", "a": "b"})
    tracking.log_nested([failed], parent=sweep)
    found = stored(tracking, run)
    assert (found.info.start_time, found.info.end_time) == (2_000, 3_000)
    assert (found.info.status, found.data.tags[NOTE_TAG]) == ("FAILED", "why")
    # It is tried again, and the reason disappears.
    again = replace(trial, status="FINISHED", ended_ms=4_000, tags={NOTE_TAG: ""})
    tracking.log_nested([replace(again, status="RUNNING"), again], parent=sweep)
    found = stored(tracking, run)
    assert (found.info.start_time, found.info.end_time) == (2_000, 4_000)
    assert found.info.status == "FINISHED"
    assert NOTE_TAG not in found.data.tags
    assert found.data.tags["a"] == "b"
    assert stored(tracking, sweep).info.start_time == 1_000


def test_a_run_is_searched_once_and_unchanged_values_are_not_sent(
    tracking: Tracking, workspace: Workspace, requests: Counter[str]
) -> None:
    sweep = tracking.run("counted", name="s", kind="sweep", params={"seed": 1}, tags={"a": "b"})
    trials = [
        NestedRun(
            key=f"counted-{n}", kind="trial", name="t", params={"n": str(n)}, tags={},
            metrics={"loss": n},
        )
        for n in range(20)
    ]  # fmt: skip
    assert sweep.run_id is not None
    assert requests == {"search_runs": 1, "create_run": 1, "log_batch": 1}
    requests.clear()
    tracking.log_nested(trials, parent=sweep)
    sweep.finish()
    assert requests == {"search_runs": 1, "create_run": 20, "log_batch": 20, "update_run_info": 21}
    requests.clear()
    tracking.log_nested(trials, parent=sweep)
    sweep.finish()
    assert not requests
    again = open_tracking(workspace, warn=pytest.fail)
    requests.clear()
    sweep = again.handle("counted", name="s", kind="sweep")
    again.log_nested(trials, parent=sweep)
    sweep.finish()
    assert requests == {"search_runs": 1}


def test_a_run_that_was_deleted_meanwhile_is_created_again(tracking: Tracking) -> None:
    run = tracking.run("deleted", name="d", kind="pretrain")
    assert run.run_id is not None
    client(tracking).delete_run(run.run_id)
    run.log_metrics({"loss": 1.0})
    assert stored(tracking, run).data.metrics == {"loss": 1.0}
    assert stored(tracking, run).info.lifecycle_stage == "active"


def test_a_trial_becomes_a_finished_nested_run(tracking: Tracking) -> None:
    sweep = tracking.run("nesting", name="sweep", kind="sweep")
    trial = NestedRun(
        key="trial-key",
        kind="trial",
        name="t",
        params={"schedule": "1,0"},
        tags={"iiet.sweep": "nesting"},
        metrics={"cost/evaluations": 3, "quality/accuracy": 0.5},
    )
    for _ in range(2):
        [run] = tracking.log_nested([trial], parent=sweep)
    found = stored(tracking, run)
    assert found.data.params == trial.params
    assert found.data.metrics == trial.metrics
    assert found.data.tags["iiet.sweep"] == "nesting"
    assert found.data.tags["mlflow.parentRunId"] == sweep.run_id
    assert found.info.status == "FINISHED"


def test_an_interrupted_run_resumes_and_a_finished_one_stays(tracking: Tracking) -> None:
    run = tracking.run("states", name="s", kind="pretrain")
    run.finish("KILLED")
    assert stored(tracking, tracking.run("states", name="s", kind="pretrain")).info.status == (
        "RUNNING"
    )
    run.finish()
    ended = stored(tracking, run).info.end_time
    again = tracking.run("states", name="s", kind="pretrain")
    again.finish()
    assert stored(tracking, again).info.status == "FINISHED"
    assert stored(tracking, again).info.end_time == ended


def test_a_parameter_keeps_its_first_value(tracking: Tracking) -> None:
    run = tracking.run("params", name="p", kind="pretrain", params={"seed": 1})
    params = {"seed": 2, **{f"setting.{n}": n for n in range(150)}}
    run = tracking.run("params", name="p", kind="pretrain", params=params)
    found = stored(tracking, run).data.params
    assert found["seed"] == "1"
    assert found["setting.149"] == "149"


def test_a_second_table_replaces_the_first(
    tracking: Tracking, workspace: Workspace, tmp_path: Path
) -> None:
    run = tracking.run("table", name="t", kind="sweep")
    run.log_table([{"a": 1, "b": "x"}, {"a": 2, "b": "y"}], "front/table.json")
    run.log_table([{"a": 3, "b": "z"}], "front/table.json")
    assert run.run_id is not None
    path = client(tracking).download_artifacts(run.run_id, "front/table.json", str(tmp_path))
    assert json.loads(Path(path).read_text()) == {"columns": ["a", "b"], "data": [[3, "z"]]}
    tables = json.loads(stored(tracking, run).data.tags["mlflow.loggedArtifacts"])
    assert tables == [{"path": "front/table.json", "type": "table"}]
    # Artifacts lie in the workspace, not in ./mlruns of the current directory.
    assert list(workspace.artifacts.rglob("table.json"))


def test_artifacts_and_note(tracking: Tracking, tmp_path: Path) -> None:
    run = tracking.run("artifacts", name="a", kind="sweep")
    (tmp_path / "front.csv").write_text("a,b\n")
    run.log_artifact(tmp_path / "front.csv", "front")
    run.set_tags({NOTE_TAG: "**hello**"})
    assert run.run_id is not None
    paths = [file.path for file in client(tracking).list_artifacts(run.run_id, "front")]
    assert paths == ["front/front.csv"]
    assert stored(tracking, run).data.tags["mlflow.note.content"] == "**hello**"


def test_a_refused_operation_is_reported_and_not_stored(
    workspace: Workspace, tmp_path: Path
) -> None:
    warnings: list[str] = []
    tracking = open_tracking(workspace, warn=warnings.append)
    run = tracking.run("refused", name="r", kind="sweep")
    run.log_artifact(tmp_path / "missing.png")
    run.finish()
    assert len(warnings) == 1
    assert "missing.png" in warnings[0]
    assert tracking.outbox.records() == []
    run.log_metrics({"still": 1.0})
    assert stored(tracking, run).data.metrics == {"still": 1.0}


def test_a_full_disk_and_a_dead_server_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    warnings: list[str] = []
    tracking = open_tracking(open_workspace(tmp_path), warn=warnings.append)
    tracking.outbox.path.mkdir()  # Writing fails, as on a full disk.
    run = tracking.run("dead", name="run", kind="pretrain")
    run.log_metrics({"loss": 1.0})
    run.finish()
    assert [text.split(";")[0].split(" (")[0] for text in warnings] == [
        "MLflow at http://127.0.0.1:9 does not respond",
        f"cannot store records for MLflow in {tracking.outbox.path}",
    ]


def test_a_dead_server_costs_one_warning_and_sync_delivers(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    warnings: list[str] = []
    tracking = open_tracking(workspace, warn=warnings.append)
    sweep = tracking.run("dead", name="sweep", kind="sweep", params={"seed": 3})
    trial = tracking.run("dead-trial", name="trial", kind="trial", parent=sweep)
    with_journal = Journal(tmp_path)
    with_journal.metrics(1, {"train/loss": 2.0})
    with_journal.close()
    trial.log_journal(tmp_path)
    trial.log_journal(tmp_path)
    trial.finish()
    assert trial.run_id is None
    assert len(warnings) == 1
    assert "iiet-orch sync" in warnings[0]

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    told: list[str] = []
    back = open_tracking(workspace, warn=told.append)
    with back.outbox.path.open("a") as file:
        file.write('{"operation": "upd')
    assert back.sync() == 4
    assert told == [f"{back.outbox.path} is damaged: 1 of its lines are left out"]
    assert back.outbox.records() == []
    found = stored(back, back.run("dead-trial", name="trial", kind="trial", parent=sweep))
    assert found.info.status == "FINISHED"
    assert found.data.metrics == {"train/loss": 2.0}
    parent = client(back).get_run(found.data.tags["mlflow.parentRunId"])
    assert parent.data.params == {"seed": "3"}


def test_a_store_that_cannot_be_opened_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = open_workspace(tmp_path)
    (tmp_path / "mlflow.db").write_text("this is no database, but it is long enough to look at\n")
    with pytest.raises(UserError, match=r"mlflow\.db.*not a sqlite database.*move the file away"):
        open_tracking(workspace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    with pytest.raises(UserError, match="sqlite:///FILE"):
        open_tracking(workspace)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+nothing://user:geh3im@host/db")
    with pytest.raises(UserError, match=r"cannot open MLflow's store|needs the module") as caught:
        open_tracking(workspace)
    assert "geh3im" not in str(caught.value)


@pytest.mark.parametrize("what", ["a folder", "a link to itself", "a text"])
def test_an_invalid_database_is_found_before_mlflow_opens_it(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    path = tmp_path / "mlflow.db"
    if what == "a folder":
        path.mkdir()
    elif what == "a text":
        path.write_text("no database")
    else:
        path.symlink_to(path)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("MLflow was called")

    monkeypatch.setattr("orchestrator.tracking.store.MlflowClient", never)
    with pytest.raises(UserError, match=r"cannot open MLflow's store .*mlflow\.db.* move the file"):
        open_tracking(open_workspace(tmp_path))


def test_pending_operations_are_plain_json(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracking = open_tracking(workspace, warn=lambda text: None)
    run = tracking.run("plain", name="p", kind="sweep")
    run.log_metrics({"hypervolume": 0.5})
    run.log_journal(tmp_path)
    assert run.run_id is None
    assert [sorted(record["arguments"]) for record in tracking.outbox.records()] == [
        ["params", "tags"],
        ["points", "time_ms"],
        ["journal"],
    ]
    tracking.outbox.path.unlink()


def test_a_copy_has_its_own_artifacts_and_the_original_stays(
    tracking: Tracking, workspace: Workspace, tmp_path: Path
) -> None:
    run = tracking.run("copied", name="c", kind="sweep", tags={"at": f"{workspace.root}/runs/x"})
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    model = TrackedModel(key="k", name="copied", params={}, datasets={})
    run.register("copied", tmp_path / "model", model=model, alias="best")
    elsewhere = client(tracking).create_experiment("of the user", f"file://{workspace.root}-x")
    run.finish()
    before = {path: path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()}
    root = Path(shutil.copytree(workspace.root, tmp_path / "a copy"))
    copy = open_tracking(open_workspace(root), warn=pytest.fail)
    same = copy.run("copied", name="c", kind="sweep")
    assert same.run_id == run.run_id
    assert stored(copy, same).data.tags["at"] == "runs/x"
    same.log_artifact(tmp_path / "model" / "config.json", "new")
    same.finish()
    assert list(root.glob("artifacts/*/artifacts/new/config.json"))
    best = client(copy).get_model_version_by_alias("copied", "best")
    assert best.source.startswith(f"file://{tmp_path}/a%20copy/artifacts/")
    assert Path(unquote(urlsplit(best.source).path), "config.json").is_file()
    assert client(copy).get_experiment(elsewhere).artifact_location == f"file://{workspace.root}-x"
    after = {path: path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()}
    assert after == before
    with closing(sqlite3.connect(root / "mlflow.db")) as database:
        dump = "\n".join(database.iterdump())
    assert f"{workspace.root}/" not in dump


def test_pending_operations_move_with_the_workspace(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracking = open_tracking(open_workspace(tmp_path / "old"), warn=lambda text: None)
    journal = Journal(tmp_path / "old" / "runs" / "x")
    journal.metrics(1, {"train/loss": 2.0})
    journal.close()
    run = tracking.run("moved", name="m", kind="pretrain")
    run.log_journal(journal.path.parent)
    run.finish()
    assert str(tmp_path) not in tracking.outbox.path.read_text()
    root = (tmp_path / "old").rename(tmp_path / "new")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{workspace.database}")
    back = open_tracking(open_workspace(root), warn=pytest.fail)
    assert back.sync() == 3
    found = stored(back, back.run("moved", name="m", kind="pretrain"))
    assert found.data.metrics == {"train/loss": 2.0}


def test_a_dataset_is_logged_once_with_its_digest(tracking: Tracking) -> None:
    run = tracking.run("data", name="d", kind="pretrain")
    for _ in range(2):
        run.log_dataset("tokens", "0123456789abcdef", {"train_tokens": 7})
    (found,) = stored(tracking, run).inputs.dataset_inputs
    assert found.dataset.digest == "0123456789abcdef"
    assert json.loads(found.dataset.profile) == {"train_tokens": 7}
    assert found.tags[0].value == "training"
    trial = NestedRun(
        key="reader", kind="trial", name="t", params={}, tags={}, metrics={},
        dataset=("tokens", "0123456789abcdef", {"train_tokens": 7}),
    )  # fmt: skip
    [nested] = tracking.log_nested([trial], parent=run)
    (found,) = stored(tracking, nested).inputs.dataset_inputs
    assert found.dataset.name == "tokens"


def test_no_run_ends_before_its_start(tracking: Tracking) -> None:
    run = tracking.run("short", name="s", kind="influence")
    run.finish(ended_ms=1)
    info = stored(tracking, run).info
    assert info.end_time == info.start_time > 1


def test_a_text_is_a_file_of_the_run(tracking: Tracking, tmp_path: Path) -> None:
    run = tracking.run("text", name="t", kind="pretrain")
    for text in ("old", "seed: 3\n"):
        run.log_text(text, "settings.yaml")
    path = client(tracking).download_artifacts(str(run.run_id), "settings.yaml", str(tmp_path))
    assert Path(path).read_text(encoding="utf-8") == "seed: 3\n"
