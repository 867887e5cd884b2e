"""Plans: thresholds are labels, schedules are trials, keys say what is finished."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iiet.config import ModelConfig
from iiet.cost import inference_cost
from iiet.influence import InfluenceTable
from iiet.pruning import FamilyMember
from iiet.weights import config_from_json
from orchestrator.data.model_tokens import tokens_folder_of
from orchestrator.models.folder import load_config
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.settings import DistillationSettings, Settings, TrainingSettings, resolve_settings
from orchestrator.sweeping.baselines import distilled_baseline_trials
from orchestrator.sweeping.plan import (
    SweepModel,
    choose_members,
    iterations_plan,
    text_of_teacher,
    threshold_plan,
)
from orchestrator.sweeping.trials import (
    SweepPlan,
    exact_cost,
    num_distilled_baselines,
    num_models,
    student_job,
    student_trial,
)
from orchestrator.training.job import finished_outcome
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path)


TABLE = InfluenceTable(
    metric="cosine",
    value_rows=((0.5, 0.1), (0.3,)),
    error_rows=((0.0, 0.0), (0.0,)),
    num_tokens=64,
)


def _plan(settings: Settings, space: Workspace, teacher: Path, suite: TrialSuite, **more: Any):
    members = choose_members(TABLE, settings.sweep)
    return threshold_plan(settings, space, teacher=teacher, members=members, suite=suite, **more)


@pytest.fixture
def suite(tiny_tokens: Path) -> TrialSuite:
    return TrialSuite(suite="heldout-x", suite_folder="/a", tokens_folder=str(tiny_tokens))


def test_a_plan_runs_from_all_corrections_to_none(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    plan = _plan(Settings(), space, teacher, suite)
    assert [t.role for t in plan.trials] == ["teacher", *["trial"] * 4]
    schedules = [list(t.model.corrections) for t in plan.trials if t.role == "trial"]
    assert schedules == [[2, 1], [1, 1], [1, 0], [0, 0]]
    assert len({t.key for t in plan.trials}) == 5


def test_thresholds_that_lead_to_one_schedule_are_one_trial(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    asked = resolve_settings({}, ["sweep.thresholds=[0.11, 0.15, 0.2, 0.29, 0.45]"])
    plan = _plan(asked, space, teacher, suite)
    trials = [t for t in plan.trials if t.role == "trial"]
    assert [list(t.model.corrections) for t in trials] == [[1, 1], [1, 0]]
    assert plan.num_requested == 5
    for trial, low, high in zip(trials, (0.1, 0.3), (0.3, 0.5), strict=True):
        assert (trial.threshold_above, trial.threshold_up_to) == (low, high)


def test_a_threshold_keeps_a_correction_of_exactly_its_influence() -> None:
    sweep = resolve_settings({}, ["sweep.thresholds=[0.3]"]).sweep
    assert [str(member.schedule) for member in choose_members(TABLE, sweep)] == ["1,1"]


def test_a_trial_of_another_sweep_has_the_same_key_and_folder(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    few = _plan(resolve_settings({}, ["sweep.num_schedules=2"]), space, teacher, suite)
    many = _plan(Settings(), space, teacher, suite)
    assert {t.key for t in few.trials} < {t.key for t in many.trials}
    assert few.key != many.key


@pytest.mark.parametrize(
    "change",
    [
        "distillation.kl_weight=0.5",
        "distillation.training.num_steps=7",
        "distillation.training.seed=1",
    ],
)
def test_what_changes_the_weights_changes_the_folder(
    change: str, space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    usual = _plan(Settings(), space, teacher, suite)
    other = _plan(resolve_settings({}, [change]), space, teacher, suite)
    pairs = [(a, b) for a, b in zip(usual.trials, other.trials, strict=True) if a.role == "trial"]
    assert all(a.folder != b.folder and a.key != b.key for a, b in pairs)
    assert usual.trials[0].key == other.trials[0].key, "the teacher is measured as it is"


def test_other_tasks_are_put_to_the_same_weights(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    usual = _plan(Settings(), space, teacher, suite)
    other = _plan(Settings(), space, teacher, suite.model_copy(update={"suite": "heldout-y"}))
    moved = _plan(Settings(), space, teacher, suite.model_copy(update={"suite_folder": "/b"}))
    for a, b, c in zip(usual.trials, other.trials, moved.trials, strict=True):
        assert a.folder == b.folder == c.folder
        assert a.key != b.key
        assert a.key == c.key, "where files stand does not matter"


def test_how_often_a_run_looks_and_saves_changes_no_key(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    usual = _plan(Settings(), space, teacher, suite)
    other = _plan(
        resolve_settings({}, ["distillation.training.checkpoint_every_steps=3"]),
        space,
        teacher,
        suite,
    )
    assert [t.key for t in usual.trials] == [t.key for t in other.trials]


def test_where_a_teacher_is_asked_changes_no_key(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    keys = [
        [trial.key for trial in _plan(resolve_settings({}, change), space, teacher, suite).trials]
        for change in ([], ["distillation.teacher_cache=true"])
    ]
    assert keys[0] == keys[1]


def test_a_finished_result_is_found_under_the_names_of_this_sweep(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    trial = _plan(Settings(), space, teacher, suite).trials[1]
    assert trial.result() is None
    stored = trial.model_copy(update={"role": "baseline", "label": "another name"})
    stored.write(trial.result_path)
    found = trial.result()
    assert found is not None
    assert (found.role, found.label) == ("trial", trial.label)


def test_controls_differ_in_what_they_train(teacher: Path) -> None:
    config = ModelConfig.from_dict({**_config(teacher), "schedule": [1, 0]})
    jobs = {
        control: student_job(
            DistillationSettings(control=control), teacher=teacher, config=config, tokens_folder="t"
        )
        for control in ("distill", "cross_entropy", "pruned", "scratch")
    }
    assert jobs["pruned"] is None
    kinds = {
        name: (j.objective, bool(j.teacher_folder), bool(j.initial_folder))
        for name, j in jobs.items()
        if j
    }
    assert kinds == {
        "distill": ("distill", True, True),
        "cross_entropy": ("cross_entropy", False, True),
        "scratch": ("pretrain", False, False),
    }
    # So that advice names the settings that they are trained by.
    assert {job.section for job in jobs.values() if job} == {"distillation.training"}


def test_relative_costs_relate_to_the_full_model(teacher: Path) -> None:
    full = ModelConfig.from_dict(_config(teacher))
    none = ModelConfig.from_dict({**_config(teacher), "schedule": [0, 0]})
    cost = exact_cost(none, full)
    assert (cost["evaluations"], cost["relative_evaluations"]) == (2, 2 / 5)
    most = inference_cost(full).decode_flops_per_token
    assert cost["relative_flops"] == inference_cost(none).decode_flops_per_token / most
    assert cost["relative_flops"] != 2 / 5, "the head is not evaluated more often"
    assert exact_cost(full, full)["relative_flops"] == 1.0


def test_an_iterations_plan_has_each_model_once(
    teacher: Path, tiny_tokens: Path, suite: TrialSuite
) -> None:
    def job(method: str, schedule: list[int] | None) -> TrainingJob:
        model = {**_config(teacher), "method": method, "schedule": schedule}
        recipe = Settings().training
        return TrainingJob(
            run_folder=f"/runs/{method}", tokens_folder=str(tiny_tokens), model=model, recipe=recipe
        )

    models = [
        SweepModel(label=label, settings=Settings()) for label in ("vanilla", "r = 1", "again")
    ]
    jobs = [job("vanilla", None), job("iiet", [1, 1]), job("iiet", [1, 1])]
    plan = iterations_plan(models, jobs, suite=suite)
    assert [t.role for t in plan.trials] == ["baseline", "trial"]
    assert plan.num_requested == 3


def test_seeds_are_trials_of_one_group(space: Workspace, teacher: Path, suite: TrialSuite) -> None:
    settings = resolve_settings({}, ["sweep.seeds=[0, 1]", "sweep.num_schedules=2"])
    trials = [t for t in _plan(settings, space, teacher, suite).trials if t.role == "trial"]
    assert [(t.group, t.seed) for t in trials] == [
        ("2,1", 0), ("0,0", 0), ("2,1", 1), ("0,0", 1)
    ]  # fmt: skip
    assert len({t.key for t in trials}) == 4
    alone = _plan(resolve_settings({}, ["sweep.num_schedules=2"]), space, teacher, suite)
    # The recipe's own seed is 0: what a sweep without seeds has trained is found again.
    assert alone.trials[1].key == trials[0].key


def test_distilled_baselines_are_trained_as_students_and_are_no_schedules(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    def plan(*more: str) -> tuple[SweepPlan, dict[str, TrainingJob]]:
        settings = resolve_settings(
            {}, ["sweep.distilled_baselines=[vanilla, fewer_layers]", "sweep.seeds=[3, 4]", *more]
        )
        table = replace(TABLE, layer_values=(0.2, 0.7))
        members = choose_members(table, settings.sweep)
        trials = distilled_baseline_trials(
            settings, space, teacher=teacher, members=members, influence=table, suite=suite
        )
        whole = _plan(settings, space, teacher, suite, baselines=trials)
        return whole, {t.label: t.job for t in whole.trials if t.job}

    whole, jobs = plan("sweep.num_distilled_baselines=1")
    baselines = [t for t in whole.trials if t.role == "baseline"]
    assert [(t.group, t.seed) for t in baselines] == [
        ("vanilla, 3 layers, distilled", 3), ("1 of 2 layers", 3),
        ("vanilla, 3 layers, distilled", 4), ("1 of 2 layers", 4),
    ]  # fmt: skip
    assert (num_models(whole.trials), num_distilled_baselines(whole.trials)) == (4, 2)
    assert all(t.parent == whole.trials[1].parent and not t.threshold_text for t in baselines)
    student = jobs["1,0, seed 3"]
    vanilla, smaller = (jobs[baseline.label] for baseline in baselines[:2])
    assert smaller.kept_layers == (1,)
    assert smaller.initial_folder == student.initial_folder
    assert vanilla.initial_folder is None
    for job in (smaller, vanilla):
        assert job.teacher_folder == student.teacher_folder
        assert (job.objective, job.distillation) == ("distill", student.distillation)
    assert smaller.recipe == student.recipe
    # The rate is that of vanilla models which start from random weights, and the tokens are those
    # that the student's weights have seen.
    steps = student.recipe.num_steps + math.ceil(2 * 64 / student.recipe.num_tokens_per_step)
    changes = {"learning_rate": 4e-3, "num_steps": steps}
    assert vanilla.recipe == student.recipe.model_copy(update=changes)
    _, longer = plan("sweep.num_distilled_baselines=1", "sweep.distilled_vanilla_steps=500")
    assert longer["vanilla, 3 layers, distilled, seed 3"].recipe.num_steps == 500
    assert longer["1 of 2 layers, seed 3"] == smaller
    assert longer["1,0, seed 3"] == student


def test_pruned_students_have_no_seeds(space: Workspace, teacher: Path, suite: TrialSuite) -> None:
    settings = resolve_settings(
        {}, ["sweep.seeds=[0, 1, 2]", "sweep.num_schedules=2", "distillation.control=pruned"]
    )
    trials = [t for t in _plan(settings, space, teacher, suite).trials if t.role == "trial"]
    assert [(t.seed, t.job) for t in trials] == [(None, None)] * 2
    assert len({t.key for t in trials}) == 2


@pytest.mark.parametrize(
    ("assignments", "schedules"),
    [
        (["sweep.budgets=[2, 4.5]"], ["1,1", "0,0"]),
        (["sweep.selection=knapsack", "sweep.num_schedules=3"], ["2,1", "1,1", "0,0"]),
        (["sweep.selection=knapsack", "sweep.budgets=[3]"], ["1,0"]),
        (["sweep.selection=knapsack", "sweep.budgets=[2, 99, 4.5]"], ["2,1", "1,1", "0,0"]),
    ],
)
def test_schedules_by_budget_and_by_knapsack(assignments: list[str], schedules: list[str]) -> None:
    members = choose_members(TABLE, resolve_settings({}, assignments).sweep)
    assert [str(member.schedule) for member in members] == schedules


TIED = InfluenceTable(
    metric="cosine",
    value_rows=((0.3, 0.3), (0.3, 0.1)),
    error_rows=((0.0, 0.0), (0.0, 0.0)),
    num_tokens=64,
)


@pytest.mark.parametrize("unit", ["evaluations", "kv"])
def test_a_knapsack_spends_a_budget_that_ties_keep_from_the_threshold(unit: str) -> None:
    chosen = {}
    for selection in ("threshold", "knapsack"):
        settings = resolve_settings(
            {}, [f"sweep.selection={selection}", "sweep.budgets=[4]", f"sweep.budget_unit={unit}"]
        )
        (member,) = choose_members(TIED, settings.sweep)
        chosen[selection] = member.schedule.corrections
    assert chosen == {"threshold": (0, 0), "knapsack": (2, 0)}


def test_a_knapsack_of_losses_weighs_what_each_correction_adds() -> None:
    # Without both corrections of layer 1 the loss rises by 0.5, without the second by 0.45: the
    # first one is worth 0.05, less than the only one of layer 2.
    table = InfluenceTable(
        metric="loss", value_rows=((0.5, 0.45), (0.1,)), error_rows=((0.0,) * 2, (0.0,)),
        num_tokens=64,
    )  # fmt: skip
    settings = resolve_settings({}, ["sweep.selection=knapsack", "sweep.budgets=[3, 4]"])
    members = choose_members(table, settings.sweep)
    assert [member.schedule.corrections for member in members] == [(2, 0), (0, 1)]


def test_a_budget_that_nothing_fits_is_named() -> None:
    with pytest.raises(UserError, match=r"sweep\.budgets, in evaluations.*cheapest costs 2"):
        choose_members(TABLE, resolve_settings({}, ["sweep.budgets=[1]"]).sweep)


def test_tokens_that_are_missing_are_named(teacher: Path, space: Workspace) -> None:
    with pytest.raises(UserError, match="iiet-orch prepare"):
        tokens_folder_of(teacher, space)


def test_tokens_outside_the_workspace_are_none(
    teacher: Path, space: Workspace, tiny_tokens: Path
) -> None:
    space.tokens.mkdir()
    for name in ("..", f"../../{tiny_tokens.name}", str(tiny_tokens)):
        record = json.loads((teacher / "provenance.json").read_text())
        (teacher / "provenance.json").write_text(json.dumps({**record, "tokens": name}))
        with pytest.raises(UserError, match="iiet-orch prepare"):
            tokens_folder_of(teacher, space)


def _config(checkpoint: Path) -> dict[str, Any]:
    return config_from_json(json.loads((checkpoint / "config.json").read_text())).to_dict()


def test_what_was_left_out_is_in_the_plan_and_not_in_its_key(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    left_out = {"v-1": "vanilla is left out: its training is not finished"}
    plan = _plan(Settings(), space, teacher, suite, left_out=left_out)
    assert plan.left_out == left_out
    assert plan.key == _plan(Settings(), space, teacher, suite).key


def test_planned_trials_survive_json(space: Workspace, teacher: Path, suite: TrialSuite) -> None:
    trial = _plan(Settings(), space, teacher, suite).trials[1]
    stored = json.loads(json.dumps(trial.model_dump(mode="json"), allow_nan=False))
    assert type(trial).model_validate(stored) == trial


def test_models_of_a_sweep_are_measured_as_an_imported_teacher_reads_text(
    teacher: Path, tmp_path: Path
) -> None:
    assert text_of_teacher(teacher) == {}, "trained here: the tokens say it all"
    imported = tmp_path / "imported" / teacher.name
    shutil.copytree(teacher, imported)
    (imported / "generation_config.json").write_text('{"eos_token_id": 2}')
    suite = TrialSuite(tokens_folder="", **text_of_teacher(imported))
    assert suite.vocabulary_folder == str(imported)
    moved = suite.model_copy(update={"vocabulary_folder": "elsewhere"})
    (imported / "generation_config.json").write_text('{"eos_token_id": 7}')
    other = TrialSuite(tokens_folder="", **text_of_teacher(imported))
    assert suite.key == moved.key != other.key


def test_finished_weights_are_found_whatever_they_were_trained_for(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    recipe = TrainingSettings(num_steps=1, num_tokens_per_step=64, num_validation_tokens=64)
    scratch = DistillationSettings(control="scratch", training=recipe)
    settings = Settings(distillation=scratch)
    config = load_config(teacher)
    member = FamilyMember(config.corrections, 0.0, 1.0)

    def planned() -> Trial:
        return student_trial(settings, space, teacher, config, member, suite)

    usual = planned()
    assert Path(usual.folder).parent == space.trials
    assert usual.job
    named = usual.job.model_copy(update={"run_folder": str(space.runs / "mine")})
    run_job(named)
    found = planned()
    assert (found.key, found.folder) == (usual.key, str(space.runs / "mine"))
    assert found.job
    assert finished_outcome(found.job), "nothing is left to train"
    # What was begun in its usual place goes on there.
    run_job(usual.job, should_stop=lambda: True)
    assert planned().folder == usual.folder
