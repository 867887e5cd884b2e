"""Measure accuracy and bits per byte of models with lm-eval; each task is measured once.

The result of each task is stored in the workspace under the hash of all that determines it:
weights and precision, configuration with its schedule, tokenizer, the task's items and metrics. So
a further task costs only that task. The files hold one value per item, for paired comparisons.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas

from orchestrator.evaluation.evaluated_model import EvaluatedModel, open_models, short_names
from orchestrator.evaluation.harness import Suite, load_suite, run_model, run_suite
from orchestrator.evaluation.model_tokenizer import (
    FolderTokenizer,
    ModelTokenizer,
    check_template,
    checkpoint_tokenizer,
)
from orchestrator.evaluation.task_selection import newest_tokens, select_tasks
from orchestrator.pipelines.context import Context, open_context
from orchestrator.records.evaluation import STDERR_SUFFIX, EvaluationResult, TaskResult
from orchestrator.settings import EvaluationSettings, Settings
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import DTYPES
from orchestrator.training.model_lookup import tokens_folder_of
from orchestrator.workspace.folders import Workspace
from orchestrator.workspace.provenance import content_key


@dataclass(frozen=True, kw_only=True)
class ModelEvaluations:
    """Evaluations of one model or several."""

    evaluations: Mapping[str, EvaluationResult]
    """Name of the model, with its schedule where that was asked for, to what was measured."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return one row per model, task and metric: value, standard error, number of items."""
        return pandas.DataFrame(
            {
                "model": model,
                "task": task,
                "metric": metric,
                "value": value,
                "stderr": result.metrics.get(metric + STDERR_SUFFIX, math.nan),
                "num_items": result.num_items,
            }
            for model, evaluation in self.evaluations.items()
            for task, result in evaluation.results.items()
            for metric, value in result.metrics.items()
            if not metric.endswith(STDERR_SUFFIX)
        )


