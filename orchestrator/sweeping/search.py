"""A search over free schedules: any number of corrections in any layer, by Optuna's samplers.

In: a planned family (the warm start), and a way to plan the trial of any schedule. Out: round by
round the next trials; quality and evaluations of finished ones are what the sampler learns from.

Ray Tune's own bridge to Optuna makes a trial of every suggestion, repeated ones included, and
suggests in the order in which trials happen to end, so that two runs of one search differ. Here
Optuna is asked for a whole round and told of it afterwards: the suggestions follow from the seed
and the results alone. Hence nothing of a search is stored. It starts over each time, and what it
asked for before is found finished; that is how it resumes, and why the same command again trains
nothing. A schedule that is suggested twice is answered from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import optuna

from iiet.schedule import IterationSchedule
from orchestrator.settings import SearchSettings
from orchestrator.sweeping.trials import PlannedTrial, SweepPlan
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.provenance import content_key

MOST_ROUNDS_WITHOUT_NEWS = 100
"""After so many rounds of nothing but known schedules the sampler has no more to say."""

MakeTrial = Callable[[IterationSchedule], PlannedTrial]
"""Plans the trial of a schedule."""


def search_plan(family: SweepPlan, settings: SearchSettings, name: str | None = None) -> SweepPlan:
    """Return the plan that a search starts with: the family's trials, under the search's name.

    Args:
        family: Plan of the schedules that the search knows before it suggests any.
        settings: What is searched, and how.
        name: Name of the sweep; made from its key when unset.
    """
    key = content_key("search", family.key, settings.model_dump(mode="json"))
    return replace(family, key=key, kind="search", name=name or f"search-{key[:8]}")


class ScheduleSearch:
    """One search: suggests trials, and hears how they ended."""

    def __init__(
        self,
        family: SweepPlan,
        full: IterationSchedule,
        settings: SearchSettings,
        make_trial: MakeTrial,
    ) -> None:
        """Start from a family.

        Args:
            family: Its students are the first that the sampler hears of.
            full: Most corrections of each layer.
            settings: How many schedules to try, for which quality, by which sampler.
            make_trial: Plans the trial of a schedule.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._full, self._settings, self._make_trial = full, settings, make_trial
        self._known = {_schedule(t): t for t in family.trials if t.role == "trial"}
        self._num_given = len(self._known)
        self._asked: list[tuple[optuna.Trial, IterationSchedule]] = []
        least, most = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
        self._study = optuna.create_study(
            directions=[most if settings.objective == "accuracy" else least, least],
            sampler=_sampler(settings, self._num_given),
        )
        for schedule in self._known:
            self._study.enqueue_trial({_name(n): schedule[n] for n in self._free_layers})

    @property
    def num_schedules(self) -> int:
        """How many schedules there are to choose from."""
        return self._full.num_within

    @property
    def num_wanted(self) -> int:
        """How many schedules are tried at most beside the family's."""
        return min(self._settings.num_trials, self.num_schedules - self._num_given)

    @property
    def num_left(self) -> int:
        """How many of those are not known yet."""
        return self.num_wanted + self._num_given - len(self._known)

    def next_trials(self) -> list[PlannedTrial]:
        """Hear how the last round ended, and return the trials of the next; none at the end."""
        if not self._study.trials:
            self._ask(self._num_given)  # Those that were enqueued come first.
        self._tell()
        for _ in range(MOST_ROUNDS_WITHOUT_NEWS):
            new = self._ask(self._settings.trials_per_round)
            if new or not self.num_left:
                return new
            self._tell()
        return []

    def finished_part(self) -> list[PlannedTrial]:
        """Return what the search has asked for as far as all of it is finished, and grow no more
        after that.
        """
        found: list[PlannedTrial] = []
        while (new := self.next_trials()) and all(trial.result() for trial in new):
            found += new
        return [*found, *new]

    @property
    def _free_layers(self) -> list[int]:
        return [n for n, most in enumerate(self._full) if most]

    def _ask(self, most: int) -> list[PlannedTrial]:
        new = []
        while len(self._asked) < most and self.num_left:
            trial = self._study.ask()
            corrections = [0] * len(self._full)
            for n in self._free_layers:
                corrections[n] = trial.suggest_int(_name(n), 0, self._full[n])
            schedule = IterationSchedule(tuple(corrections))
            self._asked.append((trial, schedule))
            if schedule not in self._known:
                self._known[schedule] = self._make_trial(schedule)
                new.append(self._known[schedule])
        return new

    def _tell(self) -> None:
        for trial, schedule in self._asked:
            values = self._values(self._known[schedule])
            if values is None:
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                self._study.tell(trial, values)
        self._asked = []

    def _values(self, trial: PlannedTrial) -> Sequence[float] | None:
        result = trial.result()
        if result is None:
            return None
        quality = result.value(f"quality/{self._settings.objective}")
        if quality is None:
            raise UserError(
                f"search.objective={self._settings.objective}: the tasks of this sweep do not give "
                f"it; they give {', '.join(sorted(result.quality))}"
            )
        return quality, float(_schedule(trial).num_evaluations)


def _sampler(settings: SearchSettings, num_given: int) -> optuna.samplers.BaseSampler:
    if settings.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(
            population_size=settings.trials_per_round, seed=settings.seed
        )
    return optuna.samplers.TPESampler(n_startup_trials=num_given, seed=settings.seed)


def _schedule(trial: PlannedTrial) -> IterationSchedule:
    return trial.config().corrections


def _name(layer: int) -> str:
    return f"r_{layer + 1:02d}"
