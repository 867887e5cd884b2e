"""The front over time ends at the front, never shrinks, and is written down once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from sample_trials import sample_front

from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import SweepPlan, Trial
from orchestrator.reporting.results import (
    HISTORY_CHARTS,
    HYPERVOLUME_BY_GFLOPS,
    HYPERVOLUME_BY_TRIALS,
    MAX_CURVE_POINTS,
    read_history_curves,
)
from orchestrator.settings import TrainingSettings
from orchestrator.sweeping.live import FrontHistory
from orchestrator.workspace.journal import read_journal


def planned(result: Trial, folder: Path) -> Trial:
    job = TrainingJob(
        run_folder="",
        tokens_folder="",
        model=result.model,
        recipe=TrainingSettings(),
        objective="distill",
    )
    job_of_trial = job if result.role == "trial" else None
    return result.model_copy(update={"folder": str(folder), "job": job_of_trial})


@pytest.fixture
def plan(tmp_path: Path, sample_results: list[Trial]) -> SweepPlan:
    trials = tuple(planned(result, tmp_path / result.key) for result in sample_results)
    return SweepPlan(
        key="k", name="n", kind="threshold", tokens_folder="", teacher="t", num_requested=9,
        trials=trials,
    )  # fmt: skip


def finish(plan: SweepPlan, result: Trial) -> Trial:
    """Store a trial's result, as its process does, without costs."""
    trial = next(trial for trial in plan.trials if trial.key == result.key)
    measured = {n: v for n, v in result.numbers.items() if not n.startswith("cost/")}
    trial.model_copy(update={"numbers": measured}).write(trial.result_path)
    return trial


def series(folder: Path, metric: str) -> list[tuple[int, float]]:
    records = [r for r in read_journal(folder)[0] if metric in r["values"]]
    return [(record["step"], record["values"][metric]) for record in records]


def record_front(plan: SweepPlan, folder: Path) -> bool:
    history = FrontHistory(plan, folder, num_trials=len(plan.trials))
    for trial in plan.trials:
        if result := trial.result():
            history.add(result)
    return history.record()


@pytest.mark.parametrize("seed", range(4))
def test_it_grows_in_any_order_and_ends_at_the_front(
    plan: SweepPlan, sample_results: list[Trial], tmp_path: Path, seed: int
) -> None:
    teacher, *others = sample_results
    random.Random(seed).shuffle(others)
    for result in [teacher, *others]:
        finish(plan, result)
        assert record_front(plan, tmp_path / "history")
    found = series(tmp_path / "history", HYPERVOLUME_BY_TRIALS)
    assert [step for step, _ in found] == list(range(1, len(sample_results) + 1))
    volumes = [volume for _, volume in found]
    assert volumes == sorted(volumes), "the box is the same all along"
    assert volumes[0] < volumes[-1]
    assert volumes[-1] == pytest.approx(sample_front(sample_results).hypervolume)
    spent = series(tmp_path / "history", "sweep/training_flops")
    assert spent[-1][1] == pytest.approx(9 * 1.2e12), "that of the students; no one else has a job"
    assert series(tmp_path / "history", HYPERVOLUME_BY_GFLOPS)[-1] == (10_800, volumes[-1])


def test_what_two_models_have_in_common_is_spent_once(
    plan: SweepPlan, sample_results: list[Trial], tmp_path: Path
) -> None:
    teacher, first, second, *_ = sample_results
    for result in (
        teacher,
        first,
        second.with_numbers("train", {"shared_flops": 0.9e12}),
    ):
        finish(plan, result)
    assert record_front(plan, tmp_path / "history")
    [(_, spent)] = series(tmp_path / "history", "sweep/training_flops")
    assert spent == pytest.approx(1.2e12 + 0.3e12)


def test_a_lucky_seed_is_no_front(
    plan: SweepPlan, sample_results: list[Trial], tmp_path: Path
) -> None:
    teacher, cheap = sample_results[0], sample_results[5]
    trial = plan.trials[5]
    seeds = [
        trial.model_copy(
            update={"key": f"seed{n}", "folder": f"{trial.folder}-{n}", "seed": n, "group": "cheap"}
        )
        for n in range(2)
    ]
    plan = plan.model_copy(update={"trials": (plan.trials[0], *seeds)})
    finish(plan, teacher)
    for seed, accuracy in zip(seeds, (0.1, 0.5), strict=True):
        of_seed = cheap.model_copy(update={"key": seed.key})
        finish(plan, of_seed.with_numbers("quality", {"accuracy": accuracy}))
    assert record_front(plan, tmp_path / "history")
    [(_, volume)] = series(tmp_path / "history", HYPERVOLUME_BY_TRIALS)
    usual = cheap.with_numbers("quality", {"accuracy": 0.3})
    assert volume == pytest.approx(sample_front([teacher, usual]).hypervolume)


def test_nothing_is_said_before_the_full_model_is_measured(
    plan: SweepPlan, sample_results: list[Trial], tmp_path: Path
) -> None:
    teacher, *others = sample_results
    for result in others[:3]:
        finish(plan, result)
        assert not record_front(plan, tmp_path / "history")
    finish(plan, teacher)
    assert record_front(plan, tmp_path / "history")
    assert [step for step, _ in series(tmp_path / "history", HYPERVOLUME_BY_TRIALS)] == [4]


def test_what_is_known_is_not_written_again(
    plan: SweepPlan, sample_results: list[Trial], tmp_path: Path
) -> None:
    for result in sample_results[:2]:
        finish(plan, result)
    assert record_front(plan, tmp_path / "history")
    assert not record_front(plan, tmp_path / "history")
    assert read_history_curves(tmp_path / "history") == {}, "one point is no curve"
    finish(plan, sample_results[5])
    assert record_front(plan, tmp_path / "history")
    curves = read_history_curves(tmp_path / "history")
    assert set(curves) == set(HISTORY_CHARTS)
    [[(name, points)]] = [curves["Hypervolume against trials finished"]]
    assert (name, [step for step, _ in points]) == ("front", [2, 3])


def test_many_trials_are_recorded_as_often_as_curves_show(
    plan: SweepPlan, sample_results: list[Trial], tmp_path: Path
) -> None:
    history = FrontHistory(plan, tmp_path / "history", num_trials=4 * MAX_CURVE_POINTS)
    for result in sample_results:
        found = finish(plan, result).result()
        assert found
        history.add(found)
        history.add(found)
        history.record()
    steps = [step for step, _ in series(tmp_path / "history", HYPERVOLUME_BY_TRIALS)]
    assert steps == list(range(4, len(sample_results) + 1, 4))
    assert history.record(at_end=True) == (len(sample_results) % 4 > 0)
    assert not history.record(at_end=True)
