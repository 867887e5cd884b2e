"""The losses of models against the source of their sweep's teacher, never against the teacher: in
the table, in JSON, and where a model is picked."""

from __future__ import annotations

import json
import math
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import numpy as np
import pytest
from refusals import refused
from rich.console import Console
from sample_trials import sample_trial, with_items
from stored_texts import assert_as_stored

from orchestrator.cli import main
from orchestrator.pipelines.models import plan_pick
from orchestrator.records.evaluation import BITS_METRIC, EvaluationResult, TaskResult
from orchestrator.records.trial import Role, Trial
from orchestrator.reporting.front import Front, FrontAxes, retention_reference, sweep_front
from orchestrator.reporting.results import StoredSweep
from orchestrator.reporting.retention import Loss, loss_text
from orchestrator.reporting.statistics import Interval, pair_scores
from orchestrator.reporting.tables import front_values, model_rows, models_table
from orchestrator.settings.evaluation import PYTHON_BITS_TASK
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace

NUM_ITEMS = 200
RETENTION = {"questions": 2.0, "bits_per_byte": 0.02}


def right_of(name: str, share: float) -> TaskResult:
    """Return a task of which a model answers this share right: the first items."""
    values = [float(number < share * NUM_ITEMS) for number in range(NUM_ITEMS)]
    return TaskResult(
        name=name, version="1", num_items=NUM_ITEMS, metrics={"acc": float(np.mean(values))},
        items=[f"{name}-{number}" for number in range(NUM_ITEMS)], values={"acc": values},
    )  # fmt: skip


def bits_of(bits: float, name: str = PYTHON_BITS_TASK) -> TaskResult:
    """Return a task of this many bits per byte, a little more on every second item."""
    pairs = [
        [-(bits + 0.001 * bits * (-1) ** number) * math.log(2) * 100, 100.0] for number in range(40)
    ]
    return TaskResult(
        name=name, version="1", num_items=40, metrics={BITS_METRIC: bits},
        items=[f"passage-{number}" for number in range(40)], values={BITS_METRIC: pairs},
    )  # fmt: skip


def evaluation(hops: float, questions: float, bits: float) -> EvaluationResult:
    """Return a model's answers: to its own task, and to two tasks that it should not forget."""
    tasks = [right_of("hops", hops), right_of("questions", questions), bits_of(bits)]
    other_tasks = ("questions", PYTHON_BITS_TASK)
    return EvaluationResult(results={task.name: task for task in tasks}, unaveraged=other_tasks)


MODELS: dict[str, tuple[Role, int, EvaluationResult]] = {
    "source": ("source", 2, evaluation(0.5, 0.80, 1.000)),
    # The teacher has forgotten; its students have not forgotten more.
    "teacher": ("teacher", 6, evaluation(0.9, 0.60, 1.100)),
    "2,1": ("trial", 5, evaluation(0.9, 0.60, 1.100)),
    "1,1": ("trial", 4, evaluation(0.8, 0.79, 1.015)),
    "0,1": ("trial", 3, evaluation(0.7, 0.85, 1.050)),
}


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    """A workspace with a sweep, `kept`, whose teacher has a source."""
    space = open_workspace(tmp_path)
    trials = [
        sample_trial(
            key=label.replace(",", "-"), label=label, role=role, schedule=(2, 2),
            cost={"evaluations": nfe}, quality={"accuracy": evaluated.accuracy},
        )
        for label, (role, nfe, evaluated) in MODELS.items()
    ]  # fmt: skip
    items = {label.replace(",", "-"): evaluated for label, (*_, evaluated) in MODELS.items()}
    stored = with_items(space, trials, items)
    # The averages do not have the tasks beside, and a stored evaluation says so.
    stored = [trial.model_copy(update={"evaluation": _with_unaveraged(trial)}) for trial in stored]
    StoredSweep(name="kept", key="k", results=tuple(stored), retention=RETENTION).store(space)
    return space


def _with_unaveraged(trial: Trial) -> Any:
    assert trial.evaluation is not None
    return trial.evaluation.model_copy(update={"unaveraged": ("questions", PYTHON_BITS_TASK)})


def front_of(workspace: Workspace) -> tuple[Front, list[str]]:
    sweep = StoredSweep.read(workspace.sweeps / "kept" / "results.json")
    assert sweep is not None
    return sweep_front(workspace, [sweep], FrontAxes())


def test_unaveraged_tasks_are_in_no_average():
    evaluated = evaluation(0.5, 0.8, 1.0)
    assert evaluated.accuracy == 0.5
    assert evaluated.num_accuracy_items == NUM_ITEMS
    quality = evaluated.quality()
    assert quality["accuracy"] == 0.5
    assert BITS_METRIC not in quality
    assert quality["questions/acc"] == 0.8
    paired = pair_scores({"a": [evaluated], "b": [evaluation(0.4, 0.1, 2.0)]})
    assert paired is not None
    scores = paired.quality("quality/accuracy")
    assert scores is not None
    assert scores.observed == pytest.approx([0.5, 0.4])
    assert paired.quality("quality/bits_per_byte") is None


