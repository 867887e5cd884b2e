"""The results of a sweep: stored in `results.json`, as its models, and its curves.

Reports are made from this file and the journals, without Ray or MLflow. The values of single items
lie in the store of evaluations; a report without them lacks only the paired errors. `model_results`
gives the models that fronts, tables, charts and files read, each with its seeds averaged.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from orchestrator.evaluation.store import EvaluationStore
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.records.metrics import (
    NFE,
    OVERHEAD_METRICS,
    OVERHEADS,
    QUALITY,
    STDERR_SUFFIX,
    stderr_name,
)
from orchestrator.records.record import Influence, Record
from orchestrator.records.status import unfinished_trials
from orchestrator.records.trial import SOURCE_CONTINUED, Role, SweepTrials, Trial
from orchestrator.reporting.statistics import sum_of_means
from orchestrator.settings import BASELINE_METHOD
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import (
    ACCURACY_METRIC,
    VALIDATION_METRIC,
    last_recorded,
    read_metrics,
)
from orchestrator.workspace.layout import (
    PLAN_FILE,
    RESULTS_FILE,
    Workspace,
    check_name,
    is_valid_name,
)
from orchestrator.workspace.provenance import content_key

if TYPE_CHECKING:
    from iiet.iiad.pruning import InfluenceTable
    from iiet.model.config import ModelConfig

CHANCE_TITLE = "Chance"
"""Title of the facts that say how accurate a guess is, by depth task."""
CONTROLS_TITLE = "Controls of a teacher with a source"
"""Title of the facts that say what the controls are, by name."""
SETTINGS_TITLE = "Settings"
"""Title of the facts that hold the settings."""
PROVENANCE_TITLE = "Provenance"
"""Title of the facts that say what the sweep was made with."""


class StoredSweep(Record):
    """Everything that a report of a sweep needs."""

    name: str
    """Name of the sweep's folder and of its run in MLflow."""
    key: str
    """Content key of the sweep's plan, which identifies its run in MLflow."""
    results: tuple[Trial, ...]
    """The finished ones among teacher, trials and baselines."""
    influence: Influence | None = None
    """The teacher's influence table, if the sweep had one; of several teachers the first one's."""
    influence_teacher: str = ""
    """Of several teachers: weights key of the one whose influence it is."""
    retention: Mapping[str, float] = Field(default_factory=dict)
    """How much a model may lose against the teacher's source, as `evaluation.retention`; empty
    without a source."""
    facts: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Title of a list -> names and values, such as settings, provenance and reused trials."""

    @property
    def notes(self) -> list[str]:
        """Sentences on the accuracy of a guess, and on the control of a teacher with a source."""
        chances = self.facts.get(CHANCE_TITLE, {})
        notes = [f"Chance of {task}: {chance}." for task, chance in chances.items()]
        if controls := self.facts.get(CONTROLS_TITLE, {}):
            is_measured = any(result.role == SOURCE_CONTINUED for result in self.results)
            missing = (
                "missing, so what the teacher's corrections gain is not told apart from what its "
                "further training gains"
            )
            text = controls[SOURCE_CONTINUED] if is_measured else missing
            notes.append(f"{SOURCE_CONTINUED}: {text}.")
        return notes

    def influence_of(self, trial: Trial) -> InfluenceTable | None:
        """Return the influence that a student's schedule was chosen by; None if it is that of
        another teacher."""
        is_of_its_teacher = self.influence_teacher in ("", trial.parent)
        return self.influence if is_of_its_teacher else None

    def folder(self, workspace: Workspace) -> Path:
        """Return the sweep's folder."""
        return workspace.sweeps / self.name

    def store(self, workspace: Workspace) -> Path:
        """Write the results to the sweep's folder and return the path."""
        path = self.folder(workspace) / RESULTS_FILE
        self.write(path)
        return path

    def journal_of(self, result: Trial) -> Path | None:
        """Return the folder with the journal of a result's own training; None if it has none.

        A model that was measured without training, such as a pruned teacher, shares its checkpoint
        with the result that was trained.
        """
        if result.checkpoint is None or self._owners[result.checkpoint] != result.key:
            return None
        return Path(result.checkpoint).parent

    @cached_property
    def _owners(self) -> dict[str, str]:
        # Checkpoint -> key of the result that was trained: no trial if there is another.
        trials_last = sorted(self.results, key=lambda result: result.role == "trial")
        owners: dict[str, str] = {}
        for result in trials_last:
            if result.checkpoint:
                owners.setdefault(result.checkpoint, result.key)
        return owners


