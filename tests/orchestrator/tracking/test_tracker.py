"""Runs are created once, filled from journals without duplicates, and survive a dead server."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from refusals import assert_names, refused

from orchestrator.records.tracked_run import (
    NOTE_TAG,
    REPORT_TAG,
    RUN_ID,
    VIEW_TAG,
    RegisteredModel,
    TrackedModel,
    TrackedRun,
)
from orchestrator.tracking.chart_view import ChartView
from orchestrator.tracking.tracker import Tracking, open_tracking
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import open_workspace


@pytest.fixture
def requests(monkeypatch) -> Counter[str]:
    """Count the calls of the store in this thread; a client of a server makes a request for each.

    Threads of other tests may still publish what runs there.
    """
    counts: Counter[str] = Counter()
    reading = ("search_runs", "get_run")
    for name in (*reading, "create_run", "log_batch", "log_inputs", "update_run_info"):
        method = getattr(SqlAlchemyStore, name)

        def counted(*arguments: Any, name: str = name, method: Any = method, **options: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                counts[name] += 1
            return method(*arguments, **options)

        monkeypatch.setattr(SqlAlchemyStore, name, counted)
    return counts


def run_of(key: str, *, kind: str = "trial", **fields: Any) -> TrackedRun:
    return TrackedRun(**{"key": key, "kind": kind, "name": key, "status": "RUNNING", **fields})


def show(tracking: Tracking, run: TrackedRun) -> Run:
    """Publish a run, and return what MLflow has then."""
    tracking.publish(run)
    run_id = tracking.run_id(run)
    assert run_id is not None
    return tracking.store.connect().get_run(run_id)


def history(tracking: Tracking, run: Run, name: str) -> list[tuple[int, float]]:
    points = client(tracking).get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in points]


def client(tracking: Tracking) -> MlflowClient:
    return tracking.store.connect()


def test_a_key_has_one_run_under_each_parent(tracking):
    sweep = show(tracking, run_of("one-run", kind="sweep", name="sweep"))
    show(tracking, run_of("another", kind="sweep", name="sweep"))
    trial = show(tracking, run_of("t", parent="one-run"))
    again = show(tracking, run_of("t", parent="one-run"))
    elsewhere = show(tracking, run_of("t", parent="another"))
    renamed = show(tracking, run_of("one-run", kind="sweep", name="renamed"))
    assert renamed.info.run_id == sweep.info.run_id
    assert again.info.run_id == trial.info.run_id
    assert elsewhere.info.run_id != trial.info.run_id
    assert trial.data.tags["mlflow.parentRunId"] == sweep.info.run_id
    assert trial.data.tags["iiet.kind"] == "trial"


def test_the_same_values_at_the_same_step_add_no_points(tracking):
    values = {"a": 0.1, "b,none": math.inf, "c": math.nan, "d": -math.inf, "e": 1e-300}
    points = [(name, value, 0) for name, value in values.items()]
    run = run_of("points", points=[*points, ("f", 2.0, 0), ("g", 1.0, 1), ("g", 1.0, 2)])
    for _ in range(3):
        mlflow_run = show(tracking, run)
    for value in (3.0, 2.0):  # Another value, then the first one again.
        run = run.changed(points=[("f", value, 0)])
        mlflow_run = show(tracking, run)
        assert mlflow_run.data.metrics["f"] == value, "MLflow shows the new one"
    for name in ("a", "b_none", "c", "d", "e"):
        assert len(history(tracking, mlflow_run, name)) == 1
    assert history(tracking, mlflow_run, "f") == [(0, 2.0), (0, 3.0), (0, 2.0)]
    assert history(tracking, mlflow_run, "g") == [(1, 1.0), (2, 1.0)]


def test_a_resumed_training_repeats_no_step(tracking, workspace, tmp_path):
    run = run_of("resumed", journal=str(tmp_path))
    journal = Journal(tmp_path)
    for step in (1, 2, 3):
        journal.metrics(step, {"train/loss": 5.0 - step, "train/acc,none": step})
    journal.event("checkpoint", step=3)
    show(tracking, run)
    first = show(tracking, run)
    # It goes on from its checkpoint at step 1; another process, which knows nothing, copies it.
    for step in (2, 3, 4):
        journal.metrics(step, {"train/loss": 5.0 - step, "train/acc,none": 10.0 * step})
    journal.close()
    show(tracking, run)
    again = show(open_tracking(workspace, warn=pytest.fail), run)
    assert again.info.run_id == first.info.run_id
    assert again.data.metrics["train/acc_none"] == 40.0
    assert history(tracking, first, "train/loss") == [(1, 4), (2, 3), (3, 2), (4, 1)]


def test_a_long_curve_is_thinned_and_keeps_its_end(tracking, workspace, tmp_path):
    run = run_of("long", journal=str(tmp_path))
    journal = Journal(tmp_path)
    for step in range(10, 100_001, 10):
        journal.metrics(step, {"train/loss": float(step)})
        if step == 50_000:
            show(tracking, run)
    journal.close()
    show(open_tracking(workspace, warn=pytest.fail), run)  # Another process goes on.
    ended = show(tracking, run.changed(status="FINISHED"))
    steps = [step for step, _ in history(tracking, ended, "train/loss")]
    assert steps[:100] == list(range(10, 1001, 10))
    assert steps == sorted(set(steps))
    assert 300 < len(steps) < 800
    assert steps[-1] == ended.data.metrics["train/loss"] == 100_000


@pytest.mark.slow
def test_a_copy_after_a_lost_answer_adds_no_point(tracking, workspace, tmp_path, monkeypatch):
    run = run_of("lost answer", journal=str(tmp_path))
    journal = Journal(tmp_path)
    names = [f"train/loss_{number}" for number in range(20)]
    for step in range(60):  # More points than fit into one request.
        journal.metrics(step, dict.fromkeys(names, float(step)))
    warnings: list[str] = []
    tracking = open_tracking(workspace, warn=warnings.append)
    show(tracking, run_of("lost answer"))
    log_batch = MlflowClient.log_batch

    def stored_without_answer(*arguments: Any, **options: Any) -> None:
        log_batch(*arguments, **options)
        raise OSError("the connection was closed")

    monkeypatch.setattr("orchestrator.tracking.tracker.FIRST_PAUSE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", stored_without_answer)
        tracking.publish(run)
        tracking.wait()
    assert warnings
    journal.metrics(60, dict.fromkeys(names, 60.0))
    journal.close()
    mlflow_run = show(tracking, run)
    for name in names:
        assert [step for step, _ in history(tracking, mlflow_run, name)] == list(range(61))


def test_a_run_has_the_times_of_its_training(tracking):
    show(tracking, run_of("times", kind="sweep", started_ms=1_000))
    trial = run_of("timed", parent="times", points=[("loss", 1.0, 0)], started_ms=2_000)
    mlflow_run = show(tracking, trial)
    assert mlflow_run.info.status == "RUNNING"
    assert mlflow_run.info.end_time is None
    failed = trial.changed(status="FAILED", ended_ms=3_000, tags={NOTE_TAG: "why", "a": "b"})
    mlflow_run = show(tracking, failed)
    assert (mlflow_run.info.start_time, mlflow_run.info.end_time) == (2_000, 3_000)
    assert (mlflow_run.info.status, mlflow_run.data.tags[NOTE_TAG]) == ("FAILED", "why")
    # The trial is tried again, and the reason disappears.
    again = trial.changed(ended_ms=4_000, tags={NOTE_TAG: ""})
    assert show(tracking, again).info.status == "RUNNING"
    mlflow_run = show(tracking, again.changed(status="FINISHED"))
    assert (mlflow_run.info.start_time, mlflow_run.info.end_time) == (2_000, 4_000)
    assert mlflow_run.info.status == "FINISHED"
    assert NOTE_TAG not in mlflow_run.data.tags
    assert mlflow_run.data.tags["a"] == "b"
    # A finished run stays finished, with its end.
    for status in ("RUNNING", "FINISHED"):
        info = show(tracking, again.changed(status=status, ended_ms=10**13)).info
        assert (info.status, info.end_time) == ("FINISHED", 4_000)
    info = show(tracking, run_of("short", status="FINISHED", ended_ms=1)).info
    assert info.end_time == info.start_time > 1


def test_a_run_is_searched_once_and_unchanged_values_are_not_sent(tracking, workspace, requests):
    sweep = run_of("counted", kind="sweep", params={"seed": "1"}, tags={"a": "b"})
    trials = [
        run_of(
            f"counted-{n}", parent="counted", params={"n": str(n)}, points=[("loss", n, 0)],
            dataset=("tokens", "0123456789abcdef", {"train_tokens": 7}), status="FINISHED",
        )
        for n in range(20)
    ]  # fmt: skip
    assert all(tracking.show_in_mlflow([sweep]))
    assert requests == {"search_runs": 1, "create_run": 1, "log_batch": 1}
    requests.clear()
    ended = sweep.changed(status="FINISHED")
    assert all(tracking.show_in_mlflow([*trials, ended]))
    assert requests == {
        "search_runs": 1, "create_run": 20, "log_batch": 20, "log_inputs": 20,
        "update_run_info": 21,
    }  # fmt: skip
    requests.clear()
    assert all(tracking.show_in_mlflow([*trials, ended]))
    assert not requests
    again = open_tracking(workspace, warn=pytest.fail)
    requests.clear()
    assert all(again.show_in_mlflow([ended, *trials]))
    assert requests == {"search_runs": 1}


def test_a_run_that_was_deleted_meanwhile_is_created_again(tracking):
    run = run_of("deleted", kind="pretrain")
    client(tracking).delete_run(show(tracking, run).info.run_id)
    mlflow_run = show(tracking, run.changed(points=[("loss", 1.0, 0)]))
    assert mlflow_run.data.metrics == {"loss": 1.0}
    assert mlflow_run.info.lifecycle_stage == "active"
    # The same with the run of a sweep, of which a trial is published.
    sweep = run_of("deleted-sweep", kind="sweep", name="all")
    client(tracking).delete_run(show(tracking, sweep).info.run_id)
    trial = show(tracking, run_of("deleted-trial", parent=sweep.key))
    client(tracking).delete_run(trial.info.run_id)
    trial = show(tracking, run_of("deleted-trial", parent=sweep.key, params={"a": "b"}))
    parent = client(tracking).get_run(trial.data.tags["mlflow.parentRunId"])
    assert (parent.info.lifecycle_stage, parent.info.run_name) == ("active", "all")


def test_artifacts_and_texts_replace_earlier_ones(tracking, workspace, tmp_path):
    file = tmp_path / "front.csv"
    run = run_of(
        "artifacts", tags={NOTE_TAG: f"**hello** {RUN_ID}"},
        files={"front": [str(file), str(tmp_path / "missing.png")]},
    )  # fmt: skip
    for text in ("old", "newer"):
        file.write_text(text)
        mlflow_run = show(
            tracking, run.changed(texts={"settings.yaml": text, "front/table.json": text})
        )
    run_id = mlflow_run.info.run_id
    assert mlflow_run.data.tags[NOTE_TAG] == f"**hello** {run_id}"
    paths = [file.path for file in client(tracking).list_artifacts(run_id, "front")]
    assert paths == ["front/front.csv", "front/table.json"]
    for name in ("front/front.csv", "front/table.json", "settings.yaml"):
        path = client(tracking).download_artifacts(run_id, name, str(tmp_path))
        assert Path(path).read_text() == "newer"
    # Artifacts lie in the workspace, not in ./mlruns of the current directory.
    assert list(workspace.artifacts.rglob("table.json"))


def test_what_is_refused_is_reported_and_the_rest_is_shown(workspace):
    warnings: list[str] = []
    tracking = open_tracking(workspace, warn=warnings.append)
    refused = run_of("refused", params={"a name": "x", "": "no name"})
    accepted = run_of("other", points=[("still", 1.0, 0)])
    tracking.publish(refused, accepted)
    assert show(tracking, accepted).data.metrics == {"still": 1.0}
    assert ["trial refused" in text for text in warnings] == [True]
    assert not tracking.is_store_down


def test_a_dead_server_costs_one_warning_and_gets_the_last_state_later(
    workspace, monkeypatch, tmp_path
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    warnings: list[str] = []
    tracking = open_tracking(workspace, warn=warnings.append)
    sweep = run_of("dead", kind="sweep", name="sweep", params={"seed": "3"})
    trial = run_of("dead-trial", parent="dead", journal=str(tmp_path))
    journal = Journal(tmp_path)
    journal.metrics(1, {"train/loss": 2.0})
    journal.close()
    tracking.publish(sweep, trial)
    tracking.wait()
    tracking.publish(trial.changed(status="FINISHED"))
    assert tracking.run_id(trial) is None
    assert len(warnings) == 1
    assert "iiet-orch ui --sync" in warnings[0]
    full = open_workspace(tmp_path / "full")
    full.tracked.touch()  # Writing fails, as on a full disk.
    stopped = open_tracking(full, warn=warnings.append)
    for value in (1.0, 2.0):
        stopped.publish(run_of("full", points=[("loss", value, 0)]))
        stopped.wait()
    assert sorted(text.split(";")[0].split(" (")[0] for text in warnings[1:]) == [
        "MLflow at http://127.0.0.1:9 does not respond",
        f"cannot store what MLflow shows in {full.tracked}",
    ]

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    back = open_tracking(workspace, warn=pytest.fail)
    last_state = back.stored("trial", "dead-trial", "dead")
    assert last_state is not None
    assert all(back.show_in_mlflow([last_state]))
    mlflow_run = show(back, last_state)
    assert mlflow_run.info.status == "FINISHED"
    assert mlflow_run.data.metrics == {"train/loss": 2.0}
    parent = client(back).get_run(mlflow_run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == "sweep"
    [sweep_there] = [back.stored("sweep", "dead")]
    assert sweep_there is not None
    assert show(back, sweep_there).data.params == {"seed": "3"}


def test_a_second_outage_is_warned_of_and_pauses_as_shortly_as_the_first(workspace):
    warnings: list[str] = []
    tracking = open_tracking(workspace, warn=warnings.append)
    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.monotonic", lambda: clock[0])
        pauses = []
        for num_failures in (3, 1):
            for _ in range(num_failures):
                tracking.pause(ConnectionError("no route"))
                began = clock[0]
                while tracking.is_store_down:
                    clock[0] += 0.5
                pauses.append(clock[0] - began)
            assert all(tracking.show_in_mlflow([run_of(f"after {num_failures} failures")]))
    assert pauses[0] < pauses[1] < pauses[2]
    assert pauses[3] == pauses[0]
    assert len(warnings) == 2


def test_a_store_that_cannot_be_opened_is_a_clear_error(tmp_path, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("MLflow would retry for minutes")

    workspace = open_workspace(tmp_path)
    database = tmp_path / "mlflow.db"
    with monkeypatch.context() as patch:
        patch.setattr(SqlAlchemyStore, "__init__", never)
        for make in (
            database.mkdir,
            lambda: database.write_text("no database"),
            lambda: database.symlink_to(database),
        ):
            make()
            with refused(UserError, "mlflow.db"):
                open_tracking(workspace)
            if database.is_dir():
                database.rmdir()
            else:
                database.unlink()
    for uri, words in (
        (f"file://{tmp_path}/mlruns", "sqlite:///FILE"),
        ("postgresql+nothing://user:geh3im@host/db", "cannot open MLflow's store|needs the module"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(UserError, match=words) as caught:
            open_tracking(workspace)
        assert "geh3im" not in str(caught.value)


def test_a_copy_shows_nothing_new_and_names_what_people_have_added(tracking, workspace, tmp_path):
    at = {"at": f"{workspace.root}/runs/x"}
    run = run_of("copied", kind="sweep", status="FINISHED", params=at, tags={**at, NOTE_TAG: "a"})
    mlflow_run = show(tracking, run)
    assert (mlflow_run.data.tags["at"], mlflow_run.data.params["at"]) == ("runs/x", "runs/x")
    noted = show(tracking, run_of("noted", name="noted", status="FINISHED"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    model = RegisteredModel(
        name="copied", alias="best", run=run.identity, folder=str(tmp_path / "model"),
        model=TrackedModel(key="k", name="copied", params={}, datasets={}),
    )  # fmt: skip
    assert tracking.register(model)
    client(tracking).set_tag(noted.info.run_id, NOTE_TAG, "interesting")
    client(tracking).set_tag(noted.info.run_id, "reviewer", "ann")
    client(tracking).set_registered_model_alias("copied", "production", "1")
    before = {path: path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()}
    root = Path(shutil.copytree(workspace.root, tmp_path / "a copy"))

    warnings: list[str] = []
    copy = open_tracking(open_workspace(root), warn=warnings.append)
    assert not warnings, "a command that cannot go on says it itself"
    for number in range(2):
        copy.publish(run.changed(points=[("loss", 1.0, number)]))
    assert copy.run_id(run) is None
    assert not copy.register(model)
    [warning] = warnings
    assert_names(warning, f"{root}/mlflow.db")
    assert "`iiet-orch ui --sync --replace`" in warning.partition(",")[0], "what to do comes first"
    added = copy.added_by_people()
    assert {"the note of noted", "the tag reviewer of noted"} <= set(added)
    assert "the alias copied@production" in added
    assert not [text for text in added if "copied@best" in text or text == "the note of copied"]
    after = {path: path.read_bytes() for path in workspace.root.rglob("*") if path.is_file()}
    assert after == before


def test_no_tracked_file_names_the_place_of_the_workspace(tracking, workspace):
    place = str(workspace.root / "runs" / "x")
    model = TrackedModel(key="k", name="m", params={"checkpoint": place}, datasets={})
    run = run_of(
        "portable", folder=place, journal=place, params={"at": place}, tags={"at": place},
        files={"front": [f"{place}/a.png"]}, model=model,
    )  # fmt: skip
    show(tracking, run)
    path = run.path(workspace)
    assert str(workspace.root) not in path.read_text()
    stored = tracking.stored("trial", "portable")
    assert stored is not None
    assert (stored.folder, stored.files) == (run.folder, run.files)


def test_a_dataset_is_logged_once_and_a_parameter_keeps_its_first_value(tracking):
    data = ("tokens", "0123456789abcdef", {"train_tokens": 7})
    many = {f"setting.{n}": str(n) for n in range(150)}
    for kind, context in (("pretrain", "training"), ("influence", "evaluation")):
        for params in ({"seed": "1"}, {"seed": "2", **many}):
            run = show(tracking, run_of("data", kind=kind, dataset=data, params=params))
        (logged_data,) = run.inputs.dataset_inputs
        assert (logged_data.dataset.name, logged_data.dataset.digest) == data[:2]
        assert json.loads(logged_data.dataset.profile) == {"train_tokens": 7}
        assert logged_data.tags[0].value == context
        assert run.data.params == {"seed": "1", **many}


def test_many_points_and_a_long_parameter_keep_within_the_limits(tracking, monkeypatch):
    log_batch = MlflowClient.log_batch
    sizes = list[int]()
    lengths = list[int]()

    def counted(self: MlflowClient, run_id: str, **parts: Any) -> None:
        sizes.append(sum(map(len, parts.values())))
        lengths.extend(len(param.value) for param in parts.get("params", ()))
        log_batch(self, run_id, **parts)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    points = [("loss", float(step), step) for step in range(1100)]
    mlflow_run = show(tracking, run_of("many", points=points, params={"note": "x" * 6001}))
    assert max(sizes) <= 1000, "a server takes no more in one request"
    assert max(lengths) == 6000, "a server takes no longer one, or cuts it with a warning"
    assert history(tracking, mlflow_run, "loss") == [(step, value) for _, value, step in points]
    assert mlflow_run.data.params == {"note": "x" * 6000}


def test_links_open_the_training_pages_also_of_a_server_below_a_path(tracking, workspace):
    tags = {VIEW_TAG: "front-toy", REPORT_TAG: "front/front.html"}
    plain = show(tracking, run_of("plain", kind="sweep", started_ms=10**14))
    linked = show(tracking, run_of("linked", kind="sweep", tags=tags, started_ms=10**14 + 1))
    view = ChartView(key="all", name="All", run_filter="", order_by="attributes.start_time")
    runs = f"https://host/team/mlflow/#/experiments/{tracking.open_experiment()}/runs"
    training = "workflowType=machine_learning"
    shown = "viewStateShareKey=front-toy"
    assert tracking.links("https://host/team/mlflow/", view, 2) == [
        f"training runs: {runs}?{training}&compareRunsMode=TABLE&viewStateShareKey=all",
        f"sweep linked, charts: {runs}?{training}&compareRunsMode=CHART&{shown}",
        f"sweep linked, table:  {runs}?{training}&compareRunsMode=TABLE&{shown}",
        f"sweep linked, report: {runs}/{linked.info.run_id}/artifacts/front/front.html?{training}",
        f"sweep linked, run:    {runs}/{linked.info.run_id}?{training}",
        f"sweep plain, run:    {runs}/{plain.info.run_id}?{training}",
    ]
