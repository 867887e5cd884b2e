"""Reports of one sweep and of several: their files, one MLflow run, from stored results alone."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from refusals import assert_names, refused
from sample_trials import sample_front, with_items

from iiet.iiad.pruning import InfluenceTable
from orchestrator.pipelines.models import plan_pick
from orchestrator.pipelines.reports import report
from orchestrator.records.evaluation import EvaluationResult, Suite, TaskResult
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.reporting.findings import confidence_note
from orchestrator.reporting.front import (
    FrontAxes,
    parse_axes,
    reason_against_accuracy,
    sweep_front,
)
from orchestrator.reporting.mlflow_report import mlflow_runs_of_results, run_note
from orchestrator.reporting.report import write_sweep_report
from orchestrator.reporting.results import (
    PROVENANCE_TITLE,
    SETTINGS_TITLE,
    StoredSweep,
    load_sweep_results,
    newest_sweep,
)
from orchestrator.reporting.statistics import SUMMARY_METRICS
from orchestrator.reporting.tables import model_rows
from orchestrator.tracking.tracker import open_tracking
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import Journal
from orchestrator.workspace.layout import PLAN_FILE, RESULTS_FILE, Workspace, open_workspace

FILES = {"front.png", "front.svg", "front.html", "front.csv", "front.json"}
FILES |= {"influence.png", "influence.svg"}


@pytest.fixture
def sweep(workspace, sample_results, sample_influence) -> StoredSweep:
    placed = []
    for result in sample_results:
        folder = workspace.trials / result.key
        journal = Journal(folder)
        for step in (10, 20, 20):  # a resumed run repeats a step
            journal.metrics(step, {"train/loss": 5.0 - step / 20, "validation/loss": 4.9})
        journal.close()
        placed.append(result.model_copy(update={"checkpoint": str(folder / "step_00000020")}))
    errors = tuple(tuple(0.0 for _ in row) for row in sample_influence)
    table = InfluenceTable(
        metric="cosine", value_rows=sample_influence, error_rows=errors, num_tokens=4096
    )
    return StoredSweep(
        name="toy",
        key="0123456789abcdef",
        results=tuple(placed),
        influence=table,
        facts={
            SETTINGS_TITLE: {"distillation.kl_weight": 1.0, "data.depth.tasks": "('phop_3',)"},
            PROVENANCE_TITLE: {"kind": "search"},
        },
    )


def test_a_knee_is_drawn_on_the_influence_of_its_own_teacher(workspace, sweep):
    knee = "(knee)"
    for teacher, is_drawn in (("", True), ("weights of another teacher", False)):
        report = write_sweep_report(workspace, changed(sweep, influence_teacher=teacher))
        [section] = [s for s in report.sections() if s.picture == "influence"]
        assert (knee in json.dumps(section.chart)) == is_drawn
        assert ("first teacher" in section.title) != is_drawn
        result = report.front.named_picks["knee"].trial
        assert (report.sweeps[0].influence_of(result) is not None) == is_drawn


def changed(sweep: StoredSweep, **changes: Any) -> StoredSweep:
    return sweep.model_copy(update=changes)


@pytest.mark.slow
def test_files_are_written_and_read_back_without_the_trials(workspace, sweep):
    written = write_sweep_report(workspace, sweep)
    assert {path.name for path in written.files} == FILES
    assert all(path.stat().st_size > 100 for path in written.files)
    assert written.page is not None
    page = written.page.read_text(encoding="utf-8")
    assert "distillation.kl_weight" in page
    # A notebook shows the picture and the table, and a line where it shows no HTML.
    shown = written._repr_html_()
    assert all(part in shown for part in ("<svg", "NFE", written.title))
    assert repr(written).startswith("ReportResult(title=")
    assert len(repr(written)) < 400
    assert load_sweep_results(workspace, "toy") == sweep
    before = {path.name: path.read_bytes() for path in written.files}
    rewritten = write_sweep_report(workspace, "toy")
    assert {path.name: path.read_bytes() for path in rewritten.files} == before

    assert written.title.startswith("Sweep toy: phop_3, iiet 3,3,3,3,3,3, ")
    # Other axes get their own folder.
    on_other_axes = write_sweep_report(workspace, "toy", axes=parse_axes("ms", "perplexity"))
    assert on_other_axes.folder == written.folder / "perplexity-ms"
    assert {path.name for path in on_other_axes.files} == FILES
    assert on_other_axes.front.axes.quality == "quality/perplexity"
    assert {path.name: path.read_bytes() for path in written.files} == before


@pytest.mark.slow
def test_paired_errors_come_from_the_stored_items(workspace, sweep, sample_evaluations):
    sweep = changed(sweep, results=with_items(workspace, sweep.results, sample_evaluations))
    axes = parse_axes(quality="accuracy")
    written = write_sweep_report(workspace, sweep, axes=axes)
    assert written.front.basis is not None
    assert written.front.basis.num_items == 2000
    assert written.page is not None
    assert "lastword (acc)" in written.page.read_text(encoding="utf-8")
    # A model without a stored evaluation has no confidence; the report is written all the same.
    lost = sweep.results[1]
    shutil.rmtree(workspace.evaluations / f"{lost.key}-lastword")
    partial = write_sweep_report(workspace, sweep, axes=axes)
    front = partial.front
    assert {row.key for row in front.placed} - {key for key, _, _ in front.intervals} == {lost.key}
    sentence = partial.sentences[1]
    assert "no paired errors" in sentence
    assert sentence.endswith(f": {lost.name}.")
    assert sentence in write_sweep_report(workspace, "toy", "toy").sentences
    skipped = {"skipped": {"piqa": "it needs the hub"}}
    without_piqa = {
        key: evaluation.model_copy(update=skipped) for key, evaluation in sample_evaluations.items()
    }
    results = with_items(workspace, sweep.results, without_piqa)
    written = write_sweep_report(workspace, changed(sweep, results=results), axes=axes)
    sentence = "Averages do not include piqa: it needs the hub."
    assert written.sentences[1] == sentence
    assert written.page is not None
    assert sentence in written.page.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("num_right", [0, 30, 700])
def test_a_teacher_with_few_right_answers_is_judged_by_its_bits(workspace, sweep, num_right):
    evaluations = {}
    for result in sweep.results:
        right = [float(n < num_right) for n in range(700)]
        task = TaskResult(
            name="lastword", version="1", num_items=700, metrics={"acc": num_right / 700},
            items=[str(n) for n in range(700)], values={"acc": right},
        )  # fmt: skip
        evaluations[result.key] = EvaluationResult(results={"lastword": task})
    judged = changed(sweep, results=with_items(workspace, sweep.results, evaluations))
    written = write_sweep_report(workspace, judged)
    assert written.folder == judged.folder(workspace)
    # 700 items on which all agree tell less than a point, which is 1% of 700 right ones only.
    in_bits = num_right < 700
    quality = "bits_per_byte" if in_bits else "accuracy"
    assert written.front.axes.quality == f"quality/{quality}"
    assert ("700 items are too few" in " ".join(written.sentences)) == in_bits
    # Either quality can be asked for; the one that is no default has its own folder.
    for option, is_default in (("accuracy", not in_bits), ("bits", in_bits)):
        chosen_report = report(workspace=workspace, sweeps=[judged.name], quality=option)
        assert (chosen_report.folder == written.folder) == is_default
    picked = plan_pick(judged.name, workspace=workspace, best=True)
    assert picked.axes == written.front.axes
    # Where some model has no bits per byte, accuracy stays.
    teacher, *other_results = judged.results
    numbers = {n: v for n, v in other_results[0].numbers.items() if n != "quality/bits_per_byte"}
    other_results[0] = other_results[0].model_copy(update={"numbers": numbers})
    assert reason_against_accuracy(workspace, [teacher, *other_results]) == ""


@pytest.mark.parametrize(
    ("share_changed", "num_items", "in_bits"),
    [(0.3, 1000, True), (0, 1000, True), (0, 2000, False)],
)
def test_an_accuracy_that_is_less_well_known_than_it_may_change_is_no_default(
    workspace, sweep, share_changed, num_items, in_bits
):
    random = np.random.default_rng(0)
    teachers_answers = random.random(num_items) < 0.4
    evaluations = {}
    for result in sweep.results:
        is_changed = (random.random(num_items) < share_changed) & (result.role != "teacher")
        right = (teachers_answers ^ is_changed).astype(float)
        task = TaskResult(
            name="lastword", version="1", num_items=num_items, metrics={"acc": right.mean()},
            items=[str(n) for n in range(num_items)], values={"acc": right.tolist()},
        )  # fmt: skip
        evaluations[result.key] = EvaluationResult(results={"lastword": task})
    results = with_items(workspace, sweep.results, evaluations)
    reason = reason_against_accuracy(workspace, results)
    assert bool(reason) == in_bits
    if in_bits:
        # 30 % of 1,000 items differ: 1.96 errors of the difference are 3.4 points to each side.
        # Where all answers are equal, they are 0.3.
        assert_names(reason, "1,000 items", "99%", "may lose 0.4 points")
        [width] = re.findall(r"interval of ([0-9.]+) points", reason)
        assert float(width) == pytest.approx(6.7 if share_changed else 0.6, abs=0.5)
    # Who may lose half needs to know less.
    assert reason_against_accuracy(workspace, results, demanded_share=0.5) == ""


@pytest.mark.slow
def test_seeds_have_curves_paired_errors_and_runs(workspace, sweep, sample_evaluations):
    results: list[Trial] = []
    for result in sweep.results:
        if result.role != "trial":
            results.append(result)
            continue
        for seed in (0, 1):
            folder = workspace.trials / f"{result.key}-{seed}"
            shutil.copytree(workspace.trials / result.key, folder)
            changes = {
                "key": folder.name,
                "label": f"{result.label}, seed {seed}",
                "seed": seed,
                "group": result.label,
                "checkpoint": str(folder / "step_00000020"),
            }
            results.append(result.model_copy(update=changes))
    evaluations = {r.key: sample_evaluations[r.key.partition("-")[0]] for r in results}
    seeded = changed(sweep, results=with_items(workspace, results, evaluations))
    teacher, trial = sweep.results[:2]  # A pruned teacher was only measured.
    pruned = trial.model_copy(update={"checkpoint": teacher.checkpoint})
    with_pruned_teacher = changed(sweep, results=(teacher, pruned))
    assert [with_pruned_teacher.journal_of(member) is None for member in (teacher, pruned)] == [
        False,
        True,
    ]
    alone, several = (write_sweep_report(workspace, member).curves for member in (sweep, seeded))
    assert list(several) == list(alone)
    title = "Validation loss while training"
    names = [f"{name}, seed {seed}" for name, _ in alone[title] for seed in (0, 1)]
    assert [name for name, _ in several[title]] == names

    front, notes = sweep_front(workspace, [seeded], FrontAxes())
    assert not notes
    for run in mlflow_runs_of_results(seeded, front):
        assert "paired/confidence_keeps_99" in {name for name, _, _ in run.points}
    tracked = [r.model_copy(update={"run_id": f"run of {r.key}"}) for r in seeded.results]
    front = front.with_runs(tracked)
    rows = model_rows(front)
    assert len(rows) == 12
    for row in rows:
        assert row["paired/confidence_keeps_99"] is not None
        assert Path(row["checkpoint"]).parent.name == row["run_id"].removeprefix("run of ")
    assert "seeds" in confidence_note(front)[0]
    stored, _ = sweep_front(workspace, [changed(seeded, results=tuple(tracked))], FrontAxes())
    assert {model.trial.run_id for model in stored.placed} == {row["run_id"] for row in rows}


def num_points(workspace: Workspace) -> int:
    with closing(sqlite3.connect(workspace.root / "mlflow.db")) as database:
        return int(database.execute("SELECT count(*) FROM metrics").fetchone()[0])


@pytest.mark.slow
def test_mlflow_holds_the_sweep_once(workspace, sweep, sample_evaluations):
    sweep = changed(sweep, results=with_items(workspace, sweep.results, sample_evaluations))
    tracking = open_tracking(workspace, warn=pytest.fail)
    axes = FrontAxes()  # Accuracy, of which each item is known.
    written = write_sweep_report(workspace, sweep, axes=axes, tracking=lambda: tracking)
    points = num_points(workspace)
    # What MLflow shows already is not shown again, so the store is not opened.
    write_sweep_report(workspace, "toy", axes=axes, tracking=pytest.fail)
    (written.folder / "front.csv").write_text("changed", encoding="utf-8")
    write_sweep_report(workspace, "toy", axes=axes, tracking=lambda: tracking)
    assert num_points(workspace) == points > 300
    client = MlflowClient(tracking_uri=workspace.tracking_uri)
    experiment = str(tracking.open_experiment())
    [parent] = client.search_runs([experiment], "tags.`iiet.kind` = 'sweep'")
    run_id = parent.info.run_id
    nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert len(nested) == 12
    assert {run.data.tags["iiet.kind"] for run in nested} == {"baseline", "teacher", "trial"}
    knee = next(run for run in nested if run.data.params.get("schedule") == "0,1,1,1,1,1")
    assert knee.data.params["r_02"] == "1"
    assert knee.data.metrics["cost/evaluations"] == 11
    assert knee.data.metrics["quality/accuracy"] == pytest.approx(0.4437)
    assert 0 <= knee.data.metrics["paired/confidence_keeps_99"] < 1, "corrected, it may be 0"
    # Differences to others are rows of a table.
    paired_metrics = [n for n in knee.data.metrics if n.startswith("paired/")]
    assert sorted(paired_metrics) == sorted(SUMMARY_METRICS)
    assert "quality/accuracy_stderr" in knee.data.metrics
    assert not any(n.endswith("_stderr") and n.count("/") > 1 for n in knee.data.metrics)
    path = client.download_artifacts(run_id, "front/intervals.json", str(workspace.root))
    table = json.loads(Path(path).read_text("utf-8"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    identity = ("0,1,1,1,1,1", "teacher", "quality/accuracy")
    [row] = [r for r in rows if (r["model"], r["against"], r["measured"]) == identity]
    assert row["difference"] == pytest.approx(-0.003)
    assert row["low"] < row["difference"] < row["high"]
    losses = client.get_metric_history(knee.info.run_id, "train/loss")
    assert sorted({point.step for point in losses}) == [10, 20]

    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["front/best_quality"] == pytest.approx(0.447, abs=1e-4)
    note = parent.data.tags["mlflow.note.content"]
    assert f"front/front.svg&run_uuid={run_id}" in note
    assert "**0,1,1,1,1,1**" in note
    assert_names(note, "0,1,1,1,1,1 keeps 99.4%", "46%")
    artifacts = {file.path for file in client.list_artifacts(run_id, "front")}
    assert artifacts == {f"front/{name}" for name in {*FILES, "intervals.json"}}

    view = client.get_experiment(experiment).tags["mlflow.sharedViewState.front-toy"]
    state = json.loads(json.loads(view)["state"])
    assert len(client.search_runs([experiment], state["searchFilter"])) == 12
    parallel = next(c for c in state["compareRunCharts"] if c["type"] == "PARALLEL")
    assert parallel["selectedParams"] == [f"r_{layer:02d}" for layer in range(1, 7)]
    stored = load_sweep_results(workspace, "toy")
    assert {result.run_id for result in stored.results} == {run.info.run_id for run in nested}


@pytest.mark.slow
def test_a_sweep_without_measured_results_has_a_report(workspace, sweep):
    """No trial has a quality at first; then the baselines alone have one."""
    bare = []
    for result in sweep.results:
        numbers = {n: v for n, v in result.numbers.items() if n[:8] != "quality/"}
        bare.append(result.model_copy(update={"numbers": numbers}))
    written = write_sweep_report(workspace, changed(sweep, results=tuple(bare)))
    assert written.page is None
    front = written.front
    long_sentences = ["x" * 200] * 40
    note = run_note(front, long_sentences, ["front"])  # A long note refers to the artifacts.
    assert len(note) <= 8000
    assert "`front/front.html`" in note
    many = [t.model_copy(update={"key": f"{t.key}{n}"}) for n in range(12) for t in sweep.results]
    note = run_note(sample_front(many), [], ["front"])
    assert len(note) <= 8000
    assert "front/front.csv" in note
    assert "No trial" in written.sentences[0]
    pairs = zip(sweep.results, bare, strict=True)
    placed = tuple(full if full.role == "baseline" else less for full, less in pairs)
    assert {result.role for result in placed} > {"baseline"}
    written = write_sweep_report(workspace, changed(sweep, results=placed))
    assert not written.front.members
    assert (written.folder / "front.json").is_file()


def test_a_sweep_without_a_report_says_how_far_it_is(tmp_path, sample_results):
    space = open_workspace(tmp_path)
    with pytest.raises(UserError, match="has no finished sweep; `iiet-orch sweep-threshold`"):
        newest_sweep(space)
    trials = [
        result.model_copy(update={"folder": str(space.trials / result.key)})
        for result in sample_results[:3]
    ]
    plan = SweepTrials(
        key="k", name="begun", kind="threshold", tokens_folder="", trials=tuple(trials),
        num_requested=3, num_distinct=3, teacher=None,
    )  # fmt: skip
    plan.write(space.sweeps / "begun" / PLAN_FILE)
    trials[0].write(trials[0].result_path)
    with pytest.raises(UserError, match=r"begun has no report .* 1 of 3 trials have ended"):
        newest_sweep(space)
    with pytest.raises(UserError, match=r"begun has no report .* 1 of 3 trials have ended"):
        load_sweep_results(space, "begun")


@pytest.mark.slow
def test_missing_sweeps_are_user_errors_and_a_copy_is_its_own_sweep(workspace, sweep):
    with refused(UserError, "'tyo'", "sweep-threshold"):
        write_sweep_report(workspace, "tyo")
    write_sweep_report(workspace, sweep)
    with pytest.raises(UserError, match="there are: toy"):
        write_sweep_report(workspace, "toy", "tyo")
    (workspace.sweeps / "begun").mkdir()
    with refused(UserError, "begun", "no trial is planned yet"):
        write_sweep_report(workspace, "begun")
    stored = workspace.sweeps / "toy" / RESULTS_FILE
    before = stored.read_bytes()
    sweep.model_copy(update={"facts": {}}).write(workspace.sweeps / "copy" / RESULTS_FILE)
    assert write_sweep_report(workspace, "copy").folder == workspace.sweeps / "copy"
    assert stored.read_bytes() == before


def test_a_name_cannot_lead_out_of_the_sweeps_folder(workspace, sweep, tmp_path):
    sweep.write(tmp_path / "outside" / RESULTS_FILE)
    sweep.store(workspace)
    before = sorted(tmp_path.rglob("*"))
    for name in ("../../outside", "../ws/sweeps/toy", "/tmp/outside", "..", ""):
        # From the command line, and from a file in a shared workspace.
        with refused(UserError, "name"):
            write_sweep_report(workspace, name)
        for part in ("name", "key"):
            renamed = sweep.model_copy(update={part: name})
            renamed.write(workspace.sweeps / "toy" / RESULTS_FILE)
            with refused(UserError, "results.json", part):
                write_sweep_report(workspace, "toy")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_several_sweeps_share_a_front_and_are_distinguished(workspace, sample_results):
    """Both sweeps share the teacher and the baselines; the trials of the second are better."""
    trials = [result for result in sample_results if result.role == "trial"]
    shared = [result for result in sample_results if result.role != "trial"]
    better = [
        t.model_copy(update={"key": f"b{t.key}"}).with_numbers(
            "quality", {"accuracy": t.numbers["quality/accuracy"] + 0.01}
        )
        for t in trials[::2]
    ]

    def store(name: str, own_trials: list[Trial], suite: str = "heldout-1") -> None:
        measured = Suite(suite=suite, tokens_folder=name)
        results = tuple(r.model_copy(update={"suite": measured}) for r in (*shared, *own_trials))
        StoredSweep(name=name, key=name, results=results, facts={"Settings": {"n": name}}).store(
            workspace
        )

    store("first", trials)
    store("second", better)
    written = write_sweep_report(workspace, "first", "second", "first")
    assert written.folder == workspace.overlays / "first+second"
    assert {path.suffix for path in written.files} >= {".png", ".html", ".csv", ".json"}
    front = written.front
    assert len(front.placed) == 3 + 9 + 5
    # A trial of the first sweep stays where the second one has none as cheap.
    assert {6.0, 10.0} <= {row.cost for row in front.members if row.sweep == "second"}
    assert "first" in {row.sweep for row in front.members}
    assert not any("measured" in sentence for sentence in written.sentences), "no notes"
    assert written.facts["Settings: second"] == {"n": "second"}
    rows = json.loads((written.folder / "front.json").read_text("utf-8"))["results"]
    assert sum(row["role"] == "teacher" for row in rows) == 1
    # Only names that two sweeps share include the sweep.
    text = " ".join(written.sentences)
    assert "vanilla against" in text
    assert "0,1,1,1,0,1 (second)" in text

    written = write_sweep_report(workspace, "first", "second", axes=parse_axes("ms", "bits"))
    assert written.folder.name == "first+second-bits-ms"
    assert "each sweep" in written.sentences[1]
    store("second", better, "heldout-2")
    written = write_sweep_report(workspace, "first", "second")
    note = "not measured on the same tasks and texts (suite heldout-1 / heldout-2)"
    assert note in written.sentences[1]