def load_sweep_results(workspace: Workspace, name: str) -> StoredSweep:
    """Read the stored results of a sweep; they are named after their folder.

    So a folder that was copied or renamed is a sweep of its own.

    Raises:
        UserError: If there is no such sweep, it has no result yet, or its file is damaged.
    """
    check_name(name, "the sweep")
    path = workspace.sweeps / name / RESULTS_FILE
    sweep = StoredSweep.read(path)
    if sweep is None and (workspace.sweeps / name).is_dir():
        raise UserError(_unfinished_text(workspace, name))
    if sweep is None:
        names = sorted(path.parent.name for path in workspace.sweeps.glob(f"*/{RESULTS_FILE}"))
        listed = f"there are: {', '.join(names)}"
        offer = listed if names else "run `iiet-orch sweep-threshold` first"
        raise UserError(f"no sweep is called {name!r} in {workspace.root}; {offer}")
    check_name(sweep.name, f"{path} is damaged: name")
    check_name(sweep.key, f"{path} is damaged: key")
    return sweep.model_copy(update={"name": name})


def load_item_values(workspace: Workspace, results: Iterable[Trial]) -> dict[str, EvaluationResult]:
    """Read the values of single items by key of the result, without missing ones.

    Raises:
        DamagedFile: If a stored evaluation is damaged.
    """
    store = EvaluationStore(workspace.evaluations)
    evaluations = {r.key: store.load(r.evaluation) for r in results if r.evaluation}
    return {key: evaluation for key, evaluation in evaluations.items() if evaluation}


def item_notes(results: Sequence[Trial], items: Mapping[str, EvaluationResult]) -> list[str]:
    """Return sentences on tasks that are in no average and on models without values of items."""
    skipped: dict[str, str] = {}
    for result in results:
        if evaluation := items.get(result.key):
            skipped |= evaluation.skipped
    notes = [f"Averages do not include {name}: {reason}." for name, reason in skipped.items()]
    lacking = [result.name for result in results if result.key not in items]
    if items and lacking:
        notes.append(
            "These models have no paired errors, because the files with their single items are "
            f"missing: {', '.join(lacking)}."
        )
    return notes


def newest_sweep(workspace: Workspace) -> str:
    """Return the name of the newest sweep that has results.

    Raises:
        UserError: If there is none.
    """
    paths = workspace.sweeps.glob(f"*/{RESULTS_FILE}")
    named = [path.parent for path in paths if is_valid_name(path.parent.name)]
    if not named:
        begun = [path.parent for path in workspace.sweeps.glob(f"*/{PLAN_FILE}")]
        if begun:
            raise UserError(_unfinished_text(workspace, max(begun, key=last_recorded).name))
        raise UserError(
            f"{workspace.root} has no finished sweep; `iiet-orch sweep-threshold` runs one"
        )
    return max(named, key=last_recorded).name


