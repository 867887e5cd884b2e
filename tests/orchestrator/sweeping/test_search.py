"""A search: seeded, each schedule once, nothing made twice, and a better front than the family."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from fake_tracking import FakeTracking
from kept_progress import KeptProgress
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import TrialState

from iiet.iiad.pruning import InfluenceTable
from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.records.evaluation import Suite
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.settings import SearchSettings, resolve_settings
from orchestrator.sweeping.search import STUDY_FILE, ScheduleSearch
from orchestrator.sweeping.states import RunningSweep, trial_states
from orchestrator.sweeping.students import Students
from orchestrator.sweeping.trials import make_search, trials_of_search, trials_of_students
from orchestrator.sweeping.view import SweepView
from orchestrator.workspace.layout import open_workspace

FULL = IterationSchedule((2, 2, 0, 2, 2, 2))
FAMILY = [FULL, IterationSchedule((1, 1, 0, 1, 1, 1)), IterationSchedule((0,) * 6)]
GAINS = (0.01, 0.04, 0.0, 0.02, 0.08, 0.03)
"""The accuracy that a layer's first correction adds; a second one adds a tenth of it."""


def accuracy(schedule: IterationSchedule) -> float:
    return 0.3 + sum(
        gain * (min(r, 1) + max(r - 1, 0) / 10) for gain, r in zip(GAINS, schedule, strict=True)
    )


class World:
    """Trials in a folder; `finish` does as if they were trained. The first schedule of the family
    is the full one."""

    def __init__(
        self, folder: Path, family: Sequence[IterationSchedule] = FAMILY, max_left_out: int = 0
    ) -> None:
        self.max_left_out = max_left_out
        self.workspace = open_workspace(folder)
        self.folder = folder
        self.num_made = 0
        self.full = family[0]
        self.accuracy = accuracy
        teacher = self.trial(self.full).model_copy(update={"role": "teacher", "key": "teacher"})
        self.family = SweepTrials(
            key="family", name="family", kind="threshold", tokens_folder="", teacher="",
            num_requested=len(family), trials=(teacher, *map(self.trial, family)),
        )  # fmt: skip

    def trial(self, schedule: IterationSchedule) -> Trial:
        is_plain = not self.full.num_corrections
        full = ModelConfig(
            vocab_size=64, dim=16, num_layers=6, num_heads=2, num_kv_heads=2, ffn_dim=32,
            context_length=16, method="vanilla" if is_plain else "iiet",
            schedule=None if is_plain else self.full,
        )  # fmt: skip
        key = str(schedule).replace(",", "")
        return Trial(
            key=key, role="trial", label=str(schedule), parent="parent",
            model=full.of_kept_layers(schedule), suite=Suite(),
            teacher_schedule=str(schedule) if schedule.left_out_layers else None,
            folder=str(self.workspace.trials / key),
        )  # fmt: skip

    def finish(self, trial: Trial) -> None:
        if trial.result() is None:
            self.num_made += trial.role == "trial"
            text = trial.schedule_text or self.full
            right = self.accuracy(IterationSchedule.parse(text, num_layers=6))
            quality = {"accuracy": right, "bits_per_byte": 1.0 - right}
            trial.with_numbers("quality", quality).write(trial.result_path)

    def search(self, **settings: Any) -> ScheduleSearch:
        search_settings = SearchSettings(**settings)
        plan = trials_of_search(self.family, search_settings, "search")
        return ScheduleSearch(
            plan, self.full, search_settings, self.trial,
            max_left_out=self.max_left_out, folder=self.folder,
        )  # fmt: skip

    def run(
        self, *, failing: str = "", at_once: int = 1, most: int = 10**6, **settings: Any
    ) -> list[str]:
        """Run a search as Tune does, and return what it suggested, in this order.

        It is killed once it has suggested `most` schedules.
        """
        search = self.search(**settings)
        suggested = []
        for trial in (*self.family.trials, *search.suggested_trials()):
            self.finish(trial)
        search.open(self.results(search))
        running: list[Trial] = []
        while len(suggested) < most:
            while len(running) < at_once and len(suggested) < most:
                trial = search.suggest()
                if trial is None:
                    break
                running.append(trial)
                suggested.append(trial.label)
            if not running:
                break
            trial = running.pop(0)
            if trial.label != failing:
                self.finish(trial)
            search.tell(trial, trial.result())
        return suggested

    def results(self, search: ScheduleSearch) -> dict[str, Trial]:
        trials = [*self.family.trials, *search.suggested_trials()]
        return {trial.key: result for trial in trials if (result := trial.result())}

    def study(self) -> optuna.Study:
        """Open the stored study as a person does."""
        storage = JournalStorage(JournalFileBackend(str(self.folder / STUDY_FILE)))
        return optuna.load_study(study_name=None, storage=storage)

    def complete(self) -> list[tuple[int, ...]]:
        """Return the schedules in the study that have values, in order."""
        return [
            tuple(stored.params.get(f"r_{n:02d}", 0) for n in range(1, 7))
            for stored in self.study().get_trials(states=(TrialState.COMPLETE,))
        ]


