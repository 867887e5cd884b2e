"""Compare two models item by item: evaluations of ours, or outputs of stock lm-eval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.evaluation.logged_samples import LoggedRun, find_logged_run
from orchestrator.pipelines.context import Context, open_context
from orchestrator.pipelines.result import Result
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.reporting.comparison import (
    Comparison,
    compare_evaluations,
    comparison_findings,
    comparison_table,
)
from orchestrator.settings import Settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace

if TYPE_CHECKING:
    from rich.console import RenderableType

    from orchestrator.evaluation.evaluated_model import EvaluatedModel


class CompareResult(Result):
    """Two models on the items that both answered."""

    comparison: Comparison

    @property
    def findings(self) -> tuple[str, ...]:
        """What can be concluded, as sentences."""
        return tuple(comparison_findings(self.comparison))

    def rows(self) -> list[dict[str, Any]]:
        """Return one row of plain values per task and average.

        `difference` is the second model minus the first; `low` and `high` are its 95 % interval,
        `only_first` and `only_second` count the items that only one of them gets right.
        """
        return [row.to_row() for row in (*self.comparison.tasks, *self.comparison.averages)]

    def to_json(self) -> dict[str, Any]:
        """Return names, rows, conclusions and notes."""
        return {
            "models": list(self.comparison.names),
            "rows": self.rows(),
            "findings": list(self.findings),
            "notes": list(self.comparison.notes),
        }

    def shown(self) -> Iterable[RenderableType]:
        """Return the names, a table, and what can be concluded."""
        first, second = self.comparison.names
        yield f"A: {first}\nB: {second}"
        yield comparison_table(self.comparison)
        yield from (f"  {sentence}" for sentence in (*self.findings, *self.comparison.notes))


def compare(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
    models: tuple[Path | str, Path | str],
    schedules: Sequence[str] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> CompareResult:
    """Compare two models on the same items; stored results are read, others are measured.

    Args:
        settings: Section `evaluation`. With an output of lm-eval on one side and
            `evaluation.suite` at its default, the other side is measured on the tasks of that
            output.
        models: Two of: a checkpoint, a run or a transformers folder, by path or name; or what
            lm-eval wrote with `--log_samples`: its `--output_path`, the model's folder in it, or a
            `results_*.json`.
        schedules: Iteration schedules: one for both models or one for each; each model's own when
            empty.
        trust_remote_code: Whether code in a model folder may run.

    Raises:
        UserError: As `evaluate`; or if files of lm-eval are missing or damaged, a schedule is given
            for them, or nothing can be compared.
        RunFailed: If the hub gives none of the tasks.
    """
    return compare_models(
        settings,
        models,
        open_context(workspace, progress),
        schedules=schedules,
        trust_remote_code=trust_remote_code,
    )


def compare_models(
    settings: Settings,
    models: tuple[Path | str, Path | str],
    context: Context,
    *,
    schedules: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> CompareResult:
    """Compare two models in a context that is open; arguments and errors as `compare`."""
    logged = [find_logged_run(Path(model)) for model in models]
    wanted = _schedule_of_each(models, logged, schedules)
    opened = _open(models, logged, wanted, context)
    found: dict[int, EvaluationResult] = {n: run.read() for n, run in enumerate(logged) if run}
    if opened:
        from orchestrator.pipelines.evaluating import evaluate_opened

        measured = evaluate_opened(
            list(opened.values()),
            _with_tasks_of(settings, [run for run in logged if run]),
            context,
            trust_remote_code=trust_remote_code,
        )
        found |= zip(opened, measured, strict=True)
    names = _names(models, opened)
    return CompareResult(comparison=compare_evaluations(found[0], found[1], names))


def _schedule_of_each(
    models: Sequence[Path | str], logged: Sequence[LoggedRun | None], schedules: Sequence[str]
) -> list[str | None]:
    if len(schedules) > 2:
        raise UserError(
            f"--schedule: got {len(schedules)} schedules for 2 models; give one for both, or two"
        )
    for model, run in zip(models, logged, strict=True):
        if schedules and run and (len(schedules) == 2 or all(logged)):
            raise UserError(
                f"--schedule: {model} is an output of lm-eval, which has no iteration schedule"
            )
    return [schedules[0], schedules[-1]] if schedules else [None, None]


def _open(
    models: Sequence[Path | str],
    logged: Sequence[LoggedRun | None],
    schedules: Sequence[str | None],
    context: Context,
) -> dict[int, EvaluatedModel]:
    """Open the models that are no outputs of lm-eval, by their number."""
    opened: dict[int, EvaluatedModel] = {}
    if all(logged):
        return opened
    # Imported here: outputs of lm-eval are compared without torch, which takes a second.
    from orchestrator.evaluation.evaluated_model import open_models

    for number, (model, run, schedule) in enumerate(zip(models, logged, schedules, strict=True)):
        if run is None:
            wanted = [schedule] if schedule else []
            [opened[number]] = open_models(
                context.workspace, [Path(model)], wanted, warn=context.progress.note
            )
    return opened


def _with_tasks_of(settings: Settings, logged: Sequence[LoggedRun]) -> Settings:
    evaluation = settings.evaluation
    if not logged or evaluation.suite != type(evaluation)().suite:
        return settings
    suite = ",".join(logged[0].tasks)
    return settings.model_copy(
        update={"evaluation": evaluation.model_copy(update={"suite": suite})}
    )


def _names(models: Sequence[Path | str], opened: dict[int, EvaluatedModel]) -> tuple[str, str]:
    """Return what to call the two: as typed for outputs of lm-eval."""
    names = dict(enumerate(map(str, models)))
    if opened:
        from orchestrator.evaluation.evaluated_model import short_names

        names |= zip(opened, short_names(list(opened.values())), strict=True)
    if names[0] == names[1]:
        return f"{names[0]} (A)", f"{names[1]} (B)"
    return names[0], names[1]