def evaluate(
    settings: Settings,
    *,
    workspace: Workspace | Path | str,
    models: Sequence[Path | str] = (),
    schedules: Sequence[str] = (),
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ModelEvaluations:
    """Evaluate models, each under each schedule; stored results are read again.

    Args:
        settings: Section `evaluation`.
        models: Checkpoints or runs, by path or name, or transformers folders; the newest IIET or
            imported model when empty.
        schedules: Iteration schedules as typed; each model's own when empty.
        trust_remote_code: Whether code in a model folder may run.

    Raises:
        UserError: If a model is missing or damaged, a schedule does not fit it, its tokens are not
            in the workspace, it has no chat template where one is wanted, or a task does not exist.
        RunFailed: If the hub gives none of the tasks.
    """
    context = open_context(workspace, progress)
    # All models are opened first: a mistake in the last must not cost the time of the others.
    opened = open_models(
        context.workspace, list(map(Path, models)), schedules, warn=context.progress.note
    )
    if prompts := settings.evaluation.prompts:
        for model in opened:
            check_template(_tokenizer(model, trust_remote_code), prompts)
    evaluations = [
        evaluate_model(model, settings.evaluation, context, trust_remote_code=trust_remote_code)
        for model in opened
    ]
    return ModelEvaluations(evaluations=dict(zip(short_names(opened), evaluations, strict=True)))


def evaluate_model(
    model: EvaluatedModel,
    settings: EvaluationSettings,
    context: Context,
    *,
    trust_remote_code: bool = False,
) -> EvaluationResult:
    """Return an evaluation of a model; only tasks without a stored result are run.

    Raises:
        UserError, RunFailed: As `evaluate`.
    """
    workspace, progress = context.workspace, context.progress
    progress.start("evaluate")  # Tasks and models take their time to load.
    suite = _load(model, settings, workspace, progress)
    # Models that transformers runs keep their own dtype.
    model_key = [*model.key, settings.precision if model.config else None]
    keys = {
        name: content_key("evaluation", model_key, suite.fingerprint(name), settings.limit)
        for name in suite.tasks
    }
    paths = {name: workspace.evaluations / f"{key}.json" for name, key in keys.items()}
    results = {
        name: found
        for name, path in paths.items()
        if (found := TaskResult.read_measured(path, progress.note))
    }
    missing = [name for name in suite.tasks if name not in results]
    if missing:
        results |= _run(
            suite.only(missing),
            model,
            settings,
            progress,
            trust_remote_code=trust_remote_code,
            # Stored one by one: what is measured survives an interruption.
            on_result=lambda result: _store(paths[result.name], result, progress),
        )
    evaluation = EvaluationResult(
        results={name: results[name] for name in suite.tasks},
        groups=suite.groups,
        skipped=suite.skipped,
    )
    progress.finish(_summary(evaluation) + ("" if missing else ", found again"))
    _track(context, keys, evaluation, model, settings.precision)
    return evaluation


def _load(
    model: EvaluatedModel, settings: EvaluationSettings, workspace: Workspace, progress: Progress
) -> Suite:
    def tokens() -> Path:
        if not model.is_external:
            return tokens_folder_of(model.path, workspace)
        folder = newest_tokens(workspace)
        progress.note(f"held-out tasks for {model.name} are made from the tokens {folder.name}")
        return folder

    asked = select_tasks(settings, tokens, context_length=model.context_length, progress=progress)
    suite = load_suite(
        asked.names,
        folders=asked.folders,
        heldout=asked.heldout,
        num_fewshot=settings.num_fewshot,
        prompts=settings.prompts,
    )
    for name, reason in suite.skipped.items():
        progress.note(f"skipped {name}: {reason}")
    return suite


def _run(
    suite: Suite,
    model: EvaluatedModel,
    settings: EvaluationSettings,
    progress: Progress,
    *,
    trust_remote_code: bool,
    on_result: Callable[[TaskResult], None],
) -> dict[str, TaskResult]:
    if model.config is None:
        # Imported here: transformers takes seconds, and our own models do without it.
        from orchestrator.evaluation.harness.transformers_model import load_transformers_model

        runner = load_transformers_model(
            model.path,
            batch_size=settings.batch_size,
            trust_remote_code=trust_remote_code,
            prompts=suite.prompts,
            progress=progress,
        )
        return run_model(
            suite, runner, limit=settings.limit, progress=progress, on_result=on_result
        ).results
    return run_suite(
        suite,
        model.decoder(DTYPES[settings.precision]),
        _tokenizer(model),
        batch_size=settings.batch_size,
        limit=settings.limit,
        progress=progress,
        on_result=on_result,
    ).results


def _tokenizer(model: EvaluatedModel, trust_remote_code: bool = False) -> ModelTokenizer:
    if model.is_external:
        return FolderTokenizer(model.path, trust_remote_code=trust_remote_code)
    return checkpoint_tokenizer(model.path)


def _store(path: Path, result: TaskResult, progress: Progress) -> None:
    try:
        result.write(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        progress.note(f"cannot store the result of {result.name} as {path}: {error.strerror}")


def _track(
    context: Context,
    keys: Mapping[str, str],
    evaluation: EvaluationResult,
    model: EvaluatedModel,
    precision: str,
) -> None:
    params: dict[str, Any] = {"method": model.architecture}
    if model.config is not None:
        params |= {"schedule": model.config.corrections, "precision": precision}
    run = context.tracking.run(
        content_key("evaluation", dict(keys)),
        name=f"evaluate {', '.join(keys)}"[:80],
        kind="evaluation",
        params={**params, "checkpoint": model.path, "num_items": evaluation.num_items},
    )
    run.log_metrics({f"quality/{name}": value for name, value in evaluation.quality().items()})
    run.finish()


def _summary(evaluation: EvaluationResult) -> str:
    numbers = evaluation.quality()
    parts = []
    if "accuracy" in numbers:
        error = numbers.get("accuracy_stderr")
        spread = f" ± {100 * error:.1f}" if error is not None else ""
        parts.append(f"accuracy {100 * numbers['accuracy']:.1f}{spread} %")
    if "bits_per_byte" in numbers:
        parts.append(f"{numbers['bits_per_byte']:.3f} bits per byte")
    if evaluation.skipped:
        parts.append(f"without {', '.join(evaluation.skipped)}")
    return ", ".join([*parts, f"{evaluation.num_items:,} items"])
