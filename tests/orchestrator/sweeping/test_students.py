"""Students of a teacher: thresholds are labels, schedules are trials, keys say what is finished."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from refusals import refused

from iiet.iiad.pruning import InfluenceTable, ThresholdSchedule
from iiet.model.schedule import IterationSchedule
from orchestrator.models.folder import load_config
from orchestrator.records.evaluation import Suite
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import SweepTrials
from orchestrator.settings import DistillationSettings, SweepSettings, resolve_settings
from orchestrator.sweeping.plan_text import plan_sentences, sweep_parameters
from orchestrator.sweeping.retrofit import training_flops
from orchestrator.sweeping.states import trial_states
from orchestrator.sweeping.student_schedules import (
    StudentSchedule,
    choose_from_family,
)
from orchestrator.sweeping.students import (
    TEACHER_CONTINUED,
    Students,
    most_students,
)
from orchestrator.sweeping.trials import trials_of_students
from orchestrator.training.distilling import distillation_job, student_job, student_schedule
from orchestrator.training.job import finished_outcome
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import UserError

Make = Callable[..., Students]
Plan = Callable[..., SweepTrials]
SMALL = (
    "distillation.training.num_steps=3",
    "distillation.training.num_tokens_per_step=64",
    "distillation.training.num_validation_tokens=64",
)


@pytest.fixture
def plan(students, table) -> Plan:
    """A function that plans the teacher's sweep under settings, as `name=value` texts."""

    def make(*assignments: str, **suite: str) -> SweepTrials:
        return trials_of_students(replace(students(*assignments, **suite), influence=table))

    return make


# Schedules


@pytest.mark.parametrize(
    ("assignments", "most"),
    [
        (["sweep.num_schedules=3"], 3),
        (["sweep.num_schedules=9"], 4),  # A family of the teacher's three corrections.
        (["sweep.kind=search", "sweep.num_schedules=3", "search.num_trials=2"], 5),
        (["sweep.kind=search", "sweep.num_schedules=3", "search.num_trials=9"], 6),
    ],
)
def test_how_many_students_there_are_at_most(assignments, most, students):
    made = students(*assignments)
    teacher = load_config(made.teacher)
    assert teacher.corrections == (2, 1)
    search = resolve_settings({}, assignments).search
    assert most_students(made.sweep, search, teacher) == most


@pytest.mark.parametrize(
    ("assignments", "schedules"),
    [
        ([], ["2,1", "1,1", "1,0", "0,0"]),
        (["sweep.num_schedules=2"], ["2,1", "0,0"]),
        # A threshold keeps a correction of exactly its influence.
        (["sweep.thresholds=[0.3]"], ["1,1"]),
        (["sweep.thresholds=[0.11, 0.15, 0.2, 0.29, 0.45]"], ["1,1", "1,0"]),
        (["sweep.budgets=[2, 4.5]"], ["1,1", "0,0"]),
        (["sweep.selection=knapsack", "sweep.num_schedules=3"], ["2,1", "1,1", "0,0"]),
        (["sweep.selection=knapsack", "sweep.budgets=[3]"], ["1,0"]),
        (["sweep.selection=knapsack", "sweep.budgets=[2, 99, 4.5]"], ["2,1", "1,1", "0,0"]),
    ],
)
def test_schedules_by_number_threshold_budget_and_knapsack(assignments, schedules, table):
    members = choose_from_family(table, resolve_settings({}, assignments).sweep)
    assert [str(member.schedule) for member in members] == schedules


def test_a_knapsack_of_no_budgets_counts_as_schedules_are_spread():
    """At the cost of the second layer's correction, the first layer's three are worth more."""
    rows = ((0.3, 0.3, 0.3), (0.5,))
    table = InfluenceTable("cosine", rows, ((0.0, 0.0, 0.0), (0.0,)), 64)
    members = choose_from_family(
        table,
        resolve_settings({}, ["sweep.selection=knapsack"]).sweep,
        cost=lambda schedule: 1.0 + schedule[0] + 10.0 * schedule[1],
    )
    assert [str(member.schedule) for member in members] == ["3,1", "3,0", "0,0"]


@pytest.mark.parametrize("rows", [((0.0, 0.0), (0.0,)), ((0.3, 0.3), (0.3,)), ((0.0,), ())])
def test_corrections_of_equal_influence_are_refused(rows):
    equal = InfluenceTable("cosine", rows, rows, 64)
    with pytest.raises(UserError, match="gate_rate_factor"):
        choose_from_family(equal, resolve_settings({}, []).sweep)


# Keys, folders and labels


