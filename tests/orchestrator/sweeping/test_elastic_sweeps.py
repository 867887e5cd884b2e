"""A sweep that trains one set of weights for all of its schedules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from fake_tracking import FakeTracking
from sample_trials import sample_front, sample_trial

from iiet.cost import inference_cost, training_flops_per_token
from iiet.influence import InfluenceTable
from orchestrator.evaluation.measuring import heldout_loss
from orchestrator.models.folder import load_config
from orchestrator.models.open import load_model
from orchestrator.planning.estimate import Estimate
from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import SweepPlan, Trial, TrialSuite
from orchestrator.reporting.elastic_section import ELASTIC_TITLE, elastic_section
from orchestrator.reporting.report import write_sweep_report
from orchestrator.reporting.results import StoredSweep
from orchestrator.settings import Settings, resolve_settings
from orchestrator.sweeping import trial as trial_module
from orchestrator.sweeping.live import LiveSweep
from orchestrator.sweeping.plan import choose_members, threshold_plan
from orchestrator.sweeping.run import SweepQueue
from orchestrator.sweeping.trial import run_trial
from orchestrator.sweeping.trials import (
    distillation_job,
    elastic_savings,
    elastic_trials,
    elastic_upper_bound,
    exact_cost,
    student_estimates,
    without_elastic,
)
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import Tracking
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace

TABLE = InfluenceTable(
    metric="cosine",
    value_rows=((0.5, 0.1), (0.3,)),
    error_rows=((0.0, 0.0), (0.0,)),
    num_tokens=64,
)
SMALL = [
    "sweep.elastic=true",
    "distillation.training.num_steps=3",
    "distillation.training.num_tokens_per_step=64",
    "distillation.training.num_validation_tokens=64",
]


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path)


@pytest.fixture
def suite(tiny_tokens: Path) -> TrialSuite:
    return TrialSuite(tokens_folder=str(tiny_tokens))


def plan_of(settings: Settings, space: Workspace, teacher: Path, suite: TrialSuite) -> SweepPlan:
    """Return the plan as the pipeline makes it."""
    members = choose_members(TABLE, settings.sweep)
    elastic = []
    if settings.sweep.elastic:
        elastic = elastic_trials(settings, space, teacher=teacher, members=members, suite=suite)
    return threshold_plan(
        without_elastic(settings),
        space,
        teacher=teacher,
        members=members,
        suite=suite,
        elastic=elastic,
    )


def test_one_training_serves_all_schedules(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    settings = resolve_settings({}, [*SMALL, "sweep.elastic_steps=5"])
    plan = plan_of(settings, space, teacher, suite)
    assert [trial.label for trial in plan.trials] == [
        "teacher", "2,1, elastic", "1,1, elastic", "1,0, elastic", "0,0, elastic",
    ]  # fmt: skip
    _, trained, *served = plan.trials
    (job,) = [trial.job for trial in plan.trials if trial.job]
    assert trained.job is job
    assert (job.objective, job.teacher_folder, job.initial_folder) == (
        "distill", str(teacher), str(teacher),
    )  # fmt: skip
    assert job.recipe.num_steps == 5
    assert job.recipe.elastic
    assert job.recipe.elastic.schedules == ("1,1", "1,0", "0,0")
    assert {trial.checkpoint for trial in served} == {f"{trained.folder}/step_00000005"}
    assert len({trial.key for trial in plan.trials}) == 5
    assert [trial.threshold_text for trial in served[:1]] == ["0.1 to 0.3"]
    assert plan.num_distinct == 4
    # Another family, or other steps, give other weights.
    for change in ("sweep.thresholds=[0.2]", "sweep.elastic_steps=6"):
        other = plan_of(resolve_settings({}, [*SMALL, change]), space, teacher, suite)
        assert other.trials[1].key != trained.key


def test_seeds_have_weights_of_their_own(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    settings = resolve_settings({}, [*SMALL, "sweep.seeds=[3, 4]"])
    plan = plan_of(settings, space, teacher, suite)
    assert [t.label for t in plan.trials[1::4]] == ["2,1, elastic, seed 3", "2,1, elastic, seed 4"]
    assert {t.group for t in plan.trials if t.schedule == (0, 0)} == {"0,0, elastic"}
    assert len({trial.folder for trial in plan.trials if trial.job}) == 2
    assert plan.num_distinct == 4


def test_students_beside_elastic_weights_are_those_of_a_plain_sweep(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    compared = plan_of(
        resolve_settings({}, [*SMALL, "sweep.compare=true", "distillation.training.elastic={}"]),
        space,
        teacher,
        suite,
    )
    plain = plan_of(resolve_settings({}, [*SMALL, "sweep.elastic=false"]), space, teacher, suite)
    keys = {trial.key for trial in compared.trials}
    assert {trial.key for trial in plain.trials} < keys
    assert len(keys) == len(plain.trials) + 4
    assert compared.num_distinct == plain.num_distinct == 4


def test_a_family_needs_a_schedule_below_the_full_one(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    settings = resolve_settings({}, [*SMALL, "sweep.thresholds=[0.01]"])
    with pytest.raises(UserError, match=r"^sweep.elastic trains schedules that are cheaper"):
        plan_of(settings, space, teacher, suite)


def test_a_distilled_elastic_student_learns_from_its_teacher(
    space: Workspace, teacher: Path, tiny_tokens: Path
) -> None:
    def job(schedule: str, *changes: str) -> TrainingJob:
        family = "distillation.training.elastic.schedules=['1,0']"
        settings = resolve_settings({}, [*SMALL[1:], family, *changes])
        return distillation_job(settings, space, teacher, schedule, tiny_tokens)

    distilled = job("2,1", "distillation.kl_weight=2")
    assert (distilled.objective, distilled.teacher_folder) == ("distill", str(teacher))
    assert distilled.distillation is not None
    assert distilled.distillation.kl_weight == 2.0
    with pytest.raises(UserError, match=r"^distillation.training.elastic.schedules: .* below"):
        job("0,1")
    # The control has no teacher, so the members learn from the full schedule.
    own = "distillation.training.elastic.kl_weight=2"
    assert job("2,1", "distillation.control=cross_entropy", own).objective == "cross_entropy"
    with pytest.raises(UserError, match=r"elastic.kl_weight=2.0: .* set distillation.kl_weight"):
        job("2,1", own)


def test_what_is_saved_is_counted_from_shapes(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    settings = resolve_settings({}, [*SMALL, "distillation.teacher_cache=false"])
    trials = list(plan_of(settings, space, teacher, suite).trials[1:])
    text = elastic_savings(settings, trials, space.teachers)
    full = load_config(teacher)
    job = trials[0].job
    assert job
    forward = inference_cost(full).forward_flops_per_token
    own = Estimate(config=full, recipe=job.recipe, teacher=full).flops + 3 * 64 * forward
    per_token = sum(training_flops_per_token(full, t.model.corrections) for t in trials)
    per_token += 4 * forward
    separate = 3 * 64 * per_token
    assert text == (
        f"one elastic training of 3 steps: {own:.3g} FLOPs, {own / separate:.0%} of the "
        f"{separate:.3g} of 4 separate students"
    )
    (unknown,) = student_estimates(settings, full, [elastic_upper_bound(settings, full)])
    assert unknown.flops + 3 * 64 * forward >= own


def test_weights_are_trained_once_and_measured_under_each_schedule(
    space: Workspace, teacher: Path, suite: TrialSuite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(trial: Trial, _: str) -> Trial:
        decoder = load_model(Path(str(trial.checkpoint)), schedule=trial.model.corrections)
        loss = heldout_loss(decoder, Path(suite.tokens_folder))
        return trial.with_numbers("quality", {"validation_loss": loss})

    monkeypatch.setattr(trial_module, "measure_trial", measure)
    plan = plan_of(resolve_settings({}, SMALL), space, teacher, suite)
    results = [result for trial in plan.trials[1:] if (result := run_trial(trial))]
    assert len({result.numbers["quality/validation_loss"] for result in results}) == 4
    assert len({result.checkpoint for result in results}) == 1
    assert len(list(space.trials.glob("*/done.json"))) == 1
    again = plan_of(resolve_settings({}, SMALL), space, teacher, suite)
    monkeypatch.setattr(trial_module, "measure_trial", pytest.fail)
    assert [run_trial(trial) for trial in again.trials[1:]] == results


def order_of(plan: SweepPlan, space: Workspace, *, fails: bool) -> tuple[list[str], SweepQueue]:
    """Run a queue of the unfinished trials, each as soon as it can start; return their order."""
    found = {trial.key: result for trial in plan.trials if (result := trial.result())}
    waiting = [trial for trial in plan.trials if trial.key not in found]
    live = LiveSweep(
        plan, resolve_settings({}), cast("Tracking", FakeTracking()), space.sweeps / "x",
        num_trials=len(plan.trials),
    )  # fmt: skip
    queue = SweepQueue(waiting, found, {}, live, Progress(), num_all=len(plan.trials))
    order, running = list[str](), list[Trial]()
    while not queue.is_over:
        while trial := queue.take():
            order.append(trial.label)
            running.append(trial)
        if queue.is_over:
            break
        order.append("|")  # All that can start has started.
        trial = running.pop(0)
        if trial.job and not fails:
            name = f"step_{trial.job.recipe.num_steps:08d}"
            (trial.job.folder / name).mkdir(parents=True, exist_ok=True)
        has_failed = bool(trial.job) and fails
        if not has_failed:
            trial.write(trial.result_path)
        queue.on_end(trial.key, None if has_failed else trial, "no luck" if has_failed else "")
    return order, queue


def test_schedules_wait_for_the_training_of_their_weights(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    plan = plan_of(resolve_settings({}, SMALL), space, teacher, suite)
    order, queue = order_of(plan, space, fails=True)
    assert order == ["teacher", "2,1, elastic", "|", "|"]
    assert queue.failures["0,0, elastic"] == "its weights are not trained"

    order, queue = order_of(plan, space, fails=False)
    served = ["1,1, elastic", "1,0, elastic", "0,0, elastic"]
    assert order == ["2,1, elastic", "|", *served, "|", "|", "|"]
    assert queue.failures == {}
    for trial in plan.trials[2:]:
        trial.result_path.unlink()
    order, _ = order_of(plan, space, fails=False)
    assert order[:3] == served, "the weights are there, and nothing waits"


def evaluation(share: float, name: str = "task") -> EvaluationResult:
    right = (np.arange(200) < 200 * share).astype(float)
    result = TaskResult(
        name=name,
        version="1",
        num_items=200,
        num_fewshot=0,
        metrics={"acc": float(right.mean())},
        items=[f"item {number}" for number in range(200)],
        values={"acc": right.tolist()},
    )
    return EvaluationResult(results={name: result})


def measured(trial: Trial, accuracy: float, loss: float, flops: float) -> Trial:
    trial = trial.with_numbers("cost", exact_cost(trial.model, trial.model))
    trial = trial.with_numbers("quality", {"accuracy": accuracy, "validation_loss": loss})
    return trial.with_numbers("train", {"flops": flops})


def test_the_report_holds_both_side_by_side(
    space: Workspace, teacher: Path, suite: TrialSuite
) -> None:
    settings = resolve_settings({}, [*SMALL, "sweep.compare=true"])
    plan = plan_of(settings, space, teacher, suite)
    results = []
    for trial in plan.trials:
        accuracy = 0.6 if trial.schedule == (0, 0) and not trial.is_elastic else 0.8
        results.append(measured(trial, accuracy, 5.0, 6e9 if trial.is_elastic else 4e9))
    items = {result.key: evaluation(result.numbers["quality/accuracy"]) for result in results}
    front = sample_front(results)
    section = elastic_section(front, items)
    assert section is not None
    found = section.data["elastic"]["schedules"]
    assert [row["schedule"] for row in found] == [[2, 1], [1, 1], [1, 0], [0, 0]]
    same, better = found[0], found[-1]
    assert (same["difference"], same["interval"]) == (0, [0, 0])
    assert 0 < better["interval"][0] < better["difference"] == pytest.approx(0.2)
    assert "38% of the 1.6e+10" in section.notes[0]
    # Without single items, the difference has no interval.
    alone = elastic_section(front, {})
    assert alone is not None
    assert alone.tables[0].rows[-1].cells[4] == "+20.0"

    written = write_sweep_report(space, StoredSweep(name="x", key="x", results=tuple(results)))
    assert f"## {ELASTIC_TITLE}" in (written.folder / "front.md").read_text("utf-8")
    assert ELASTIC_TITLE in (written.folder / "front.html").read_text("utf-8")
    stored = json.loads((written.folder / "front.json").read_text("utf-8"))["elastic"]
    assert [row["schedule"] for row in stored["schedules"]][-1] == [0, 0]
    assert stored["training_flops"] == [6e9, 16e9]
    # Elastic weights alone have nothing beside them.
    assert elastic_section(sample_front(results[:5]), items) is None


def test_a_sweep_of_one_kind_has_no_such_section() -> None:
    alone: Any = [sample_trial(key=f"{n}", role="trial", schedule=(n, 0)) for n in range(3)]
    assert elastic_section(sample_front(alone), {}) is None
