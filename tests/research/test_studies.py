"""Each study prints its plan, and runs at toy size from its first training to its page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import bf16_study
import depth_study
import elastic_study
import gates_study
import iiad_study
import numpy as np
import pytest
from depth_rules import Choices
from sample_trials import sample_front, sample_trial
from small_size import SMALL

from orchestrator import Trial, read_settings
from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.reporting.front import with_confidence

DEPTH = [
    "model.dim=16", "model.num_heads=2", "model.ffn_dim=32", "training.num_steps=4",
    "training.num_tokens_per_step=320", "training.warmup_steps=1",
    "training.num_validation_tokens=800", "evaluation.num_items=8",
    "sweep.learning_rates={iiet: 1.0e-3, vanilla: [1.0e-3, 2.0e-3]}",
]  # fmt: skip
IIAD = [
    *SMALL, "sweep.iterations=[0, 1]", "sweep.learning_rates={vanilla: [2.0e-3, 4.0e-3]}",
    "sweep.methods=[vanilla, iiet]", "sweep.num_schedules=2",
    "training.iterate_from_fraction=0.5", "model.num_layers=2",
]  # fmt: skip


def right_answers(share: float) -> EvaluationResult:
    is_right = (np.arange(200) < 200 * share).astype(float)
    result = TaskResult(
        name="task",
        version="1",
        num_items=200,
        num_fewshot=0,
        metrics={"acc": float(is_right.mean())},
        items=[f"item {number}" for number in range(200)],
        values={"acc": is_right.tolist()},
    )
    return EvaluationResult(results={"task": result})


@pytest.fixture
def run(tmp_path) -> Callable[..., int]:
    """Run a study's command in a workspace of the test, with changed settings."""

    def study(module: ModuleType, changes: list[str], *arguments: str) -> int:
        settings = [part for change in changes for part in ("--set", change)]
        code: int = module.main(["--workspace", str(tmp_path / "ws"), *settings, *arguments])
        return code

    return study


@pytest.mark.slow
def test_the_plans_write_nothing(run, tmp_path, capsys):
    arms = ["--arms", "r = ?, 2 layers", "--seeds", "5", "6"]
    assert run(depth_study, DEPTH[:-1], "--dry-run", *arms) == 0
    assert "r = 3, 2 layers: 6 trainings" in capsys.readouterr().out
    assert run(iiad_study, SMALL, "--dry-run") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert ": cosine, relative, loss, cross entropy, pruned, knapsack" in printed
    assert run(elastic_study, [], "--dry-run", "--times", "1", "3") == 0
    assert "text: then elastic trainings of 60, 180 steps" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("study", "changes", "arguments", "words"),
    [
        (depth_study, [], ["--arms", "iiet"], "no arm has a name like 'iiet'"),
        (iiad_study, ["sweep.methods=[vanilla]"], [], "a study needs an IIET with corrections"),
        (iiad_study, [], ["--seeds", "2", "2"], "a seed is given twice"),
        (iiad_study, ["training.num_step=3"], [], "did you mean training.num_steps?"),
    ],
)
def test_mistakes_are_one_sentence(study, changes, arguments, words, run, capfd):
    assert run(study, changes, "--dry-run", *arguments) == 2
    assert words in " ".join(capfd.readouterr().err.split())


def test_the_stored_results_make_the_page_of_the_depth_study(tmp_path):
    path = Path(depth_study.__file__).with_suffix(".json")
    stored = depth_study.StudyResults.read(path)
    settings = read_settings(depth_study.SETTINGS)
    text = depth_study.study_markdown(stored, Choices(), settings, copied=0.518)
    assert "- does iteration pay in 'r = 3, 2 layers': yes; in 3 of 3 seeds" in text
    assert "| r = 1, 1 layer | 1 | 2 |" in text
    assert "0.94 (0.61 to 1.27)" in text, "phi in depth.md"
    chart = depth_study.accuracy_chart([*stored.arms.values()])
    chart.save(tmp_path / "accuracy.svg")
    assert "looped, r = 1" in (tmp_path / "accuracy.svg").read_text()


