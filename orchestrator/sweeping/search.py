"""Search free schedules, any number of corrections in any layer, with Optuna.

The study is stored in the sweep's folder, where `optuna-dashboard` can open it. The students of the
threshold family enter it as finished trials. A suggestion that is already known is closed at once,
and the sampler is asked again.
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

from iiet.model.schedule import LEFT_OUT, IterationSchedule
from orchestrator.records.metrics import QUALITY, quality_name
from orchestrator.records.trial import SweepTrials, Trial
from orchestrator.settings import SearchSettings
from orchestrator.settings.sweep import MAX_SEED
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import damage_named, damaged

STUDY_FILE = "optuna.journal"
MAX_DUPLICATES = 20
"""After this many known suggestions in a row, a random unknown schedule is tried instead."""


class ScheduleSearch:
    """One search: its stored study, and the trials of the schedules in it."""

    def __init__(
        self,
        plan: SweepTrials,
        full: IterationSchedule,
        settings: SearchSettings,
        make_trial: Callable[[IterationSchedule], Trial],
        *,
        max_left_out: int = 0,
        folder: Path,
    ) -> None:
        """Read the stored study, if there is one. Nothing is written before `open`.

        Args:
            plan: The search's plan, with the trials of the family.
            full: Largest number of corrections of each layer.
            max_left_out: Most layers that a schedule leaves out.
            folder: The sweep's folder.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._full = full
        self._settings = settings
        self._make_trial = make_trial
        self._path = folder / STUDY_FILE
        self._name = plan.key
        self._max_left_out = max_left_out
        self._least = LEFT_OUT if max_left_out else 0
        self._space: dict[str, BaseDistribution] = {
            _layer_name(layer): IntDistribution(self._least, most)
            for layer, most in enumerate(full)
            if most > self._least
        }
        self._trials = {
            # The schedule of a plain model with all layers has no text.
            IterationSchedule.parse(trial.schedule_text or full, num_layers=len(full)): trial
            for trial in plan.trials
            if trial.role == "trial"
        }
        """Schedule -> trial, for all known ones: the family, then suggestions."""
        self._num_family = len(self._trials)
        self._suggested: dict[str, int] = {}
        """Key of a running trial that this process suggested -> its number in the study."""
        self._study: optuna.Study | None = None
        if self._path.exists():
            with self._damage_named():
                storage = JournalStorage(JournalFileBackend(str(self._path)))
                if self._name in optuna.get_all_study_names(storage):
                    self._take_over(optuna.load_study(study_name=self._name, storage=storage))

    @property
    def num_schedules(self) -> int:
        """Number of schedules to choose from."""
        number = self._full.num_within(self._max_left_out)
        # A plain teacher with all layers is the teacher itself.
        return number if self._full.num_corrections else number - 1

    @property
    def num_wanted(self) -> int:
        """Largest number of schedules that the search suggests, over all restarts."""
        known = [*self._trials][: self._num_family]
        num_known = sum(map(self._is_searched, known))
        return min(self._settings.num_trials, self.num_schedules - num_known)

    @property
    def num_left(self) -> int:
        """Number of schedules that remain to be suggested."""
        return max(0, self.num_wanted - (len(self._trials) - self._num_family))

    @property
    def text(self) -> str:
        """What the search will try, as a sentence for a plan."""
        if not self.num_wanted:
            return "the search has nothing to try besides the family"
        return (
            f"the search tries at most {self.num_wanted:,} more of {self.num_schedules:,} "
            f"schedules. {self.num_left:,} are not known yet, as they depend on results; "
            "they are priced with all of the teacher's corrections"
        )

    @property
    def is_open(self) -> bool:
        """Whether it can suggest schedules."""
        return self._study is not None

    def suggested_trials(self) -> list[Trial]:
        """Return the trials that were suggested so far."""
        return [*self._trials.values()][self._num_family :]

    def open(self, results: Mapping[str, Trial]) -> None:
        """Open the study, close trials that a killed process left open, and enter finished ones.

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
            if self._path.exists():  # Complete its last line, to which Optuna would append.
                os.truncate(self._path, self._path.read_bytes().rfind(b"\n") + 1)
            is_maximized = self._settings.objective == "accuracy"
            study = optuna.create_study(
                directions=["maximize" if is_maximized else "minimize", "minimize"],
                study_name=self._name,
                storage=JournalStorage(JournalFileBackend(str(self._path))),
                load_if_exists=True,
            )
            self._take_over(study)
            # Optuna's default sampler with a seed, so that equal searches suggest equal schedules.
            # A resumed search takes another seed, or it would repeat its suggestions.
            seed = (self._settings.seed + len(study.trials)) % (MAX_SEED + 1)
            study.sampler = optuna.samplers.TPESampler(seed=seed)
            for stored in study.get_trials(states=(TrialState.RUNNING,)):
                study.tell(stored.number, state=TrialState.FAIL)
            self._study = study
            self.enter(results)

    def suggest(self) -> Trial | None:
        """Return the trial of an unknown schedule; None if enough were suggested."""
        study = self._study
        assert study is not None, "call open first"
        num_attempts = 0
        while self.num_left:
            num_attempts += 1
            if num_attempts % MAX_DUPLICATES == 0:
                study.enqueue_trial(self._point(self._unknown_schedule(seed=len(study.trials))))
            suggestion = study.ask(self._space)
            schedule = self._schedule(suggestion)
            if schedule is None or schedule in self._trials:
                study.tell(suggestion, state=TrialState.FAIL)
                continue
            trial = self._make_trial(schedule)
            self._trials[schedule] = trial
            self._suggested[trial.key] = suggestion.number
            return trial
        return None

    def _unknown_schedule(self, seed: int) -> IterationSchedule:
        """Draw a random unknown schedule, which exists while `num_left` is above 0."""
        draw = random.Random(seed)
        is_plain = not self._full.num_corrections
        while True:
            counts = [draw.randint(0, most) for most in self._full]
            num_left_out = draw.randint(1 if is_plain else 0, self._max_left_out)
            for layer in draw.sample(range(len(counts)), num_left_out):
                counts[layer] = LEFT_OUT
            schedule = IterationSchedule(tuple(counts))
            if schedule not in self._trials:
                return schedule

    def tell(self, trial: Trial, result: Trial | None) -> None:
        """Store the values of an ended trial, if this process suggested it."""
        number = self._suggested.pop(trial.key, None)
        if self._study is None or number is None:
            return
        values = self._values(result) if result else None
        self._study.tell(number, values, TrialState.COMPLETE if values else TrialState.FAIL)

    def enter(self, results: Mapping[str, Trial]) -> None:
        """Enter measured trials whose values are not in the study."""
        if self._study is None:
            return
        complete = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        entered = {self._schedule(stored) for stored in complete}
        for schedule, trial in self._trials.items():
            result = results.get(trial.key)
            values = self._values(result) if result else None
            if values and schedule not in entered and self._is_searched(schedule):
                self._study.add_trial(
                    create_trial(
                        params=self._point(schedule),
                        distributions=self._space,
                        values=values,
                    )
                )

    def _values(self, result: Trial) -> list[float] | None:
        """Return quality and cost; None if the quality is not finite."""
        quality = result.value(quality_name(self._settings.objective))
        cost = float(result.model.corrections.num_evaluations)
        return None if quality is None else [quality, cost]

    def _take_over(self, study: optuna.Study) -> None:
        """Take over unknown schedules from the study."""
        for stored in study.get_trials(deepcopy=False):
            schedule = self._schedule(stored)
            if self._is_whole(stored) and schedule and schedule not in self._trials:
                self._trials[schedule] = self._make_trial(schedule)

    def _is_whole(self, stored: FrozenTrial) -> bool:
        # A process that is killed during a suggestion leaves an incomplete schedule.
        return stored.params.keys() == self._space.keys()

    def _schedule(self, stored: FrozenTrial | optuna.Trial) -> IterationSchedule | None:
        """Return the schedule of an Optuna trial; None if it leaves out too many layers, or if it
        is that of a plain teacher."""
        layers = range(len(self._full))
        counts = tuple(stored.params.get(_layer_name(layer), 0) for layer in layers)
        if counts.count(LEFT_OUT) == len(counts):
            return None
        schedule = IterationSchedule(counts)
        return schedule if self._is_searched(schedule) else None

    def _is_searched(self, schedule: IterationSchedule) -> bool:
        """Return whether the search may suggest a schedule. Schedules of the user may leave out
        more layers, or none of a plain teacher."""
        is_teacher = not self._full.num_corrections and schedule == self._full
        return not is_teacher and len(schedule.left_out_layers) <= self._max_left_out

    def _point(self, schedule: IterationSchedule) -> dict[str, int]:
        return {
            _layer_name(layer): schedule[layer]
            for layer, most in enumerate(self._full)
            if most > self._least
        }

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            with damage_named(self._path):
                yield
        except (AssertionError, OptunaError) as error:
            raise damaged(self._path, repr(error)) from None


def _layer_name(layer: int) -> str:
    return f"r_{layer + 1:02d}"
