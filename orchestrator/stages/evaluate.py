"""Stage `evaluate`: accuracy and bits per byte of a checkpoint, each task measured once.

In go a checkpoint and what to measure (`heldout`, or names of lm-eval tasks), out comes an
evaluation. The result of each task lies in the workspace under the hash of all that determines it:
weights, configuration with its schedule, tokenizer, the task's items and metrics. So another task
costs only that task, and the same command again costs nothing. The files hold one value per item,
which paired comparisons of two models need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from iiet.config import ModelConfig
from iiet.schedule import IterationSchedule
from orchestrator.analysis.evaluation import EvaluationResult, TaskResult
from orchestrator.analysis.harness import Suite, load_suite, run_suite
from orchestrator.analysis.heldout import TASKS, build_heldout
from orchestrator.catalog import tokens_of
from orchestrator.console import Progress
from orchestrator.errors import UserError
from orchestrator.provenance import content_key, file_key
from orchestrator.settings import EvaluationSettings
from orchestrator.tracking import Tracking
from orchestrator.training.checkpoint import TOKENIZER, load_config, load_decoder, weights_key
from orchestrator.workspace import Workspace, read_json, write_json

HELDOUT = "heldout"


def evaluate(
    checkpoint: Path,
    settings: EvaluationSettings,
    workspace: Workspace,
    *,
    schedule: IterationSchedule | None = None,
    num_fewshot: int | None = None,
    tracking: Tracking | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Return an evaluation of a checkpoint; only tasks without a stored result are run.

    Args:
        checkpoint: The model.
        settings: The suite, and at most how many items of each task.
        workspace: Where results are stored, and the tokens that held-out tasks are made from.
        schedule: Another iteration schedule than the checkpoint's.
        num_fewshot: Solved examples before each item, where a task does not fix it at 0; as the
            task says when unset.
        tracking: Where the evaluation is shown as a run of its own.
        progress: Told how many items are done.

    Raises:
        UserError: If the checkpoint is damaged, the schedule does not fit it, its tokens are not
            in the workspace, or no such tasks exist.
        StageFailed: If the tasks exist and none can be loaded.
    """
    progress = progress or Progress()
    config = _config(checkpoint, schedule)
    suite, limit = _suite(checkpoint, settings, workspace, config, num_fewshot, progress)
    for name, reason in suite.skipped.items():
        progress.note(f"skipped {name}: {reason}")
    model = [weights_key(checkpoint), config.to_dict(), file_key(checkpoint / TOKENIZER)]
    keys = {
        name: content_key("evaluation", model, suite.fingerprint(name), limit)
        for name in suite.tasks
    }
    paths = {name: workspace.evaluations / f"{key}.json" for name, key in keys.items()}
    results = {n: found for n, path in paths.items() if (found := _stored(path)) is not None}
    missing = [name for name in suite.tasks if name not in results]
    if missing:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        decoder = load_decoder(checkpoint, device=device).with_schedule(config.corrections)
        results |= run_suite(
            suite.only(missing),
            decoder,
            checkpoint / TOKENIZER,
            batch_size=settings.batch_size,
            limit=limit,
            progress=progress,
            # Stored one by one: what is measured survives an interruption.
            on_result=lambda result: write_json(paths[result.name], result.to_dict()),
        )
    else:
        progress.start("evaluate")
    evaluation = EvaluationResult(
        results={name: results[name] for name in suite.tasks},
        groups=suite.groups,
        skipped=suite.skipped,
    )
    progress.finish(_summary(evaluation) + ("" if missing else ", found again"))
    if tracking:
        _track(tracking, keys, evaluation, config, checkpoint)
    return evaluation


def _config(checkpoint: Path, schedule: IterationSchedule | None) -> ModelConfig:
    config = load_config(checkpoint)
    try:
        return dataclasses.replace(config, schedule=schedule) if schedule else config
    except ValueError as error:
        raise UserError(f"{checkpoint}: {error}") from None


def _suite(
    checkpoint: Path,
    settings: EvaluationSettings,
    workspace: Workspace,
    config: ModelConfig,
    num_fewshot: int | None,
    progress: Progress,
) -> tuple[Suite, int | None]:
    """Return the tasks, and at most how many items of each; held-out tasks have their own size."""
    if settings.suite == HELDOUT:
        built = build_heldout(
            tokens_of(checkpoint, workspace),
            num_items=settings.num_items,
            context_length=config.context_length,
            progress=progress,
        )
        for note in built.notes:
            progress.note(note)
        names = [name for name in TASKS if name in built.tasks]
        return load_suite(names, folders=[built.folder]), None
    names = [name.strip() for name in settings.suite.split(",") if name.strip()]
    folders = [Path(settings.include_path)] if settings.include_path else []
    return load_suite(names, folders=folders, num_fewshot=num_fewshot), settings.num_items


def _stored(path: Path) -> TaskResult | None:
    try:
        values = read_json(path)
        return TaskResult.from_dict(values) if values else None
    except UserError:
        return None  # damaged: it is measured again


def _track(
    tracking: Tracking,
    keys: Mapping[str, str],
    evaluation: EvaluationResult,
    config: ModelConfig,
    checkpoint: Path,
) -> None:
    run = tracking.run(
        content_key("evaluation", dict(keys)),
        name=f"evaluate {', '.join(keys)}"[:80],
        kind="evaluation",
        params={
            "method": config.method,
            "schedule": config.corrections,
            "checkpoint": checkpoint,
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
    return ", ".join([*parts, f"{evaluation.num_items:,} items"])