def test_the_elastic_study_compares_what_was_trained_both_ways(tmp_path):
    def trial(schedule: tuple[int, ...], accuracy: float, *, is_elastic: bool) -> Trial:
        return sample_trial(
            key=f"{schedule} {is_elastic}",
            schedule=schedule,
            is_elastic=is_elastic,
            cost={"evaluations": sum(schedule) + len(schedule)},
            quality={"accuracy": accuracy, "validation_loss": 5 - accuracy},
        )

    trials = [
        trial((2, 1), 0.8, is_elastic=True),
        trial((2, 1), 0.8, is_elastic=False),
        trial((0, 0), 0.8, is_elastic=True),
        trial((0, 0), 0.6, is_elastic=False),
        trial((1, 0), 0.7, is_elastic=True),
    ]
    items = {
        measured_trial.key: right_answers(measured_trial.numbers["quality/accuracy"])
        for measured_trial in trials
    }
    front = sample_front(trials)
    rows = elastic_study.compare_schedules(with_confidence(front, items))
    assert [row["schedule"] for row in rows] == [(2, 1), (0, 0)]
    same, better = (row["interval"] for row in rows)
    assert (same.value, same.low) == (0, -same.high)
    assert 0 < better.low < better.value == pytest.approx(0.2)
    reading = elastic_study.Reading(
        teacher="text", times=1, quality=front.axes.quality, rows=rows, longer=trials[0],
        flops=(6e9, 16e9),
    )  # fmt: skip
    table = elastic_study.comparison_table(reading)
    assert "| 0,0 | 2 | 80.0% | 60.0% | +20.0 (" in table
    (row, _) = elastic_study.compare_schedules(front)
    assert row["interval"] is None, "single items are missing"


@pytest.mark.long
def test_two_arms_of_the_depth_study(run, tmp_path, ray_session):
    arms = ["--seeds", "2", "3", "--arms", "vanilla, 2 layers", "r = 1, 2 layers"]
    assert run(depth_study, DEPTH, *arms) == 0
    folder = tmp_path / "ws" / "overlays" / "depth"
    runs = tmp_path / "ws" / "runs"
    text = (folder / "results.md").read_text()
    assert "| r = 1, 2 layers | 2 | 4 |" in text
    assert "'vanilla, 4 layers' is missing" in text
    assert (folder / "accuracy.png").stat().st_size > 5000
    num_runs = len([*runs.glob("*/done.json")])
    assert run(depth_study, DEPTH, *arms) == 0
    assert len([*runs.glob("*/done.json")]) == num_runs, "nothing is trained twice"


@pytest.mark.long
def test_all_phases_of_the_iiad_study(run, tmp_path, ray_session):
    assert run(iiad_study, IIAD, "--seeds", "0", "1") == 0
    space = tmp_path / "ws"
    text = (space / "overlays" / "study" / "results.md").read_text()
    for baseline in ("vanilla", "r = 0"):
        assert re.search(rf"r = 1 against {baseline} at equal tokens: loss \S+ ± ", text)
    assert "| NFE | cosine | relative | loss | cross entropy | pruned | knapsack |" in text
    # Two rates of vanilla and two more models; their second seeds; vanilla and r = 0 for longer.
    assert len([*(space / "runs").glob("*/done.json")]) == 4 + 3 + 2


@pytest.mark.long
def test_the_elastic_study_of_one_teacher(run, tmp_path, ray_session):
    changes = [
        "model.dim=16", "model.num_heads=2", "model.ffn_dim=32", "training.num_steps=4",
        "training.warmup_steps=1", "distillation.training.num_steps=3",
        "distillation.training.warmup_steps=1", "evaluation.num_items=8", "sweep.budgets=[2, 5]",
    ]  # fmt: skip
    arguments = ["--teachers", "depth", "--seeds", "0", "1", "--times", "1"]
    assert run(elastic_study, changes, *arguments) == 0
    folder = tmp_path / "ws" / "overlays" / "elastic-study"
    text = (folder / "results.md").read_text()
    assert "## depth, elastic training of 1 times a student's steps" in text
    assert "| share of the separate students' training FLOPs |" in text
    assert (folder / "trade-off.png").stat().st_size > 5000


