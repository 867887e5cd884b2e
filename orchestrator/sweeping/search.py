"""Search free schedules, any number of corrections in any layer, with Optuna's samplers.

Optuna is asked for a whole round of schedules and told all results afterwards, so its suggestions
follow from the seed and the results alone. Nothing of a search is stored: it starts over each
time and finds finished trials on disk, which is how it resumes. Ray Tune's own bridge to Optuna
suggests in the order in which trials happen to end, so two runs of one search would differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import optuna

from iiet.schedule import IterationSchedule
from orchestrator.records.sweep_plan import SweepPlan
from orchestrator.records.trial import Trial
from orchestrator.settings import SearchSettings
from orchestrator.workspace.errors import UserError

MAX_ROUNDS_WITHOUT_NEW = 100
"""The search ends after this many rounds without a new schedule."""

MakeTrial = Callable[[IterationSchedule], Trial]
"""Returns the trial of a schedule."""


class ScheduleSearch:
    """One search: suggests trials by the results of earlier ones."""

    def __init__(
        self,
        family: SweepPlan,
        full: IterationSchedule,
        settings: SearchSettings,
        make_trial: MakeTrial,
    ) -> None:
        """Start from a family, whose students are the first results that the sampler gets.

        Args:
            family: Plan of the family.
            full: Largest number of corrections of each layer.
            settings: Number of trials, objective and sampler.
            make_trial: Returns the trial of a schedule.
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
        """Number of schedules to choose from."""
        return self._full.num_within

    @property
    def num_wanted(self) -> int:
        """Largest number of schedules that are tried in addition to the family's."""
        return min(self._settings.num_trials, self.num_schedules - self._num_given)

    @property
    def num_left(self) -> int:
        """Number of those that were not suggested yet."""
        return self.num_wanted + self._num_given - len(self._known)

    def next_trials(self) -> list[Trial]:
        """Give the sampler the last results, and return the next trials; none at the end."""
        if not self._study.trials:
            self._ask(self._num_given)  # Those that were enqueued come first.
        self._report_results()
        for _ in range(MAX_ROUNDS_WITHOUT_NEW):
            new = self._ask(self._settings.trials_per_round)
            if new or not self.num_left:
                return new
            self._report_results()
        return []

    def known_trials(self) -> list[Trial]:
        """Return the finished trials that the search suggests, and the first unfinished round."""
        found: list[Trial] = []
        while (new := self.next_trials()) and all(trial.result() for trial in new):
            found += new
        return [*found, *new]

    @property
    def _free_layers(self) -> list[int]:
        return [n for n, most in enumerate(self._full) if most]

    def _ask(self, most: int) -> list[Trial]:
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

    def _report_results(self) -> None:
        for trial, schedule in self._asked:
            values = self._values(self._known[schedule])
            if values is None:
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                self._study.tell(trial, values)
        self._asked = []

    def _values(self, trial: Trial) -> Sequence[float] | None:
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


def _schedule(trial: Trial) -> IterationSchedule:
    return trial.model.corrections


def _name(layer: int) -> str:
    return f"r_{layer + 1:02d}"
