"""Search free schedules, any number of corrections in any layer, with Optuna.

The study is stored in the sweep's folder, where `optuna-dashboard` can open it. The students of the
family enter it as finished trials. A suggestion that is known already is closed at once, so that it
is not trained again, and the sampler is asked again.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import OptunaError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from iiet.schedule import IterationSchedule
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.settings import SearchSettings
from orchestrator.settings.sweep import MAX_SEED
from orchestrator.terminal.metrics import QUALITY, quality_name
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import damage_named, damaged

STUDY_FILE = "optuna.journal"
MAX_DUPLICATES = 20
"""After this many known points in a row, an unknown one is tried instead of the sampler's."""


class ScheduleSearch:
    """One search: its stored study, and the trials of the schedules in it."""

    def __init__(
        self,
        plan: SweepTrials,
        full: IterationSchedule,
        settings: SearchSettings,
        make_trial: Callable[[IterationSchedule], Trial],
        *,
        folder: Path,
    ) -> None:
        """Read the stored study, if there is one. Nothing is written before `open`.

        Args:
            plan: The search's plan, with the trials of the family.
            full: Largest number of corrections of each layer.
            folder: The sweep's folder.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._full = full
        self._settings = settings
        self._make_trial = make_trial
        self._path = folder / STUDY_FILE
        self._name = plan.key
        self._space: dict[str, BaseDistribution] = {
            _layer_name(n): IntDistribution(0, most) for n, most in enumerate(full) if most
        }
        self._trials = {t.model.corrections: t for t in plan.trials if t.role == "trial"}
        """Schedule -> trial of all that are known: the family, then what is suggested."""
        self._num_family = len(self._trials)
        self._suggested: dict[str, int] = {}
        """Key of a trial that was suggested here and runs -> its number in the study."""
        self._study: optuna.Study | None = None
        if self._path.exists():
            with self._damage_named():
                storage = JournalStorage(JournalFileBackend(str(self._path)))
                if self._name in optuna.get_all_study_names(storage):
                    self._take_over(optuna.load_study(study_name=self._name, storage=storage))

    @property
    def num_schedules(self) -> int:
        """Number of schedules to choose from."""
        return self._full.num_within()

    @property
    def num_wanted(self) -> int:
        """Largest number of schedules that the search suggests, over all restarts."""
        return min(self._settings.num_trials, self.num_schedules - self._num_family)

    @property
    def num_left(self) -> int:
        """Number of schedules that are still to be suggested."""
        return max(0, self.num_wanted - (len(self._trials) - self._num_family))

    @property
    def text(self) -> str:
        """What the search will try, as a sentence of a plan."""
        if not self.num_wanted:
            return "the search has nothing to try beside the family"
        return (
            f"the search tries at most {self.num_wanted:,} more of {self.num_schedules:,} "
            f"schedules; which ones follows from the results, {self.num_left:,} are not "
            "known yet and priced as if each made all of the teacher's corrections"
        )

    @property
    def is_open(self) -> bool:
        """Whether it can suggest schedules."""
        return self._study is not None

    def suggested_trials(self) -> list[Trial]:
        """Return the trials that were suggested so far."""
        return [*self._trials.values()][self._num_family :]

    def open(self, results: Mapping[str, Trial]) -> None:
        """Open the study, close what a killed process left in it, and enter what is finished.

        Args:
            results: Key -> measured trial.

        Raises:
            UserError: If the study is damaged, or no trial has the objective.
        """
        keys = {trial.key for trial in self._trials.values()}
        qualities = {
            name.removeprefix(QUALITY)
            for key, result in results.items()
            for name in result.numbers
            if key in keys and name.startswith(QUALITY)
        }
        if qualities and self._settings.objective not in qualities:
            raise UserError(
                f"search.objective={self._settings.objective}: the tasks of this sweep do not give "
                f"it; they give {', '.join(sorted(qualities))}"
            )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._damage_named():
            if self._path.exists():  # Optuna would append to a line that a crash cut off.
                os.truncate(self._path, self._path.read_bytes().rfind(b"\n") + 1)
            is_maximized = self._settings.objective == "accuracy"
            study = optuna.create_study(
                directions=["maximize" if is_maximized else "minimize", "minimize"],
                study_name=self._name,
                storage=JournalStorage(JournalFileBackend(str(self._path))),
                load_if_exists=True,
            )
            self._take_over(study)
            # Optuna's default sampler, with a seed, so that the same search suggests the same. A
            # search that goes on takes another seed; the same one would suggest the same again.
            seed = (self._settings.seed + len(study.trials)) % (MAX_SEED + 1)
            study.sampler = optuna.samplers.TPESampler(seed=seed)
            for stored in study.get_trials(states=(TrialState.RUNNING,)):
                study.tell(stored.number, state=TrialState.FAIL)
            self._study = study
            self.enter(results)

    def suggest(self) -> Trial | None:
        """Return the trial of a schedule that is not known yet; None if enough were suggested."""
        study = self._study
        assert study is not None, "call open first"
        num_attempts = 0
        while self.num_left:
            num_attempts += 1
            if num_attempts % MAX_DUPLICATES == 0:
                study.enqueue_trial(self._point(self._unknown_schedule(seed=len(study.trials))))
            suggestion = study.ask(self._space)
            schedule = self._schedule(suggestion)
            if schedule in self._trials:
                study.tell(suggestion, state=TrialState.FAIL)
                continue
            trial = self._make_trial(schedule)
            self._trials[schedule] = trial
            self._suggested[trial.key] = suggestion.number
            return trial
        return None

    def _unknown_schedule(self, seed: int) -> IterationSchedule:
        """Draw a schedule that is not known; there is one while `num_left` is above 0."""
        draw = random.Random(seed)
        schedule = self._full
        while schedule in self._trials:
            schedule = IterationSchedule(tuple(draw.randint(0, most) for most in self._full))
        return schedule

    def tell(self, trial: Trial, result: Trial | None) -> None:
        """Store the values of a trial that has ended, if it was suggested here."""
        number = self._suggested.pop(trial.key, None)
        if self._study is None or number is None:
            return
        values = self._values(result) if result else None
        self._study.tell(number, values, TrialState.COMPLETE if values else TrialState.FAIL)

    def enter(self, results: Mapping[str, Trial]) -> None:
        """Enter the measured trials that are not in the study with their values."""
        if self._study is None:
            return
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        entered = {self._schedule(stored) for stored in complete}
        for schedule, trial in self._trials.items():
            result = results.get(trial.key)
            values = self._values(result) if result else None
            if values and schedule not in entered:
                self._study.add_trial(
                    create_trial(
                        params=self._point(schedule),
                        distributions=self._space,
                        values=values,
                    )
                )

    def _values(self, result: Trial) -> list[float] | None:
        """Return quality and cost; None if the quality is not known, as it is not finite."""
        quality = result.value(quality_name(self._settings.objective))
        cost = float(result.model.corrections.num_evaluations)
        return None if quality is None else [quality, cost]

    def _take_over(self, study: optuna.Study) -> None:
        """Take over the schedules in the study that are not known yet."""
        for stored in study.get_trials(deepcopy=False):
            schedule = self._schedule(stored)
            if self._is_whole(stored) and schedule not in self._trials:
                self._trials[schedule] = self._make_trial(schedule)

    def _is_whole(self, stored: FrozenTrial) -> bool:
        # A process that is killed while it asks leaves a part of a schedule.
        return stored.params.keys() == self._space.keys()

    def _schedule(self, stored: FrozenTrial | optuna.Trial) -> IterationSchedule:
        layers = range(len(self._full))
        return IterationSchedule(tuple(stored.params.get(_layer_name(n), 0) for n in layers))

    def _point(self, schedule: IterationSchedule) -> dict[str, int]:
        return {_layer_name(n): schedule[n] for n, most in enumerate(self._full) if most}

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            with damage_named(self._path):
                yield
        except (AssertionError, OptunaError) as error:
            raise damaged(self._path, repr(error)) from None


def _layer_name(layer: int) -> str:
    return f"r_{layer + 1:02d}"