@pytest.mark.long
def test_the_bf16_study_of_one_task(run, tmp_path):
    results = tmp_path / "bf16.json"
    changes = [
        "training.num_steps=4", "training.num_tokens_per_step=320", "training.warmup_steps=1",
        "evaluation.num_items=8",
    ]  # fmt: skip
    arguments = ["--tasks", "demo", "--seeds", "0", "--results", str(results)]
    assert run(bf16_study, changes, *arguments) == 0
    stored = json.loads(results.read_text())
    assert [(model["method"], model["precision"]) for model in stored["models"]] == [
        ("iiet", "fp32"), ("iiet", "bf16"), ("vanilla", "fp32"), ("vanilla", "bf16"),
    ]  # fmt: skip
    assert [verdict["method"] for verdict in stored["verdicts"]] == ["iiet", "vanilla"]


def test_bf16_holds_only_where_no_seed_loses_much():
    def models(*losses: float) -> list[bf16_study.TrainedModel]:
        return [
            bf16_study.TrainedModel(
                task="demo", method="iiet", seed=seed, precision=precision,
                accuracy=0.9 - lost * (precision == "bf16"), validation_loss=0.1,
            )
            for seed, lost in enumerate(losses)
            for precision in bf16_study.PRECISIONS
        ]  # fmt: skip

    for losses, holds in (
        ((0.005, 0.005, 0.005), True),  # Within a point on average.
        ((0.02, 0.02, 0.0), False),  # More than a point on average.
        ((0.04, -0.02, -0.02), False),  # One seed loses more than three points.
    ):
        (verdict,) = bf16_study.verdicts(models(*losses))
        assert verdict["holds"] is holds


@pytest.mark.long
def test_the_gates_study_resumes_and_chooses(tmp_path):
    results = tmp_path / "gates.json"
    arguments = ["--folder", str(tmp_path), "--results", str(results), "--seeds", "0"]
    arguments += ["--source-steps", "2", "--steps", "2"]
    assert gates_study.main([*arguments, "--at-most", "1"]) == 0
    assert json.loads(results.read_text())["chosen"] is None
    assert gates_study.main(arguments) == 0
    stored = json.loads(results.read_text())
    assert [model["kind"] for model in stored["models"]] == ["plain"] + 3 * ["scalar"] + 3 * [
        "vector"
    ]
    assert stored["chosen"]["learn_damping"] in gates_study.KINDS


def test_the_gates_study_takes_the_simplest_of_equal_choices():
    def models(**accuracies: tuple[float, ...]) -> list[gates_study.TrainedModel]:
        rows = [("plain", 1.0, 0.5)]
        for kind, values in accuracies.items():
            rows += zip(3 * [kind], gates_study.FACTORS, values, strict=True)
        return [
            gates_study.TrainedModel(kind=kind, factor=factor, seed=0, accuracy=accuracy)
            for kind, factor, accuracy in rows
        ]

    for scalar, vector, chosen in (
        ((0.80, 0.90, 0.90), (0.80, 0.905, 0.90), ("scalar", 10.0)),
        ((0.80, 0.90, 0.90), (0.80, 0.92, 0.93), ("vector", 10.0)),
        ((0.80, 0.90, 0.90), (0.80, 0.90, 0.93), ("vector", 30.0)),
    ):
        choice = gates_study.choose(models(scalar=scalar, vector=vector))
        assert tuple(choice.values()) == chosen
    assert gates_study.choose(models(scalar=(0.8, 0.9, 0.9))) is None
