"""Measure accuracy and bits per byte of models with lm-eval, and the differences between models.

Each task is measured once for each model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import Field, computed_field
from rich.console import RenderableType

from orchestrator.cluster.work import CPU, command_executor
from orchestrator.data.preparation import newest_tokens, tokens_folder_of
from orchestrator.evaluation.heldout import heldout_chances, is_heldout_task
from orchestrator.evaluation.measuring import MeasuredSuite, ModelMeasurer
from orchestrator.evaluation.store import EvaluationStore
from orchestrator.evaluation.tasks import (
    NoTaskAvailable,
    load_suite,
    make_suite,
    needs_heldout,
)
from orchestrator.models.folder import JOB_KEY, load_config, load_provenance
from orchestrator.models.hub import offline
from orchestrator.models.load import best_device
from orchestrator.models.open import OpenedModel, by_label, open_models
from orchestrator.models.tokenizer import check_template
from orchestrator.pipelines.context import Context, open_context
from orchestrator.records.evaluation import EvaluationResult, Suite
from orchestrator.records.metrics import STDERR_SUFFIX, quality_name, stderr_name
from orchestrator.records.tracked_run import PRETRAIN_OF_SWEEP, TrackedRun
from orchestrator.reporting import command_tables
from orchestrator.reporting.comparison import Difference, differences_from_first
from orchestrator.reporting.output import Plan, Result
from orchestrator.reporting.sections import two_column_table
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.render import format_count, format_with_error
from orchestrator.training.tracked_runs import tracked_model
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import expand_user
from orchestrator.workspace.journal import now_ms
from orchestrator.workspace.layout import Workspace, find_workspace
from orchestrator.workspace.provenance import content_key

NEEDS_HUB = "needs the hub, which a dry run does not ask"


class ModelEvaluations(Result):
    """Evaluations of one model or several."""

    evaluations: dict[str, EvaluationResult] = Field(exclude=True)
    """Name of the model, with its schedule if that was given -> results."""
    num_evaluations: dict[str, int | None] = Field(exclude=True)
    """Name of the model -> NFE, the layer evaluations per token; None if it is unknown."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def models(self) -> list[dict[str, Any]]:
        """One entry per model and schedule: `name`; `evaluations`, its NFE, or `null` where only
        transformers knows the model; `quality` (`accuracy`, `bits_per_byte`, their errors as
        `NAME_stderr`, and `TASK/METRIC`); `tasks`, each with `version`, `num_items`,
        `num_fewshot`, `metrics`; `skipped`, task to reason."""
        facts_of_task = {"version", "num_items", "num_fewshot", "metrics"}
        return [
            {
                "name": name,
                "evaluations": self.num_evaluations[name],
                "quality": evaluation.quality(),
                "tasks": {
                    task: result.model_dump(mode="json", include=facts_of_task)
                    for task, result in evaluation.results.items()
                },
                "skipped": dict(evaluation.skipped),
            }
            for name, evaluation in self.evaluations.items()
        ]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def differences(self) -> list[dict[str, Any]]:
        """One entry per model after the first, task and metric, and per average: `model`, `against`
        (the first model), `task`, `metric`, `num_items` (items that all models answered),
        `difference`, and its 95% confidence interval `low` to `high`. Empty for one model."""
        return [
            {
                "model": difference.model,
                "against": difference.against,
                "task": difference.task,
                "metric": difference.metric,
                "num_items": difference.num_items,
                "difference": difference.interval.value,
                "low": difference.interval.low,
                "high": difference.interval.high,
            }
            for difference in self._differences
        ]

    @cached_property
    def _differences(self) -> list[Difference]:
        return differences_from_first(self.evaluations)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per model, task and metric: value, standard error and number of items; and
        the difference to the first model with its confidence interval."""
        differences = {(row["model"], row["task"], row["metric"]): row for row in self.differences}
        interval_columns = ("difference", "low", "high")
        rows = []
        for model, evaluation in self.evaluations.items():
            for task, result in evaluation.results.items():
                for metric, value in result.metrics.items():
                    if metric.endswith(STDERR_SUFFIX):
                        continue
                    difference = differences.get((model, task, metric), {})
                    rows.append(
                        {
                            "model": model,
                            "task": task,
                            "metric": metric,
                            "value": value,
                            "stderr": result.metrics.get(stderr_name(metric), math.nan),
                            "num_items": result.num_items,
                            **{name: difference.get(name, math.nan) for name in interval_columns},
                        }
                    )
        return rows

    def shown(self) -> Iterable[RenderableType]:
        yield command_tables.evaluation_table(
            self.evaluations, self._differences, self.num_evaluations
        )
        notes = command_tables.difference_notes(self._differences)
        notes += command_tables.average_notes(self.evaluations)
        yield from (f"  {sentence}" for sentence in notes)


class EvaluatePlan(Plan):
    """Opened models, each under its schedule, and how to evaluate them."""

    row_key = "tasks"

    settings: Settings = Field(exclude=True)
    workspace: Any = Field(exclude=True)
    opened: dict[str, OpenedModel] = Field(exclude=True)
    """The models, each under its schedule, by the labels of the result."""
    log_samples: Path | None = Field(default=None, exclude=True)
    """Folder that gets results and samples in lm-eval's files."""
    trust_remote_code: bool = Field(default=False, exclude=True)

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def tasks(self) -> list[dict[str, str]]:
        """One entry per model and task: `model`, `task`, `state`.

        An unset precision is that of this machine's best device.
        """
        return [
            {"model": label, "task": task, "state": state}
            for label, model in self.opened.items()
            for task, state in self._states_of(model).items()
        ]

    def _states_of(self, model: OpenedModel) -> dict[str, str]:
        settings = self.settings.evaluation
        tokens = tokens_of_tasks(model, settings, self.workspace)
        suite = make_suite(settings, tokens, context_length=model.context_length)
        states: dict[str, str] = {}
        if suite.heldout and not suite.heldout.is_dir():
            without_items = filter(is_heldout_task, suite.tasks)
            states = dict.fromkeys(without_items, "to measure, its items are not made yet")
            tasks_of_lm_eval = tuple(name for name in suite.tasks if name not in states)
            if not tasks_of_lm_eval:
                return states
            suite = suite.model_copy(update={"tasks": tasks_of_lm_eval, "suite_folder": ""})
        try:
            with offline():
                loaded = load_suite(suite)
        except NoTaskAvailable:
            return states | dict.fromkeys(suite.tasks, NEEDS_HUB)
        executor = command_executor(self.settings.cluster, self.workspace.root)
        if suite.precision is None and executor.needs_gpu:
            suite = suite.model_copy(update={"precision": "bf16"})
        store = EvaluationStore(self.workspace.evaluations)
        measurer = ModelMeasurer(model, store, suite, device=executor.device or best_device())
        for name, num_answers in measurer.stored_answers(loaded).items():
            items = format_count(loaded.num_items(name), "item")
            if num_answers is None:
                states[name] = f"{items}, stored"
            elif num_answers:
                states[name] = f"{items} to measure; resumes after {num_answers:,} answers"
            else:
                states[name] = f"{items} to measure"
        return states | dict.fromkeys(loaded.skipped, NEEDS_HUB)

    def shown(self) -> Iterable[RenderableType]:
        rows = []
        for task in self.tasks:
            model = f"{task['model']}: " if len(self.opened) > 1 else ""
            rows.append((model + task["task"], task["state"]))
        yield two_column_table("Plan of the evaluation", rows)


