"""A search: seeded, each schedule once, nothing made twice, and a better front than the family."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
from sample_trials import sample_trial

from iiet.config import ModelConfig
from iiet.schedule import IterationSchedule
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.reporting.pareto import find_front
from orchestrator.settings import SearchSettings
from orchestrator.sweeping.search import ScheduleSearch
from orchestrator.sweeping.student_plans import search_plan
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import write_json

FULL = IterationSchedule((2, 2, 0, 2, 2, 2))
FAMILY = [FULL, IterationSchedule((1, 1, 0, 1, 1, 1)), IterationSchedule((0,) * 6)]
GAINS = (0.01, 0.04, 0.0, 0.02, 0.08, 0.03)
"""What a first correction of a layer gives; a second one gives a tenth of it."""


def accuracy(schedule: IterationSchedule) -> float:
    return 0.3 + sum(
        gain * (min(r, 1) + max(r - 1, 0) / 10) for gain, r in zip(GAINS, schedule, strict=True)
    )


class World:
    """Trials in a folder; `finish` does as if they were trained."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, 0
        teacher = self.trial(FULL).model_copy(update={"role": "teacher", "key": "teacher"})
        self.family = SweepPlan(
            key="family", name="family", kind="threshold", tokens_folder="", teacher="",
            num_requested=3, trials=(teacher, *map(self.trial, FAMILY)),
        )  # fmt: skip

    def trial(self, schedule: IterationSchedule) -> Trial:
        model = ModelConfig(
            vocab_size=64, dim=16, num_layers=6, num_heads=2, num_kv_heads=2, ffn_dim=32,
            context_length=16, schedule=schedule,
        ).to_dict()  # fmt: skip
        return Trial(
            key=str(schedule).replace(",", ""), role="trial", label=str(schedule), model=model,
            folder=str(self.folder), job=None, checkpoint=None, suite=TrialSuite(tokens_folder=""),
        )  # fmt: skip

    def finish(self, trial: Trial) -> None:
        if trial.result() is None:
            self.made += 1
            schedule = trial.model.corrections
            result = sample_trial(
                key=trial.key, role="trial", method="iiet", schedule=tuple(schedule),
                quality={"accuracy": accuracy(schedule)},
                cost={"evaluations": schedule.num_evaluations},
            )  # fmt: skip
            write_json(trial.result_path, result.model_dump(mode="json"))

    def search(self, **settings: Any) -> ScheduleSearch:
        return ScheduleSearch(self.family, FULL, SearchSettings(**settings), self.trial)

    def run(self, failing: str = "", **settings: Any) -> list[str]:
        """Run a whole search, and return the schedules in the order in which it asked for them."""
        search, asked = self.search(**settings), []
        for trial in self.family.trials:
            self.finish(trial)
        while trials := search.next_trials():
            for trial in trials:
                asked.append(trial.label)
                if trial.label != failing:
                    self.finish(trial)
        return asked


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_each_schedule_once_and_the_same_command_trains_nothing(
    tmp_path: Path, sampler: str
) -> None:
    world, other = World(tmp_path / "a"), World(tmp_path / "b")
    first = world.run(sampler=sampler, num_trials=20)
    assert len(first) == len(set(first)) == 20
    assert not set(first) & {str(schedule) for schedule in FAMILY}
    assert all(text.split(",")[2] == "0" for text in first), "no more than the teacher has"
    assert other.run(sampler=sampler, num_trials=20) == first, "the seed decides"
    made = world.made
    assert world.run(sampler=sampler, num_trials=20) == first
    assert world.made == made
    longer = world.run(sampler=sampler, num_trials=30)
    assert longer[:16] == first[:16], "a longer search begins as the shorter one"
    assert world.run(sampler=sampler, num_trials=20, seed=1) != first


def test_a_search_that_was_killed_goes_on(tmp_path: Path) -> None:
    whole, killed = World(tmp_path / "a"), World(tmp_path / "b")
    asked = whole.run(num_trials=20)
    search = killed.search(num_trials=20)
    for trial in killed.family.trials:
        killed.finish(trial)
    for trial in [*search.next_trials(), *search.next_trials()[:3]]:
        killed.finish(trial)
    before = killed.made
    assert killed.run(num_trials=20) == asked
    assert killed.made == whole.made > before


def test_a_small_space_is_searched_through_and_that_is_the_end(tmp_path: Path) -> None:
    world = World(tmp_path)
    full, none = IterationSchedule((1, 0, 0, 1, 0, 1)), FAMILY[-1]
    family = world.family.model_copy(update={"trials": (world.trial(full), world.trial(none))})
    search = ScheduleSearch(family, full, SearchSettings(num_trials=10**6), world.trial)
    asked: list[str] = []
    while trials := search.next_trials():
        asked += [trial.label for trial in trials]
        for trial in trials:
            world.finish(trial)
    assert search.num_schedules == 2**3
    assert len(set(asked)) == len(asked) == search.num_schedules - 2
    assert search.num_left == 0


def test_it_finds_a_better_front_than_the_family(tmp_path: Path) -> None:
    world = World(tmp_path)
    given = {str(schedule) for schedule in FAMILY}
    asked = world.run(num_trials=60)

    def front(labels: set[str]) -> float:
        results = [
            sample_trial(
                key=label, role="teacher" if label == str(FULL) else "trial", method="iiet",
                quality={"accuracy": accuracy(IterationSchedule.parse(label, num_layers=6))},
                cost={"evaluations": 6 + sum(map(int, label.split(",")))},
            )
            for label in sorted(labels)
        ]  # fmt: skip
        return find_front(results).hypervolume or math.nan

    every = {",".join(map(str, s)) for s in itertools.product(*(range(r + 1) for r in FULL))}
    best, found, start = front(every), front(given | set(asked)), front(given)
    assert start < found <= best
    assert found - start > 0.6 * (best - start), "a quarter of the schedules, most of the gain"


def test_a_failed_trial_does_not_end_the_search(tmp_path: Path) -> None:
    world = World(tmp_path)
    victim = world.run(num_trials=3)[1]
    other = World(tmp_path / "other")
    assert len(set(other.run(num_trials=12, failing=victim))) == 12


def test_the_plan_of_a_dry_run_holds_what_is_finished_and_the_next_round(tmp_path: Path) -> None:
    world = World(tmp_path)
    asked = world.run(num_trials=5)
    search = world.search(num_trials=20)
    labels = [trial.label for trial in search.known_trials()]
    assert labels[: len(asked)] == asked
    assert len(asked) < len(labels) < 20
    assert search.num_left == 20 - len(labels)


def test_a_quality_that_is_not_measured_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search.objective=bits_per_byte.*accuracy"):
        World(tmp_path).run(objective="bits_per_byte")


def test_the_plan_of_a_search_has_a_key_of_its_own(tmp_path: Path) -> None:
    family = World(tmp_path).family
    plan = search_plan(family, SearchSettings())
    assert plan.kind == "search"
    assert plan.name.startswith("search-")
    assert plan.trials == family.trials
    keys = {plan.key, family.key, search_plan(family, SearchSettings(seed=1)).key}
    assert len(keys) == 3
