"""The plan of a sweep as a value: what the sweep does, what is left of it, and the price of that.

`stages.py` makes and changes the plan, and `sweep.py` runs it. States of trials, prices and
problems are computed at their first use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from orchestrator.cluster.task import lack_of_resources
from orchestrator.data.preparation import expected_tokens
from orchestrator.data.text import unread_note
from orchestrator.evaluation.heldout import LAST_WORD, has_accuracy, is_heldout_task
from orchestrator.evaluation.tasks import HELDOUT, named_tasks, needs_lm_eval
from orchestrator.pipelines.influence import InfluencePlan
from orchestrator.pipelines.training import TrainingPlan
from orchestrator.planning.estimate import Estimate
from orchestrator.planning.fit import find_problems
from orchestrator.planning.price import Price, price_of
from orchestrator.planning.speeds import Speed, measured_speeds
from orchestrator.planning.trial_gpus import assign_trial_gpus, on_trial_devices
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import AshaRule, SweepTrials
from orchestrator.reporting.command_tables import price_rows
from orchestrator.reporting.costs import exact_cost, full_trial
from orchestrator.reporting.output import Plan
from orchestrator.reporting.sections import two_column_table
from orchestrator.reporting.statistics import (
    EXPECTED_SHARE_DIFFERING,
    INTERVAL_LEVEL,
    POWER,
    resolvable_difference,
)
from orchestrator.settings import BASELINE_METHOD, Settings, SweepSettings
from orchestrator.settings.data import is_depth_task
from orchestrator.sweeping.models import SweptModels, check_devices
from orchestrator.sweeping.plan_text import plan_sentences, plan_table
from orchestrator.sweeping.retrofit import Retrofit
from orchestrator.sweeping.states import TrialState, competing_trials, trial_states
from orchestrator.sweeping.trials import unmeasured_trials
from orchestrator.terminal.render import format_count, join_names
from orchestrator.training.schedules import steps_before_corrections
from orchestrator.training.source import Source
from orchestrator.workspace.layout import Workspace

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.sweeping.search import ScheduleSearch
else:
    ScheduleSearch = Any  # Its module imports Optuna, which few sweeps need.


class SweepPlan(Plan):
    """What a sweep does, and what that takes."""

    # What it was asked for.
    settings: Settings
    workspace: Workspace
    teacher: Path | None
    """A given teacher; without it, the sweep trains its models from random weights."""
    named_baselines: Mapping[str, Path]
    """Label -> checkpoint of the runs in `sweep.baseline_runs`."""
    swept: SweptModels
    """What the sweep trains before its students, or instead of any."""
    models: Mapping[str, Settings] | None
    """Label -> settings of the models of an iterations sweep, if they were given."""
    name: str | None
    """The sweep's name; made from its content when unset."""

    # Stages, as far as they are planned.
    source: Source | None = None
    """The teacher's source model, if the settings name one that exists."""
    pretraining: tuple[TrainingPlan, ...] = ()
    """What is trained before the trials, in this order: the source model; the teachers and their
    baselines, if the sweep trains them; the controls of a teacher with a source model, the last one
    being `source_continued`. A training whose start is not trained yet can only be priced."""
    retrofit: Retrofit | None = None
    """The controls of a teacher with a source model."""
    control_gap: str = ""
    """Why a given teacher with a source model has no controls."""
    influence: dict[str, InfluencePlan] = Field(default={})
    """Label of a teacher -> measurement; empty while the teachers are not trained."""
    planned_trials: SweepTrials | None = None
    """The trials, as far as they are known; see `is_complete`."""
    search: ScheduleSearch | None = None
    """What suggests further trials, if the sweep is a search."""

    # What is not known yet.
    bound: list[Estimate] = Field(default=[])
    """Trainings that together cost at least as much as those of the unknown trials."""
    gaps: list[str] = Field(default=[])
    """What is not prepared, trained, measured or known yet."""

    @property
    def trials(self) -> SweepTrials:
        """The known trials; without a trained teacher, the models that are pretrained."""
        assert self.planned_trials, "plan_sweep plans some"
        return self.planned_trials

    @property
    def is_complete(self) -> bool:
        """Whether all trials are known, except those that a search will suggest."""
        if not self.trials.tokens_folder:
            return False
        if self.settings.sweep.kind == "iterations":
            return True
        are_trained = self.pretrained.keys() == {
            label for stage in self.pretraining for label in stage.jobs
        }
        are_measured = all(measurement.is_stored for measurement in self.influence.values())
        return are_trained and are_measured

    def changed(self, **changes: Any) -> Self:
        """Return the plan with other values, and without cached properties of the old ones."""
        plan = self.model_copy(update=changes)
        # Cached properties are stored in the same dictionary as the fields.
        for name in vars(plan).keys() - type(self).model_fields.keys():
            del vars(plan)[name]
        return plan

    @cached_property
    def pretrained(self) -> dict[str, Path]:
        """Label -> checkpoint of each finished training before the trials."""
        checkpoints: dict[str, Path] = {}
        for stage in self.pretraining:
            checkpoints |= stage.finished
        return checkpoints

    @cached_property
    def states(self) -> list[TrialState]:
        """The state of each trial, and of each model that is pretrained first."""
        states = trial_states(self.trials, self.settings.sweep)
        if self.trials.teacher:  # Otherwise these models are the plan's trials.
            jobs = {
                label: job
                for stage in self.pretraining
                for label, job in stage.jobs.items()
                if label not in stage.finished
            }
            if jobs:
                pretrained = unmeasured_trials(jobs)
                states += trial_states(pretrained, self.settings.sweep)
        return states

    @cached_property
    def pretraining_left(self) -> list[Estimate]:
        """Trainings before the trials that are not finished."""
        return [training for stage in self.pretraining for training in stage.trainings_left]

    @cached_property
    def trials_left(self) -> list[Estimate]:
        """Unfinished trainings of the trials, and the bound of unknown ones."""
        pretrained = {job.run_folder for stage in self.pretraining for job in stage.jobs.values()}
        of_trials = [
            state.training
            for state in self.states
            if state.training and state.trial.folder not in pretrained
        ]
        return [*of_trials, *self.bound]

    @cached_property
    def placed(self) -> Settings:
        """The settings, with the number of GPUs of each trial."""
        return assign_trial_gpus(self.settings, self.trials_left)

    @cached_property
    def trainings_left(self) -> list[Estimate]:
        """All remaining trainings, each on its devices."""
        return [*self.pretraining_left, *on_trial_devices(self.trials_left, self.placed)]

    @cached_property
    def price(self) -> Price:
        """Tokens, FLOPs, hours, memory and disk of the remaining work."""
        new_token_bytes = 0
        if not self.trials.tokens_folder:
            new_token_bytes = expected_tokens(self.settings.data, None).new_bytes
        return price_of(
            self.trainings_left,
            self.workspace.root,
            speeds=self.speeds,
            hours_of_influence=self._hours_of_influence,
            new_token_bytes=new_token_bytes,
            is_upper_bound=bool(self.bound),
        )

    @cached_property
    def speeds(self) -> list[Speed]:
        """How fast earlier trainings of the workspace were."""
        return measured_speeds(self.workspace)

    @property
    def _hours_of_influence(self) -> tuple[float, float]:
        """Shortest and longest hours of measuring the teachers' influence."""
        on_gpu = self.settings.trials_use_gpus
        ranges = [measurement.hours(on_gpu=on_gpu) for measurement in self.influence.values()]
        return sum(shortest for shortest, _ in ranges), sum(longest for _, longest in ranges)

    @cached_property
    def control_prices(self) -> dict[str, Price]:
        """Name of each control of a teacher with a source model -> price of its remaining
        trainings.

        A source model that the sweep trains is part of the teacher's price, and not in here.
        """
        if self.retrofit is None:
            return {}
        return {
            name: price_of(
                [
                    stage.estimate(label)
                    for stage in self.pretraining
                    for label in stage.jobs
                    if label in labels and label not in stage.finished
                ],
                self.workspace.root,
                speeds=self.speeds,
            )
            for name, labels in self.retrofit.trainings_by_control.items()
        }

    @cached_property
    def problems(self) -> dict[str, str | None]:
        """Machine or cluster -> why the trainings do not fit there; None if they do."""
        lack = None
        if self.trainings_left:
            check = partial(check_devices, self.placed, pretrains=bool(self.pretraining_left))
            lack = lack_of_resources(self.settings.cluster, check)
        return find_problems(
            self.trainings_left,
            self.price.disk,
            self.workspace.root,
            self.settings.cluster.ray_address,
            lack,
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What is reused, and what is not known yet."""
        sweep = self.placed.sweep
        suite = self.trials.trials[0].suite
        notes = [*plan_sentences(self.trials, sweep, self.states), *self.gaps]
        for label, measurement in self.influence.items():
            if not measurement.is_stored:
                text = measurement.text(on_gpu=self.settings.trials_use_gpus)
                notes.append(f"influence of {label} ({measurement.metric}): {text}")
        if unread := unread_note(self.settings.data):
            notes.append(unread)
        notes += self._training_notes()
        notes += self._resolution_notes()
        prices = self.control_prices
        sentences = self.retrofit.sentences if self.retrofit else {}
        for name, text in sentences.items():
            flops_left = prices[name].flops if name in prices else 0.0
            ending = f"; {flops_left:.3g} FLOPs are left" if flops_left else ""
            notes.append(f"{name}: {text}{ending}")
        if needs_lm_eval(self.settings.evaluation) and suite.tasks and not suite.fingerprints:
            notes.append("the tasks of lm-eval are not loaded, so no trial can be found measured")
        if sweep.gpus_per_trial and self.trials_left:
            gpus = format_count(sweep.num_workers_per_trial, "GPU")
            at_once = min(sweep.trials_at_once or 1, len(self.trials_left))
            notes.append(f"each trial runs on {gpus}, at most {at_once} at once")
        if competing_trials(self.trials, sweep):
            notes.append(AshaRule.of(sweep).text)
        return tuple(notes)

    def _resolution_notes(self) -> Iterator[str]:
        """Yield which differences of accuracy the sweep can show, if the number of items is
        known."""
        evaluation = self.settings.evaluation
        num_items = 0
        for task in self._accuracy_tasks():
            most = evaluation.num_items if is_heldout_task(task) else evaluation.limit
            if most is None:  # All items of a task that is not loaded yet.
                return
            num_items += min(most, evaluation.limit or most)
        if num_items:
            least = resolvable_difference(num_items, EXPECTED_SHARE_DIFFERING)
            yield (
                f"smallest difference that this sweep can show: {100 * least:.1f} points of "
                f"accuracy ({POWER:.0%} power, {INTERVAL_LEVEL:.0%} confidence), with "
                f"{num_items:,} items of one seed, if two models differ on "
                f"{EXPECTED_SHARE_DIFFERING:.0%} of them"
            )

    def _accuracy_tasks(self) -> list[str]:
        """Return the tasks that give an accuracy, also for unprepared data."""
        data = self.settings.data
        sources = {"depth": data.depth.tasks, "mixture": tuple(data.shares)}
        of_data = sources.get(data.source, (data.source,))
        tasks = []
        for name in named_tasks(self.settings.evaluation):
            if name == HELDOUT:
                tasks += [part if is_depth_task(part) else LAST_WORD for part in of_data]
            elif not is_heldout_task(name) or has_accuracy(name):
                tasks.append(name)
        return list(dict.fromkeys(tasks))

    def _training_notes(self) -> Iterator[str]:
        """Yield sentences on the remaining pretrainings: learning rates, when corrections begin,
        and how often the text is read."""
        jobs = {
            state.trial.label: state.trial.job
            for state in self.states
            if state.training and state.trial.job and state.trial.job.objective == "pretrain"
        }
        yield from self._rate_notes(jobs)
        yield from two_stage_notes(jobs)
        yield from self._text_notes(jobs)

    def _rate_notes(self, jobs: Mapping[str, TrainingJob]) -> Iterator[str]:
        """Yield why a baseline has another learning rate than its teacher, if the user did not
        choose it."""
        usual_rates = SweepSettings().learning_rates
        vanilla_rate = usual_rates[BASELINE_METHOD]
        vanilla_rates = {
            job.recipe.learning_rate for job in jobs.values() if job.model.method == BASELINE_METHOD
        }
        has_usual_rates = self.settings.sweep.learning_rates == usual_rates
        if has_usual_rates and vanilla_rates == {vanilla_rate} and self.retrofit is None:
            yield (
                f"vanilla has learning rate {vanilla_rate:g}, its default in sweep.learning_rates: "
                "each method has the rate that suits it"
            )

    def _text_notes(self, jobs: Mapping[str, TrainingJob]) -> Iterator[str]:
        """Yield how often trainings of each length read the prepared text."""
        tokens_folders = [Path(job.tokens_folder) for job in jobs.values() if job.tokens_folder]
        if not tokens_folders:
            return
        text_tokens = expected_tokens(self.settings.data, tokens_folders[0]).num_train_tokens
        if not text_tokens:  # Not prepared yet.
            return
        lengths = {(job.recipe.num_steps, job.recipe.num_tokens_per_step) for job in jobs.values()}
        for num_steps, num_tokens in sorted(lengths):
            num_times = num_steps * num_tokens / text_tokens
            yield (
                f"{num_steps:,} steps of {num_tokens:,} tokens read the {text_tokens:,} tokens "
                f"of the text {num_times:.2g} times"
            )

    @property
    def sentences(self) -> tuple[str, ...]:
        """The notes, the price, and what does not fit."""
        rows = price_rows(self.price, self.problems)
        return (*self.notes, *(f"{name}: {text}" for name, text in rows))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per trial: label, role, schedule, exact costs, state."""
        full = full_trial(self.trials).model
        return [
            {
                "name": state.trial.label,
                "role": state.trial.role,
                "method": state.trial.model.method,
                "schedule": state.trial.schedule_text,
                "state": state.status,
                "steps_done": state.steps_done,
                **exact_cost(state.trial.model, full),
            }
            for state in self.states
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the trials, the notes, the price, and what does not fit.

        Keys:
            name: the sweep's name, if it is known yet
            trials: one entry per known trial: `name`, `role`, `method`, `schedule` (as text; empty
                without corrections), `state`, `steps_done`, exact costs
            notes: sentences on what is reused and what is unknown
            price: of the remaining trainings: `num_trainings`, `num_tokens`, `num_teacher_tokens`,
                `flops`, `hours` (shortest and longest), `num_devices`, `uses_gpus`, `rate`,
                `memory` and `disk` (bytes by name), `free_disk`, `is_upper_bound`
            source_controls: (optional) with a source model, name of a control to the price of its
                remaining trainings
            problems: machine or cluster to why the trainings do not fit there, or `null`
        """
        controls = {
            name: price.model_dump(mode="json") for name, price in self.control_prices.items()
        }
        return {
            "name": self.trials.name,
            "trials": self.rows(),
            "notes": list(self.notes),
            "price": self.price.model_dump(mode="json"),
            **({"source_controls": controls} if self.retrofit else {}),
            "problems": self.problems,
        }

    def shown(self) -> Iterable[RenderableType]:
        yield plan_table(self.trials, self.states)
        yield from (f"  {note}" for note in self.notes)
        yield two_column_table(None, [*price_rows(self.price, self.problems)])


def two_stage_notes(jobs: Mapping[str, TrainingJob]) -> Iterator[str]:
    """Yield which models are trained in two stages, the first without corrections.

    Args:
        jobs: Label -> training.
    """
    labels_by_length: dict[tuple[int, int], list[str]] = {}
    for label, job in jobs.items():
        first_steps = steps_before_corrections(job.recipe)
        if first_steps and job.model.corrections.max_corrections:
            length = (first_steps, job.recipe.num_steps)
            labels_by_length.setdefault(length, []).append(label)
    for (first_steps, num_steps), labels in labels_by_length.items():
        yield (
            f"no corrections before step {first_steps:,} of {num_steps:,} "
            f"(training.iterate_from_fraction): {join_names(labels)}"
        )