def test_each_schedule_once_and_the_same_command_trains_nothing(tmp_path):
    world = World(tmp_path / "a")
    same_world = World(tmp_path / "b")
    suggested = world.run(num_trials=5)
    assert len(suggested) == len(set(suggested)) == 5
    assert not set(suggested) & {str(schedule) for schedule in FAMILY}
    assert all(text.split(",")[2] == "0" for text in suggested), "no more than the teacher has"
    assert same_world.run(num_trials=5) == suggested, "the seed decides"
    assert world.study().directions == [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    assert len(world.complete()) == len(set(world.complete())) == 5 + len(FAMILY)
    num_made = world.num_made
    assert world.run(num_trials=5) == []
    assert [trial.label for trial in world.search().suggested_trials()] == suggested
    assert len(world.run(num_trials=6)) == 1, "a longer one goes on"
    assert world.num_made == num_made + 1


def test_a_search_for_all_schedules_suggests_each_once(tmp_path):
    full, none = IterationSchedule((1, 0, 0, 1, 0, 1)), IterationSchedule((0,) * 6)
    suggested = World(tmp_path, [full, none]).run(num_trials=99, most=20)
    assert len(suggested) == len(set(suggested)) == 2**3 - 2, "the family has two"


def test_a_search_follows_the_family_and_learns_from_all_of_it(tmp_path, tiny_tokens):
    world = World(tmp_path)
    progress = KeptProgress()
    search = world.search(num_trials=1)
    family = world.family.trials
    tracking = FakeTracking()
    plan = world.family.model_copy(update={"tokens_folder": str(tiny_tokens)})
    settings = resolve_settings({})
    queue = RunningSweep(plan, trial_states(plan, settings.sweep), search)
    view = SweepView(queue, settings, open_workspace(tmp_path), tracking, progress)
    assert queue.num_ready == len(family) + 1
    running = [queue.take() for _ in range(len(family) + 1)]
    assert running.pop() is None, "the search waits for the last of the family"
    for trial in running:
        world.finish(trial)
        queue.on_end(trial.key, trial.result(), "")
        view.update()
    assert progress.done == [1, 2, 3, 4], "what is not suggested yet is not done"
    assert not queue.is_over, "the last suggestion is left"
    assert queue.num_all == len(family) + 1
    assert [trial for trial in (queue.take(), queue.take()) if trial] == search.suggested_trials()
    assert queue.all_trials.trials == (*family, *search.suggested_trials())
    assert len(world.complete()) == len(FAMILY), "the teacher is one of them"
    assert not queue.is_over


def test_a_search_that_was_killed_resumes_its_study_and_trains_nothing_twice(tmp_path):
    world = World(tmp_path)
    before = world.run(num_trials=12, at_once=3, most=6)
    running = world.study().get_trials(states=(TrialState.RUNNING,))
    assert len(running) == 2, "as a killed process leaves them"
    half_trained = [trial for trial in world.search().suggested_trials() if not trial.result()]
    assert len(half_trained) == 2, "they are run first"
    num_made = world.num_made
    after = world.run(num_trials=12, at_once=3)
    assert len(set(before) | set(after)) == len(before) + len(after) == 12
    assert world.num_made == num_made + len(half_trained) + len(after) == 12 + len(FAMILY)
    assert world.study().get_trials(states=(TrialState.RUNNING,)) == []
    assert len(world.complete()) == len(set(world.complete())) == 12 + len(FAMILY)


def test_a_search_that_goes_on_draws_other_schedules_than_before(tmp_path):
    world = World(tmp_path)
    world.run(num_trials=8, most=4)
    world.run(num_trials=8)
    closed = world.study().get_trials(states=(TrialState.FAIL,))
    assert not closed, "what the sampler suggests is new"


def test_a_search_continues_after_a_line_that_a_crash_cut_off(tmp_path):
    world = World(tmp_path)
    before = world.run(num_trials=6, most=3)
    with (tmp_path / STUDY_FILE).open("a") as file:
        file.write('{"op_code": 4, "worker_')
    after = world.run(num_trials=6)
    assert len(set(before) | set(after)) == 6
    assert len(world.complete()) == 6 + len(FAMILY), "what was written after it can be read"


def test_a_loss_is_searched_for_its_lowest_values(tmp_path):
    world = World(tmp_path)
    world.run(objective="bits_per_byte", num_trials=1)
    assert world.study().directions == [StudyDirection.MINIMIZE, StudyDirection.MINIMIZE]


def test_a_small_space_is_searched_through_and_that_is_the_end(tmp_path):
    world = World(tmp_path)
    world.full = IterationSchedule((1, 0, 0, 1, 0, 1))
    trials = (world.trial(world.full), world.trial(FAMILY[-1]))
    world.family = world.family.model_copy(update={"trials": trials})
    suggested = world.run(num_trials=10**6)
    search = world.search(num_trials=10**6)
    assert search.num_schedules == 2**3
    assert len(set(suggested)) == len(suggested) == search.num_schedules - 2
    assert search.num_left == 0


def schedules_of(*texts: str) -> list[IterationSchedule]:
    return [IterationSchedule.parse(text, num_layers=6) for text in texts]


def test_a_search_that_leaves_layers_out_suggests_each_schedule_but_the_plain_teacher(tmp_path):
    world = World(tmp_path, schedules_of("0*6", "x,0*5"), max_left_out=1)
    world.family = world.family.model_copy(update={"trials": world.family.trials[2:]})
    before = world.run(num_trials=99, most=2)
    after = world.run(num_trials=99)
    expected = {",".join("x" if n == layer else "0" for n in range(6)) for layer in range(1, 6)}
    assert {*before, *after} == expected
    assert len(before) + len(after) == 5, "a killed search goes on"
    assert world.search(num_trials=99).num_left == 0
    assert len(world.complete()) == 6, "the family's is one of them"


def test_a_search_leaves_out_no_more_layers_than_it_may_beside_corrections(tmp_path):
    family = schedules_of("1*6", "0*6")
    suggested = schedules_of(*World(tmp_path, family, max_left_out=2).run(num_trials=12))
    num_left_out = [len(schedule.left_out_layers) for schedule in suggested]
    assert len(set(suggested)) == 12
    assert max(num_left_out) in (1, 2)
    assert any(schedule.num_corrections and schedule.left_out_layers for schedule in suggested)


@pytest.mark.parametrize(
    ("family", "max_left_out"),
    [
        (["1,0*5", "x,x,0*4"], 0),  # It leaves out layers, and the search none.
        (["0*6", "x,x,0*4", "x,0*5"], 1),  # All layers, distilled from themselves; and too few.
    ],
)
def test_schedules_of_ones_own_that_no_search_suggests_stand_beside_it(
    family, max_left_out, tmp_path
):
    world = World(tmp_path, schedules_of(*family), max_left_out=max_left_out)
    suggested = world.run(num_trials=99)
    assert len(suggested) == len(set(suggested)) == (5 if max_left_out else 1)
    assert not set(schedules_of(*suggested)) & set(schedules_of(*family))
    assert len(world.complete()) == (6 if max_left_out else 2)


@pytest.mark.parametrize("control", ["distill", "pruned"])
def test_suggested_trials_know_which_layers_of_the_teacher_they_are(
    control, tmp_path, save_tiny, tiny_tokens
):
    space = open_workspace(tmp_path)
    teacher = save_tiny(tmp_path / "plain", method="vanilla", schedule=None, num_layers=4)
    assignments = ["sweep.kind=search", f"distillation.control={control}", "search.num_trials=3"]
    settings = resolve_settings({}, [*assignments, "distillation.training.num_tokens_per_step=64"])
    suite = Suite(suite="x", tokens_folder=str(tiny_tokens))
    table = InfluenceTable(
        "loss", ((),) * 4, ((),) * 4, 64, layer_values=(4.0, 1.0, 2.0, 3.0)
    )  # fmt: skip
    plan = trials_of_search(
        trials_of_students(
            Students(settings.sweep, settings.distillation, space, teacher, suite, table)
        ),
        settings.search,
    )
    search = make_search(settings, space, plan, teacher)
    search.open({})
    for _ in range(3):
        trial = search.suggest()
        assert trial is not None
        schedule = IterationSchedule.parse(trial.teacher_schedule, num_layers=4)
        assert 1 <= len(schedule.left_out_layers) <= 2
        assert trial.model.num_layers == schedule.num_kept_layers
        if trial.job is not None:
            assert trial.job.kept_layers == schedule.kept_layers
    again = make_search(settings, space, plan, teacher)
    assert again.suggested_trials() == search.suggested_trials()


def test_a_plan_says_how_much_of_the_space_is_tried(tmp_path):
    world = World(tmp_path)
    text = world.search(num_trials=5).text
    assert "5 more of 243 schedules" in text
    world.full = IterationSchedule((1, 0, 0, 0, 0, 0))
    trials = (world.trial(world.full), world.trial(FAMILY[-1]))
    world.family = world.family.model_copy(update={"trials": trials})
    assert "nothing to try" in world.search(num_trials=5).text


@pytest.mark.slow
def test_it_finds_a_better_front_than_the_family(tmp_path):
    world = World(tmp_path)
    family_names = {str(schedule) for schedule in FAMILY}
    suggested = world.run(num_trials=24)

    def best_within_budgets(labels: set[str]) -> float:
        """Return the best accuracy within a budget of corrections, averaged over the budgets."""
        schedules = [IterationSchedule.parse(label, num_layers=6) for label in labels]
        best = [
            max(accuracy(schedule) for schedule in schedules if sum(schedule) <= budget)
            for budget in range(sum(FULL))
        ]
        return statistics.mean(best)

    every = {",".join(map(str, s)) for s in itertools.product(*(range(r + 1) for r in FULL))}
    of_all = best_within_budgets(every)
    of_search = best_within_budgets(family_names | set(suggested))
    of_family = best_within_budgets(family_names)
    assert of_family < of_search <= of_all
    assert of_search - of_family > 0.6 * (of_all - of_family), (
        "a tenth of the schedules, most of the gain"
    )


def test_a_failed_trial_does_not_end_the_search(tmp_path):
    world = World(tmp_path)
    victim = world.run(num_trials=3)[1]
    other = World(tmp_path / "other")
    assert len(set(other.run(num_trials=12, failing=victim))) == 12
    [unfinished] = [trial for trial in other.search().suggested_trials() if not trial.result()]
    assert unfinished.label == victim, "the same command tries it again"


def test_a_quality_that_is_no_number_closes_its_trial(tmp_path):
    world = World(tmp_path)
    world.accuracy = lambda schedule: math.nan if schedule[0] == 1 else accuracy(schedule)
    suggested = world.run(num_trials=12)
    nans = [text for text in suggested if text.startswith("1")]
    assert nans
    assert len(suggested) == 12
    assert world.study().get_trials(states=(TrialState.RUNNING,)) == []
    assert not any(schedule[0] == 1 for schedule in world.complete())