def test_a_trial_is_its_schedule_and_a_threshold_its_label(plan):
    usual = plan()
    assert [t.role for t in usual.trials] == ["teacher", *["trial"] * 4]
    assert len({t.key for t in usual.trials}) == 5
    of_two = plan("sweep.num_schedules=2")
    assert {t.key for t in of_two.trials} < {t.key for t in usual.trials}, "of another sweep"
    assert of_two.key != usual.key
    explicit = plan("sweep.thresholds=[0.11, 0.15, 0.2, 0.29, 0.45]")
    assert explicit.num_requested == 5
    bounds = [(t.threshold_above, t.threshold_up_to) for t in explicit.trials[1:]]
    assert bounds == [(0.1, 0.3), (0.3, 0.5)]
    trial = usual.trials[1]
    assert trial.result() is None
    trial.model_copy(update={"role": "baseline", "label": "another"}).write(trial.result_path)
    result = trial.result()
    assert (result.role, result.label) == ("trial", trial.label), "under the names of this sweep"


def test_what_changes_the_weights_changes_the_folder_and_what_is_measured_the_key(plan):
    usual = plan()
    for change in ("kl_weight=0.5", "training.num_steps=7", "training.seed=1"):
        changed = plan(f"distillation.{change}")
        pairs = list(zip(usual.trials, changed.trials, strict=True))
        assert all(a.folder != b.folder and a.key != b.key for a, b in pairs[1:])
        assert pairs[0][0].key == pairs[0][1].key, "the teacher is measured as it is"
    changed = plan("distillation.training.checkpoint_every_steps=3")
    assert [t.key for t in usual.trials] == [t.key for t in changed.trials]
    changed = plan(suite="y")
    moved = plan(suite_folder="/b")
    for a, b, c in zip(usual.trials, changed.trials, moved.trials, strict=True):
        assert a.folder == b.folder == c.folder, "other tasks are put to the same weights"
        assert a.key != b.key
        assert a.key == c.key, "where files stand does not matter"


def test_controls_differ_in_what_they_train_and_pruned_ones_have_no_seeds(plan, teacher):
    schedule = IterationSchedule((1, 0))
    kinds = {}
    sections = set()
    for control in ("distill", "cross_entropy", "pruned", "scratch"):
        settings = DistillationSettings.model_validate({"control": control})
        job = student_job(settings, teacher=teacher, schedule=schedule, tokens_folder="t")
        if job:
            kinds[control] = job.objective, bool(job.teacher_folder), bool(job.initial_folder)
            sections.add(job.section)
    assert kinds == {
        "distill": ("distill", True, True),
        "cross_entropy": ("cross_entropy", False, True),
        "scratch": ("pretrain", False, False),
    }
    assert sections == {"distillation.training"}, "advice names the settings they are trained by"
    two_schedules = "sweep.num_schedules=2"
    seeded = plan("sweep.seeds=[0, 1]", two_schedules).trials[1:]
    alone = plan(two_schedules).trials[1:]
    assert [(t.group, t.seed) for t in seeded] == [
        ("2,1", 0), ("0,0", 0), ("2,1", 1), ("0,0", 1)
    ]  # fmt: skip
    assert len({t.key for t in seeded}) == 4
    # The recipe's own seed is 0: what a sweep without seeds has trained is found again.
    assert alone[0].key == seeded[0].key
    pruned = plan("sweep.seeds=[0, 1, 2]", two_schedules, "distillation.control=pruned").trials[1:]
    assert [(t.label, t.seed, t.job) for t in pruned] == [
        ("2,1, pruned", None, None), ("0,0, pruned", None, None)
    ]  # fmt: skip
    assert len({t.key for t in pruned}) == 2


def test_finished_weights_are_found_whatever_they_were_trained_for(students, space):
    assignments = [*SMALL, "distillation.control=scratch"]
    student = StudentSchedule(ThresholdSchedule(IterationSchedule((2, 1)), 0.0, 1.0))
    usual = students(*assignments).student(student)
    assert Path(usual.folder).parent == space.trials
    run_job(usual.job.model_copy(update={"run_folder": str(space.runs / "mine")}))
    found = students(*assignments).student(student)
    assert (found.key, found.folder) == (usual.key, str(space.runs / "mine"))
    assert finished_outcome(found.job), "nothing is left to train"
    # What was begun in its usual place goes on there.
    run_job(usual.job, should_stop=lambda: True)
    assert students(*assignments).student(student).folder == usual.folder


# A plain teacher


@pytest.fixture
def plain_plan(save_tiny, space, tiny_tokens, tmp_path) -> Plan:
    """A function that plans the sweep of a plain teacher of four layers under settings."""
    teacher = save_tiny(tmp_path / "plain", method="vanilla", schedule=None, num_layers=4)
    suite = Suite(suite="x", tokens_folder=str(tiny_tokens))
    rows = ((),) * 4
    table = InfluenceTable("loss", rows, rows, 64, layer_values=(4.0, 1.0, 2.0, 3.0))

    def make(*assignments: str) -> SweepTrials:
        settings = resolve_settings({}, [*SMALL, *assignments])
        return trials_of_students(
            Students(settings.sweep, settings.distillation, space, teacher, suite, table)
        )

    return make


