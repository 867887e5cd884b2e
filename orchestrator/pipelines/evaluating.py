"""Stage `evaluate`: accuracy and bits per byte of a model, each task measured once.

In go a checkpoint, or a model folder of transformers, and what to measure (`heldout`, `paper`, or
names of lm-eval tasks); out comes an evaluation. The result of each task lies in the workspace
under the hash of all that determines it: weights and precision, configuration with its schedule,
tokenizer, the task's items and metrics. So another task costs only that task, and the same command
again costs nothing. The files hold one value per item, which paired comparisons of two models need.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iiet.schedule import IterationSchedule
from orchestrator.evaluation.evaluated_model import EvaluatedModel, open_model
from orchestrator.evaluation.harness import (
    FolderTokenizer,
    Suite,
    checkpoint_tokenizer,
    load_suite,
    run_model,
    run_suite,
)
from orchestrator.evaluation.task_selection import newest_tokens, select_tasks
from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.settings import EvaluationSettings
from orchestrator.terminal.progress import Progress
from orchestrator.tracking import Tracking
from orchestrator.training.checkpoint import DTYPES
from orchestrator.training.model_lookup import tokens_folder_of
from orchestrator.workspace.files import read_cached, write_json
from orchestrator.workspace.folders import Workspace
from orchestrator.workspace.provenance import content_key


def evaluate(
    checkpoint: Path | EvaluatedModel,
    settings: EvaluationSettings,
    workspace: Workspace,
    *,
    schedule: IterationSchedule | None = None,
    trust_remote_code: bool = False,
    tracking: Tracking | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Return an evaluation of a model; only tasks without a stored result are run.

    Args:
        checkpoint: The model: a checkpoint, a run, or a model folder of transformers.
        settings: The suite, how many items of each task, few-shot examples, batch size.
        workspace: Where results are stored, and the tokens that held-out tasks are made from.
        schedule: Another iteration schedule than the model's, where `checkpoint` is a path.
        trust_remote_code: Whether code that lies in a model folder may run.
        tracking: Where the evaluation is shown as a run of its own.
        progress: Told how many items are done.

    Raises:
        UserError: If the model is damaged, the schedule does not fit it, its tokens are not in the
            workspace, or a task does not exist or cannot be read.
        RunFailed: If the hub gives none of the tasks.
    """
    progress = progress or Progress()
    if isinstance(checkpoint, Path):
        checkpoint = open_model(checkpoint, schedule, warn=progress.note)
    model = checkpoint
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
        if (found := read_cached(path, TaskResult.from_dict, progress.note)) is not None
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
    if tracking:
        _track(tracking, keys, evaluation, model, settings.precision)
    return evaluation


def _load(
    model: EvaluatedModel, settings: EvaluationSettings, workspace: Workspace, progress: Progress
) -> Suite:
    """Load the tasks, and say which are skipped."""

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
            progress=progress,
        )
        return run_model(
            suite, runner, limit=settings.limit, progress=progress, on_result=on_result
        )
    path = model.path
    return run_suite(
        suite,
        model.decoder(DTYPES[settings.precision]),
        FolderTokenizer(path) if model.is_external else checkpoint_tokenizer(path),
        batch_size=settings.batch_size,
        limit=settings.limit,
        progress=progress,
        on_result=on_result,
    )


def _store(path: Path, result: TaskResult, progress: Progress) -> None:
    try:
        write_json(path, result.to_dict())
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        progress.note(f"cannot store the result of {result.name} as {path}: {error.strerror}")


def _track(
    tracking: Tracking,
    keys: Mapping[str, str],
    evaluation: EvaluationResult,
    model: EvaluatedModel,
    precision: str,
) -> None:
    of_decoder: dict[str, Any] = {}
    if model.config is not None:
        of_decoder = {"schedule": model.config.corrections, "precision": precision}
    run = tracking.run(
        content_key("evaluation", dict(keys)),
        name=f"evaluate {', '.join(keys)}"[:80],
        kind="evaluation",
        params={
            "method": model.architecture,
            **of_decoder,
            "checkpoint": model.path,
            "num_items": evaluation.num_items,
        },
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
