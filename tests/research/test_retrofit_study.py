"""The study of retrofits: equal FLOPs, the rules on made-up results, and a run at toy size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import retrofit_study
from retrofit_results import PAGE, Difference, Readings, filled
from retrofit_study import (
    CONTINUED,
    DEPTH_ARMS,
    RESULTS,
    SCRATCH_WITH_SOURCE,
    SEEDS,
    STUDENT_OF,
    Cell,
    Measured,
    Study,
    Training,
    config_of,
    source_of,
)

from iiet import IterationSchedule, ModelConfig
from iiet.cost import training_flops_per_token
from iiet.model.facts import ImplicitEulerOptions
from orchestrator import read_settings

CELL = Cell(task="phop_4", num_layers=2, seed=0)


def result(training: Training, accuracy: float, **changes: float) -> Measured:
    values = {"evaluations": 8, "selection_loss": 1 - accuracy, "loss": 1 - accuracy, **changes}
    return Measured(
        training=training, num_steps=1, training_flops=1.0, accuracy=accuracy, bits_per_byte=None,
        seconds=1.0, **values,
    )  # fmt: skip


def arm(name: str, rate: float, seed: int = 0, schedule: str = "") -> Training:
    return Training(task=CELL.task, num_layers=2, seed=seed, arm=name, rate=rate, schedule=schedule)


@pytest.fixture
def study(tmp_path) -> Study:
    return Study(tmp_path, tmp_path / "results.json")


def test_the_arms_have_equal_flops(study):
    plain = study.config(CELL)

    def flops(name: str) -> float:
        steps = study.num_steps(arm(name, 2e-3))
        return float(steps * training_flops_per_token(config_of(name, plain, 3)))

    of_source = study.num_steps(source_of(CELL)) * training_flops_per_token(plain)
    for name in DEPTH_ARMS:
        expected = flops("mean") + (of_source if name == SCRATCH_WITH_SOURCE else 0)
        assert flops(name) == pytest.approx(expected, rel=2e-3)


def test_a_retrofit_pays_only_where_all_seeds_say_so():
    for values, pays, keeps in (
        ((16.0, 14.0, 15.0), "pays", "keeps"),
        ((0.6, 0.5, 0.4), "does not pay", "keeps"),  # Something, but too little.
        ((20.0, 0.0, 18.0), "not decided", "not decided"),
        ((-5.0, -5.1, -4.9), "does not pay", "loses"),
        ((16.0, 14.0), "", ""),
    ):
        difference = Difference(values=values)
        assert difference.verdict(1.0) == pays
        assert difference.kept(1.0) == keeps
    assert Difference(values=(1.0, 2.0, 3.0)).text(1) == "+2.0 (-0.5 to +4.5)"
    assert Difference(values=(1.0, 2.0)).text(1) == "+1.5 (2 of 3 seeds)"


def test_the_rate_with_the_lower_loss_over_the_seeds_that_have_both_counts(study):
    for training, accuracy in (
        (arm("mean", 2e-3), 0.8),
        (arm("mean", 4e-3), 0.9),
        (arm("mean", 4e-3, seed=1), 0.2),
    ):
        study.store(result(training, accuracy))
    assert study.chosen_rate(CELL, "mean") == 4e-3
    study.store(result(arm("mean", 2e-3, seed=1), 0.8))
    assert study.chosen_rate(CELL, "mean") == 2e-3
    assert Study(study.folder, study.results_file).measured == study.measured
    other_file = study.folder / "other.json"
    arguments = ["--folder", str(study.folder), "--results", str(other_file), "--add"]
    assert retrofit_study.main([*arguments, str(study.results_file)]) == 0
    assert Study(study.folder, other_file).measured == study.measured


def test_a_run_can_be_restricted_to_tasks_of_some_hops(study, capsys):
    file = str(study.results_file)
    options = ["--results", file, "--piece", "depth-4", "--hops", "6", "--dry-run"]
    assert retrofit_study.main(options) == 0
    assert "next: phop_6, 4 layers, seed 0, source" in capsys.readouterr().out
    cells = {training.cell for training in study.trainings("depth-4", [6, 4])}
    assert {cell.task for cell in cells} == {"phop_6", "phop_4"}


def test_tables_show_what_is_stored_and_which_student_fits_a_share(study):
    for seed in SEEDS:
        for rate in CELL.recipe.rates:
            study.store(result(arm(CONTINUED, rate, seed), 0.8 + 0.001 * seed))
            study.store(result(arm("mean", rate, seed), 0.95))
        for schedule, evaluations in (("2,1", 5), ("0,1", 3)):
            student = arm(STUDENT_OF + "mean", 1e-3, seed, schedule)
            study.store(result(student, 0.949, evaluations=evaluations))
    readings = Readings(study, CELL.task, 2)
    assert [r.training.schedule for r in readings.students("mean", 0.75).values()] == ["2,1"] * 3
    assert [r.evaluations for r in readings.students("mean", 0.5).values()] == [3] * 3
    page = filled(PAGE.read_text("utf-8"), study)
    line = "80.0, 80.1, 80.2 (**80.1**)"
    assert line in page
    assert "| +14.9 (+14.7 to +15.1) | pays |" in page
    assert "| -0.1 (-0.1 to -0.1) | keeps |" in page


def test_the_page_is_made_from_the_stored_results():
    text = PAGE.read_text("utf-8")
    assert filled(text, Study(Path("unused"), RESULTS)) == text, (
        "python research/retrofit_results.py"
    )


def test_the_pilot_trains_as_many_flops_in_both_arms():
    settings = read_settings(PAGE.with_name("retrofit_pilot.yaml"))
    (task,) = settings.data.tasks.tasks
    assert settings.data.has_words
    assert task == "lookup_4"
    plain = ModelConfig(
        method="vanilla", vocab_size=49_152, dim=576, num_layers=30, num_heads=9, num_kv_heads=3,
        ffn_dim=1536, context_length=8192,
    )  # fmt: skip
    options = ImplicitEulerOptions(**settings.model.method_options)
    schedule = IterationSchedule.parse("0*12,2*6,0*12", num_layers=30)
    corrected = replace(plain, method="iiet", schedule=schedule, method_options=options)
    length = settings.training.sequence_length
    layers = tuple(range(13, 19))
    per_token = training_flops_per_token(plain, context_length=length, trained=layers)
    in_arm = training_flops_per_token(corrected, context_length=length, trained="corrected")
    steps = settings.training.num_steps * in_arm / per_token
    assert f"--name plain --steps {math.ceil(steps)} " in PAGE.read_text("utf-8")


@pytest.mark.long
def test_the_study_resumes_and_makes_students(tmp_path, capsys):
    file = tmp_path / "results.json"
    arguments = ["--folder", str(tmp_path), "--results", str(file), "--steps-factor", "0.002"]
    assert retrofit_study.main([*arguments, "--piece", "depth-2", "--seconds", "0"]) == 0
    assert not file.exists()
    assert retrofit_study.main([*arguments, "--dry-run"]) == 0
    assert "depth-2: 0 stored, next: phop_5, 2 layers, seed 0, source" in capsys.readouterr().out
    study = Study(tmp_path, file, 0.002)
    for training in islice(study.trainings("depth-2"), 4):
        study.store(study.make(training))
    assert [t.arm for t in study.measured] == ["source", CONTINUED, CONTINUED, "mean"]
    resumed = Study(tmp_path, file, 0.002)
    students = resumed.trainings("students-2")
    first_student = next(students)
    assert first_student.arm == STUDENT_OF + "mean"
    resumed.store(resumed.make(first_student))
    stored = json.loads(file.read_text())["trainings"]
    assert len(stored) == len(study.measured) + 1
    assert stored[-1]["evaluations"] <= 6