def test_a_plain_teacher_is_trained_further_with_the_flops_of_its_costliest_student(plain_plan):
    _, *students, continued = plain_plan("distillation.training.num_steps=50").trials
    assert (continued.role, continued.label) == ("baseline", TEACHER_CONTINUED)
    assert continued.model.num_layers == 4
    flops = [training_flops(trial.job) for trial in students]
    assert len(flops) == 2
    assert max(flops) <= training_flops(continued.job) < max(flops) * 1.03 > min(flops) * 1.1


def test_pruned_students_differ_by_the_layers_that_they_keep(plain_plan):
    own = ["x,0,0,0", "0,0,0,x"]
    teacher, *pruned = plain_plan(
        "distillation.control=pruned", "sweep.num_schedules=0", f"sweep.schedules={own}"
    ).trials
    assert {trial.opened_schedule for trial in pruned} == set(own)
    assert {trial.checkpoint for trial in pruned} == {teacher.checkpoint}
    assert [trial.model.num_layers for trial in pruned] == [3, 3]
    assert len({trial.key for trial in (teacher, *pruned)}) == 3
    assert len({trial.folder for trial in (teacher, *pruned)}) == 3


def test_a_plan_says_what_its_students_leave_out(plain_plan):
    own = ("sweep.leave_out_layers=1", "sweep.schedules=[uniform]")
    plain = plain_plan(*own)
    sentences = plan_sentences(plain, SweepSettings(), trial_states(plain, SweepSettings()))
    assert sentences[-1] == "thresholds: a layer whose influence is below is left out"
    params = sweep_parameters(plain, resolve_settings({}, own))
    expected = {"influence_metric": "loss", "leave_out_layers": "1", "schedules": "uniform"}
    assert expected.items() <= params.items()


# Elastic weights

ELASTIC = (*SMALL, "sweep.elastic=true")


def test_one_training_serves_all_schedules(plan, teacher):
    elastic = plan(*ELASTIC, "sweep.elastic_steps=5")
    assert [trial.label for trial in elastic.trials] == [
        "teacher", "2,1, elastic", "1,1, elastic", "1,0, elastic", "0,0, elastic",
    ]  # fmt: skip
    _, trained, *served = elastic.trials
    (job,) = [trial.job for trial in elastic.trials if trial.job]
    assert trained.job is job
    assert job.objective == "distill"
    assert job.teacher_folder == job.initial_folder == str(teacher)
    assert job.recipe.num_steps == 5
    assert job.recipe.elastic.schedules == ("1,1", "1,0", "0,0")
    assert {trial.checkpoint for trial in served} == {f"{trained.folder}/step_00000005"}
    assert len({trial.key for trial in elastic.trials}) == 5
    assert served[0].threshold_text == "0.1 to 0.3"
    assert elastic.num_distinct == 4
    # Another family, or other steps, give other weights.
    for change in ("sweep.thresholds=[0.2]", "sweep.elastic_steps=6"):
        assert plan(*ELASTIC, change).trials[1].key != trained.key

    seeded = plan(*ELASTIC, "sweep.seeds=[3, 4]")
    assert [t.label for t in seeded.trials[1::4]] == [
        "2,1, elastic, seed 3", "2,1, elastic, seed 4"
    ]  # fmt: skip
    assert {t.group for t in seeded.trials if t.schedule == (0, 0)} == {"0,0, elastic"}
    assert len({trial.folder for trial in seeded.trials if trial.job}) == 2
    assert seeded.num_distinct == 4

    with refused(UserError, "sweep.elastic"):
        plan(*ELASTIC, "sweep.thresholds=[0.01]")


def test_a_distilled_elastic_student_learns_from_its_teacher(space, teacher, tiny_tokens):
    def job(schedule: str, *changes: str) -> TrainingJob:
        family = "distillation.training.elastic.schedules=['1,0']"
        settings = resolve_settings({}, [*SMALL, family, *changes])
        student = student_schedule(schedule, load_config(teacher).corrections, "--schedule")
        return distillation_job(settings, space, teacher, student, tiny_tokens)

    distilled = job("2,1", "distillation.kl_weight=2")
    assert (distilled.objective, distilled.teacher_folder) == ("distill", str(teacher))
    assert distilled.distillation.kl_weight == 2.0
    with refused(UserError, "distillation.training.elastic.schedules"):
        job("0,1")
    # The control has no teacher, so the members learn from the full schedule.
    elastic_weight = "distillation.training.elastic.kl_weight=2"
    assert (
        job("2,1", "distillation.control=cross_entropy", elastic_weight).objective
        == "cross_entropy"
    )
    with refused(UserError, "elastic.kl_weight=2.0", "distillation.kl_weight"):
        job("2,1", elastic_weight)