def _unfinished_text(workspace: Workspace, name: str) -> str:
    """Say how far a sweep without results is, and how it goes on."""
    plan = SweepTrials.read(workspace.sweeps / name / PLAN_FILE)
    how_far = "no trial is planned yet"
    if plan is not None:
        num_left = len(unfinished_trials(plan))
        how_far = f"{len(plan.trials) - num_left} of {len(plan.trials)} trials have ended"
    return (
        f"the sweep {name} has no report yet: {how_far}; `iiet-orch list running` says what "
        "runs, and the command that began the sweep continues it"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelResult:
    """A model of a sweep: its seeds, and the means of what was measured of them."""

    trial: Trial
    """The model, whose numbers are the means over the seeds."""
    seeds: tuple[Trial, ...]
    """The trials that it is the mean of."""
    label: str
    """Its name in reports."""
    numbers: Mapping[str, float]
    """Tracked name -> number; what was not measured is missing, or NaN."""
    sweep: str = ""
    """The sweep that it is from; empty if all models are from one."""

    @property
    def key(self) -> str:
        """Key of the trial."""
        return self.trial.key

    @property
    def role(self) -> Role:
        """Role of the trial."""
        return self.trial.role

    @property
    def config(self) -> ModelConfig:
        """Its shape and its schedule."""
        return self.trial.model

    def number(self, name: str) -> float | None:
        """Return a number by its tracked name; None if it is not known."""
        value = self.value(name)
        return None if math.isnan(value) else value

    def value(self, name: str) -> float:
        """Return a number by its tracked name; NaN if it is not known."""
        return float(self.numbers.get(name, math.nan))

    def with_numbers(self, numbers: Mapping[str, float]) -> Self:
        """Return the model with further numbers."""
        return replace(self, numbers={**self.numbers, **numbers})

    def without_numbers(self, names: Collection[str]) -> Self:
        """Return the model without some of its numbers."""
        return replace(self, numbers={n: v for n, v in self.numbers.items() if n not in names})


def model_results(trials: Iterable[Trial]) -> list[ModelResult]:
    """Return each model with the means over its seeds, in the order in which they first appear.

    The standard error of a mean over seeds combines two parts: the spread over the seeds, divided
    by the root of their number, and the mean of the seeds' own errors over items, because all seeds
    answered the same items.
    """
    models: dict[str, list[Trial]] = {}
    for trial in trials:
        name = f"{trial.role} {trial.group}" if trial.group else trial.key
        models.setdefault(name, []).append(trial)
    results = []
    for seeds in models.values():
        trial = _mean_of_seeds(seeds) if len(seeds) > 1 else seeds[0]
        result = ModelResult(
            trial=trial, seeds=tuple(seeds), label=trial.name, numbers=trial.metrics()
        )
        results.append(result)
    return with_overhead(results)


def with_overhead(results: Sequence[ModelResult]) -> list[ModelResult]:
    """Return models with the numbers of `OVERHEADS`, by the models that are given with them.

    Milliseconds need a vanilla model of the same shape that was timed; its evaluations are known
    without it.
    """
    result_of = {result.key: result for result in results}
    vanilla_by_key = vanilla_of(results)
    teacher_by_key = teachers_of(results)
    overheads: dict[str, dict[str, float]] = {result.key: {} for result in results}
    for cost, (overhead, overhead_share) in OVERHEADS.items():
        for result in results:
            vanilla = result_of.get(vanilla_by_key.get(result.key, ""))
            least: float | None = result.config.num_layers
            if cost != NFE:
                least = vanilla.number(cost) if vanilla else None
            whole = result.number(cost)
            if whole is not None and least is not None:
                overheads[result.key][overhead] = whole - least
        for result in results:
            beyond = overheads[result.key].get(overhead)
            of_teacher = overheads.get(teacher_by_key.get(result.key, ""), {}).get(overhead, 0.0)
            if beyond is not None and of_teacher > 0:
                overheads[result.key][overhead_share] = beyond / of_teacher
    return [
        result.without_numbers(OVERHEAD_METRICS).with_numbers(overheads[result.key])
        for result in results
    ]


def shape_of(model: ModelConfig) -> ModelConfig:
    """Return the vanilla model of the same shape."""
    return replace(model, method=BASELINE_METHOD, method_options=None, schedule=None)


def vanilla_of(results: Sequence[ModelResult]) -> dict[str, str]:
    """Return key of a model -> key of the vanilla model of its shape, where there is one."""
    shapes = {result.key: shape_of(result.config) for result in results}
    vanilla_of_shape = {
        shapes[result.key]: result.key
        for result in results
        if result.trial.method == BASELINE_METHOD
    }
    return {
        key: vanilla_of_shape[shape] for key, shape in shapes.items() if shape in vanilla_of_shape
    }


def teachers_of(results: Sequence[ModelResult]) -> dict[str, str]:
    """Return key of a student -> key of its teacher, where both are among the models.

    Students share their teacher's weights key, and one that was trained, or only pruned, also says
    where these weights are.
    """
    key_of_checkpoint: dict[str, str] = {}
    teacher_weights: dict[str, str] = {}
    for result in results:
        for seed in result.seeds:
            if seed.parent is None:
                key_of_checkpoint[str(seed.checkpoint)] = result.key
            elif seed.job:
                folder = seed.job.teacher_folder or seed.job.initial_folder
                teacher_weights[seed.parent] = str(folder)
            elif not seed.is_elastic:
                teacher_weights[seed.parent] = str(seed.checkpoint)
    teachers = {}
    for result in results:
        if result.role != "trial":
            continue
        checkpoint = teacher_weights.get(str(result.trial.parent), "")
        if checkpoint in key_of_checkpoint:
            teachers[result.key] = key_of_checkpoint[checkpoint]
    return teachers


def lowest_seed(seeds: Sequence[Trial]) -> Trial:
    """Return the seed whose weights stand for the model; the best seed would flatter it."""
    return min(seeds, key=lambda trial: trial.seed or 0)


def _mean_of_seeds(seeds: Sequence[Trial]) -> Trial:
    num_seeds = len(seeds)
    numbers_of_seeds = [seed.numbers for seed in seeds]
    means: dict[str, float] = {}
    for name in numbers_of_seeds[0]:
        if all(name in numbers for numbers in numbers_of_seeds):
            total = math.fsum(numbers[name] for numbers in numbers_of_seeds)
            # With the digits that files have, so that a table and a page round alike.
            means[name] = float(f"{total / num_seeds:.12g}")
    averages = {name: mean for name, mean in means.items() if not name.endswith(STDERR_SUFFIX)}
    for name in [name for name in averages if name.startswith(QUALITY)]:
        over_seeds = sum_of_means([[numbers[name] for numbers in numbers_of_seeds]])
        # Items add at most this: what they do in one seed alone is counted twice. The values of
        # single items tell it apart, in `with_confidence`.
        error_over_items = means.get(stderr_name(name), 0.0)
        averages[stderr_name(name)] = math.hypot(over_seeds.error, error_over_items)
    averages["train/seeds"] = len(seeds)
    first = lowest_seed(seeds)
    return first.model_copy(
        update={
            "key": content_key("seeds", *sorted(seed.key for seed in seeds)),
            "label": first.group or first.label,
            "numbers": averages,
            "seed": None,
            "group": None,
        }
    )


def suite_notes(sweeps: Sequence[StoredSweep]) -> list[str]:
    """Return the sentence on sweeps that were not measured alike; none if they were."""
    suites = [sweep.results[0].suite.model_dump(mode="json") for sweep in sweeps]
    parts = []
    for name in dict.fromkeys(name for suite in suites for name in suite):
        values = [str(suite.get(name)) for suite in suites]
        # Folders and the size of a batch change no result.
        if len(set(values)) > 1 and not name.endswith("_folder") and name != "batch_size":
            parts.append(f"{name} {' / '.join(values)}")
    if not parts:
        return []
    return [
        f"{' and '.join(sweep.name for sweep in sweeps)} were not measured on the same tasks and "
        f"texts ({'; '.join(parts)}): qualities of different sweeps do not compare."
    ]


# Curves, read from journals

Curve = tuple[str, Sequence[tuple[int, float]]]
"""A name and its points: step and value."""
STUDENT_CHARTS = {
    "Validation loss while training": VALIDATION_METRIC,
    "Divergence from the teacher (KL) while training": "train/kl",
    "Loss while training": "train/loss",
}
"""Title -> metric; the report shows the first chart that has a curve. Short trainings are validated
too rarely for the first one."""
BASELINE_CHART = "Validation loss of teacher and baselines"
ACCURACY_CHARTS = (
    "Validation accuracy while training",
    "Validation accuracy of teacher and baselines",
)
"""Titles for the students, and for the others; only where data have answers."""
MAX_CURVE_POINTS = 400
"""A page cannot show more."""


def read_training_curves(
    sweep: StoredSweep, models: Iterable[ModelResult]
) -> Mapping[str, Sequence[Curve]]:
    """Return the losses during training by chart title, in the order of the models, a curve per
    seed.

    Models of other sweeps are left out. The full model and the baselines have their own chart,
    because they start from random weights and would flatten the students' curves.
    """
    keys = {result.key for result in sweep.results}
    students: list[tuple[str, Path]] = []
    full_and_baselines: list[tuple[str, Path]] = []
    for model in models:
        seeds = [seed for seed in model.seeds if seed.key in keys]
        for result in seeds:
            name = model.label + (f", seed {result.seed}" if len(seeds) > 1 else "")
            folder = sweep.journal_of(result)
            if folder and result.role == "trial":
                students.append((name, folder))
            elif folder:
                full_and_baselines.append((name, folder))
    losses = {title: _read_curves(students, metric) for title, metric in STUDENT_CHARTS.items()}
    charts: dict[str, list[Curve]] = {}
    for title, curves in losses.items():
        if curves:
            charts[title] = curves
            break
    charts[BASELINE_CHART] = _read_curves(full_and_baselines, VALIDATION_METRIC)
    for title, journals in zip(ACCURACY_CHARTS, (students, full_and_baselines), strict=True):
        charts[title] = _read_curves(journals, ACCURACY_METRIC)
    return {title: curves for title, curves in charts.items() if curves}


def _read_curves(journals: Sequence[tuple[str, Path]], metric: str) -> list[Curve]:
    curves = [(name, _read_points(folder, metric)) for name, folder in journals]
    return [(name, points) for name, points in curves if len(points) > 1]


def _read_points(folder: Path, metric: str) -> list[tuple[int, float]]:
    points = {
        step: float(values[metric]) for step, values in read_metrics(folder) if metric in values
    }
    every = -(-len(points) // MAX_CURVE_POINTS)
    return sorted(points.items())[:: max(every, 1)]