def plan_evaluate(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    models: Sequence[Path | str] = (),
    schedules: Sequence[str] = (),
    log_samples: Path | str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> EvaluatePlan:
    """Open all models first, so that a mistake in the last one costs no time.

    Args:
        settings: Sections `evaluation` and `cluster`.
        models: Checkpoints or runs, by path or name, or transformers folders; when
            empty, the newest of finished runs and the last pick.
        schedules: Iteration schedules as typed; each model's own when empty.
        log_samples: Folder for lm-eval's files of results and samples, one folder per model.
        trust_remote_code: Whether code in a model folder may run.

    Raises:
        UserError: If a model is missing or damaged, or was imported without a tokenizer, or a
            schedule does not fit it.
    """
    space = find_workspace(workspace)
    note = (progress or Progress()).note
    opened = open_models(models, space, schedules, note=note)
    for model in opened:
        model.check_reads_text()
    return EvaluatePlan(
        settings=settings,
        workspace=space,
        opened=by_label(opened),
        log_samples=expand_user(log_samples).absolute() if log_samples else None,
        trust_remote_code=trust_remote_code,
    )


def run_evaluate(plan: EvaluatePlan, context: Context) -> ModelEvaluations:
    """Evaluate models, each under each schedule; stored results are read again."""
    folder = plan.log_samples
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"--log-samples: cannot make the folder {folder}: {error.strerror}"
            raise UserError(text) from None
    if prompts := plan.settings.evaluation.prompts:
        for model in plan.opened.values():
            check_template(model.tokenizer(trust_remote_code=plan.trust_remote_code), prompts)
    evaluations: dict[str, EvaluationResult] = {}
    shown_notes: set[str] = set()
    for label, model in plan.opened.items():
        output = folder and folder / label.replace("/", "__")
        evaluations[label] = _evaluate_model(model, plan, context, output, shown_notes)
    if tasks := command_tables.tasks_with_other_items([*evaluations.values()]):
        context.progress.note(
            f"not comparable: {', '.join(tasks)} had different items for some models, "
            "because their training tokens differ"
        )
    num_evaluations = {label: model.num_evaluations for label, model in plan.opened.items()}
    return ModelEvaluations(evaluations=evaluations, num_evaluations=num_evaluations)


def evaluate(
    settings: Settings,
    *,
    workspace: Workspace | Path | str | None = None,
    models: Sequence[Path | str] = (),
    schedules: Sequence[str] = (),
    log_samples: Path | str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ModelEvaluations:
    """Evaluate models, each under each schedule; stored results are read again.

    Arguments and errors are those of `plan_evaluate`.
    """
    plan = plan_evaluate(
        settings,
        workspace=workspace,
        models=models,
        schedules=schedules,
        log_samples=log_samples,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return run_evaluate(plan, open_context(workspace, progress))


def _evaluate_model(
    model: OpenedModel,
    plan: EvaluatePlan,
    context: Context,
    output: Path | None,
    shown_notes: set[str],
) -> EvaluationResult:
    """Return an evaluation of a model; only tasks without a stored result are run.

    Args:
        output: Folder for lm-eval's files of results and samples.
        shown_notes: Notes that were shown before and are not repeated; new ones are added.
    """
    settings = plan.settings.evaluation
    workspace = context.workspace
    progress = context.progress
    started_ms = now_ms()
    progress.start("evaluate")  # Loading tasks and models takes time.
    tokens = tokens_of_tasks(model, settings, workspace, progress.note)
    suite = make_suite(
        settings, tokens, context_length=model.context_length, make_progress=progress
    )
    loaded = load_suite(suite)
    chances = heldout_chances(suite.heldout)
    notes = [f"chance of {name}: {chances[name]}" for name in chances if name in suite.tasks]
    notes += [f"skipped {name}: {reason}" for name, reason in loaded.skipped.items()]
    for note in notes:
        if note not in shown_notes:
            progress.note(note)
    shown_notes |= set(notes)
    measure = partial(_measure, model, suite, plan.trust_remote_code, workspace.evaluations)
    store = EvaluationStore(workspace.evaluations, progress.note)
    # An unset precision follows from the device on which the tasks run.
    executor = CPU
    if not suite.precision or not ModelMeasurer(model, store, suite).has_stored(loaded):
        executor = command_executor(plan.settings.cluster, workspace.root)
    measured = executor.run(measure, progress)
    evaluation = measured.evaluation
    config = model.config
    progress.finish(_summary(evaluation) + ("" if measured.num_run else ", found again"))

    # Show the evaluation as an MLflow run.
    tasks = {name: loaded.fingerprint(name) for name in loaded.tasks}
    data = (", ".join(tasks)[:500], content_key(tasks))
    metrics = {quality_name(name): value for name, value in evaluation.quality().items()}
    params: dict[str, Any] = {
        **model.parameters(),
        "checkpoint": model.path,
        "precision": measured.precision,
        "num_items": evaluation.num_items,
    }
    logged_model = None
    if config is not None and not model.is_external:
        logged_model = tracked_model(str(model.path), config, dict.fromkeys(metrics, data))
        if logged_model and config.corrections == load_config(model.path).corrections:
            is_of_sweep = _is_of_sweep(workspace, model.path)
            logged_model = logged_model.model_copy(update={"is_of_sweep": is_of_sweep})
    context.log_measurement(
        TrackedRun.of(
            key=content_key("evaluation", measured.keys.tasks),
            name=f"evaluate {model.label}: {', '.join(measured.keys.tasks)}"[:80],
            kind="evaluation",
            params=params,
            dataset=(*data, {"source": "tasks", "num_items": evaluation.num_items, **tasks}),
            metrics=metrics,
            model=logged_model,
        ),
        started_ms,
        found_again=not measured.num_run,
    )
    if output is not None:
        store.copy(measured.keys, output, pretrained=str(model.path))
        progress.note(f"lm-eval's files of samples: {output}")
    return evaluation


def _measure(
    model: OpenedModel,
    suite: Suite,
    trust_remote_code: bool,
    evaluations: Path,
    device: str,
    progress: Progress,
) -> MeasuredSuite:
    # Loaded tasks cannot be pickled, so a worker loads them again.
    store = EvaluationStore(evaluations, progress.note)
    measurer = ModelMeasurer(
        model,
        store,
        suite,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    return measurer.measure_tasks(load_suite(suite))


def tokens_of_tasks(
    model: OpenedModel,
    settings: EvaluationSettings,
    workspace: Workspace,
    note: Callable[[str], None] = lambda _: None,
) -> Path | None:
    """Return the tokens from which a model's held-out tasks are made; None if none are needed."""
    if not needs_heldout(settings):
        return None
    if not model.is_external:
        return tokens_folder_of(model.path, workspace)
    folder = newest_tokens(workspace)
    note(f"held-out tasks for {model.label} are made from the tokens {folder.name}")
    return folder


def _summary(evaluation: EvaluationResult) -> str:
    numbers = evaluation.quality()
    parts = []
    if "accuracy" in numbers:
        error = numbers.get(stderr_name("accuracy"))
        accuracy = format_with_error(numbers["accuracy"], error, is_percent=True)
        parts.append(f"accuracy {accuracy}%")
    if "bits_per_byte" in numbers:
        parts.append(f"{numbers['bits_per_byte']:.3f} bits per byte")
    if evaluation.skipped:
        parts.append(f"without {', '.join(evaluation.skipped)}")
    return ", ".join([*parts, f"{evaluation.num_items:,} items"])


def _is_of_sweep(workspace: Workspace, checkpoint: Path) -> bool:
    """Return whether a checkpoint belongs to a sweep, which logs the model itself."""
    if checkpoint.is_relative_to(workspace.trials):
        return True
    key = str(load_provenance(checkpoint).get(JOB_KEY))
    return TrackedRun.stored(workspace, PRETRAIN_OF_SWEEP, key) is not None