def test_a_model_is_compared_with_the_source_and_not_with_its_teacher(workspace):
    front, _ = front_of(workspace)
    lost = {
        row.label: {loss.task: loss for loss in front.losses.get(row.key, ())}
        for row in front.placed
    }
    assert lost["source"] == {}
    for label, expected in {
        "teacher": (20.0, 0.100), "2,1": (20.0, 0.100), "1,1": (1.0, 0.015), "0,1": (-5.0, 0.050),
    }.items():  # fmt: skip
        points = lost[label]["questions"]
        bits = lost[label][PYTHON_BITS_TASK]
        assert (points.lost.value, bits.lost.value) == pytest.approx(expected), label
        for loss in (points, bits):
            assert loss.lost.low <= loss.lost.value <= loss.lost.high
    is_kept = {
        label: all(loss.is_within_bound for loss in of.values()) for label, of in lost.items()
    }
    assert is_kept == {"source": True, "teacher": False, "2,1": False, "1,1": True, "0,1": False}


def test_the_report_reads_as_stored(workspace, tmp_path):
    front, notes = front_of(workspace)
    table = models_table(front)
    # Where there is no room for numbers, the verdict stays.
    console = Console(width=80, record=True, file=StringIO())
    console.print(table)
    json_text = json.dumps(front_values(front)["retention"], allow_nan=False)
    parts = {
        "notes": notes,
        "Markdown": table.to_markdown().splitlines(),
        "80 columns": console.export_text().splitlines(),
        "rows": [f"{row['name']}: {row['retention']}" for row in model_rows(front)],
        "JSON": [
            f"{key}: {entry['task']}, lost {entry['lost']:.4g}, kept {entry['kept']}"
            for key, entries in json.loads(json_text).items()
            for entry in entries
        ],
    }
    assert_as_stored("retention.txt", parts, tmp_path)


@pytest.mark.slow
def test_a_pick_that_has_lost_too_much_is_refused_unless_it_is_allowed(workspace):
    def picked(**options: Any) -> Any:
        return plan_pick("kept", workspace=workspace, **options)

    words = ["pick", "kept", "--cheapest", "--dry-run", "--workspace", str(workspace.root)]
    with redirect_stderr(StringIO()) as printed:
        assert main(words) == 2
    assert "--allow-loss" in printed.getvalue()
    assert "Python's text" in " ".join(printed.getvalue().split())
    assert main([*words, "--allow-loss"]) == 0
    allowed = picked(cheapest=True, allow_loss=True)
    assert allowed.name == "0,1"
    assert "loses 0.050" in allowed.sentence
    assert picked(budget=4.0).name == "1,1"
    assert "loses" not in picked(budget=4.0).sentence


def test_what_is_not_known_is_said_and_not_picked(workspace):
    sweep = StoredSweep.read(workspace.sweeps / "kept" / "results.json")
    assert sweep is not None
    without = tuple(trial for trial in sweep.results if trial.role != "source")
    sweep.model_copy(update={"results": without}).store(workspace)
    front, notes = front_of(workspace)
    assert front.losses == {}
    assert retention_reference(front) is None, "a teacher of corrections is none"
    assert any("bits_per_byte" in note and "not known" in note for note in notes)
    with pytest.raises(UserError, match="--allow-loss"):
        plan_pick("kept", workspace=workspace, best=True)
    assert plan_pick("kept", workspace=workspace, best=True, allow_loss=True)
    # Without bounds there is nothing to know.
    sweep.model_copy(update={"results": without, "retention": {}}).store(workspace)
    assert plan_pick("kept", workspace=workspace, best=True)


def test_students_of_a_plain_teacher_are_compared_with_it(workspace):
    sweep = StoredSweep.read(workspace.sweeps / "kept" / "results.json")
    assert sweep is not None
    plain = sample_trial(method="vanilla").model
    results = tuple(
        trial.model_copy(update={"model": plain}) if trial.role == "teacher" else trial
        for trial in sweep.results
        if trial.role != "source"
    )
    sweep.model_copy(update={"results": results, "retention": {"hops": 15.0}}).store(workspace)
    front, notes = front_of(workspace)
    assert any("against the teacher" in note and "15 points of hops" in note for note in notes)
    lost = {key: loss.lost.value for key, [loss] in front.losses.items()}
    assert lost == pytest.approx({"2-1": 0.0, "1-1": 10.0, "0-1": 20.0})
    assert "lost against teacher" in models_table(front).to_markdown()
    with refused(UserError, "0,1", "against the teacher", "evaluation.retention", "--allow-loss"):
        plan_pick("kept", workspace=workspace, cheapest=True)
    allowed = plan_pick("kept", workspace=workspace, cheapest=True, allow_loss=True)
    assert allowed.sentence.endswith("against the teacher")
    assert plan_pick("kept", workspace=workspace, budget=4.0).name == "1,1"


def test_a_loss_that_is_the_bound_is_kept():
    def loss(value: float, bound: float) -> Loss:
        lost = Interval(value, value - 1, value + 1)
        return Loss(task="questions", lost=lost, bound=bound, is_bits=False)

    assert loss(100 * (0.80 - 0.79), 1.0).is_within_bound
    assert not loss(1.01, 1.0).is_within_bound
    assert loss_text([]) == ""
    assert loss_text([loss(0.0, 1.0), loss(0.9, 1.0)]).startswith("kept: 0.9 ")
