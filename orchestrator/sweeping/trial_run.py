"""Run one planned trial in this process: train, measure, write the result.

A Ray Tune trial calls this, and a debugger can, without Ray. It is idempotent: a finished trial
returns its result, a trained one is only measured, an interrupted one resumes from its checkpoint.
The trial's folder is locked meanwhile, so two processes never run one trial at the same time.
Milliseconds are not measured here: trials that run at the same time would disturb the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from iiet.decoder import Decoder
from orchestrator.data.batches import validation_batches
from orchestrator.data.token_store import open_tokens
from orchestrator.evaluation.harness import load_suite, run_suite
from orchestrator.evaluation.model_tokenizer import checkpoint_tokenizer
from orchestrator.records.training import TrainingOutcome
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.reporting.sweep_results import items_file_name
from orchestrator.sweeping.asha import AshaTrial, discard_early_stop, stored_early_stop
from orchestrator.training.checkpoint import DTYPES, load_provenance
from orchestrator.training.distributed import World
from orchestrator.training.job import DONE_NAME, clear_stop_request
from orchestrator.training.model_loading import load_model
from orchestrator.training.run import Report, run_job
from orchestrator.training.run_lock import is_run_locked, lock_run_folder
from orchestrator.training.validation import validation_loss
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import Journal

NUM_VALIDATION_TOKENS = 65_536
"""Tokens of the validation loss in the tables."""

Train = Callable[..., TrainingOutcome]
"""Trains a job as `run_job` does, with its arguments `should_stop` and `report`."""
Measure = Callable[[str], dict[str, float]]
"""Returns the quality of a model on a device, given by name."""


@dataclass(frozen=True)
class TrialRun:
    """How a call of `run_trial` ended."""

    state: Literal["made", "found", "busy", "stopped", "stopped early"]
    """`made` by this call, `found` finished, `busy` in another process, `stopped` on request, or
    `stopped early` by ASHA."""
    result: Trial | None = None
    """The result, where it was made or found."""


def run_trial(
    trial: Trial,
    *,
    wait: bool = True,
    should_stop: Callable[[], bool] = lambda: False,
    report: Report | None = None,
    asha: AshaTrial | None = None,
    train: Train | None = None,
    on_device: Callable[[Measure], dict[str, float]] | None = None,
) -> TrialRun:
    """Run a trial to its result, or take the result of the process that runs it.

    Args:
        trial: What is trained and measured.
        wait: Wait for another process that runs this trial; otherwise the trial ends as `busy`.
        should_stop: Asked before each training step, and while waiting.
        report: Called with the training step and its numbers.
        asha: What the trial competes with; an earlier stop by another rule is discarded.
        train: Trains its job; in this process, on the CPU, when unset.
        on_device: Measures on some device; here, on the CPU, when unset.

    Returns:
        How it ended. A result also lies in the trial's folder.
    """
    finished = trial.result()
    if finished:
        return TrialRun("found", finished)
    with lock_run_folder(Path(trial.folder), wait=wait, should_stop=should_stop) as is_ours:
        if not is_ours:
            return TrialRun("stopped" if wait else "busy")
        # Once more: the process that had the lock before may have finished it.
        finished = trial.result()
        if finished:
            return TrialRun("found", finished)
        if stored_early_stop(trial, asha):
            return TrialRun("stopped early")
        discard_early_stop(trial)  # Left by another rule, or by a driver that was killed.
        outcome = None
        if trial.job:
            outcome = (train or run_job)(trial.job, should_stop=should_stop, report=report)
        if outcome is None or (outcome.finished and not should_stop()):
            on_device = on_device or (lambda measure: measure("cpu"))
            return TrialRun("made", _measure(trial, outcome, on_device))
        if stop := stored_early_stop(trial, asha):
            journal = Journal(Path(trial.folder))
            journal.event("stopped early", text=stop.text)
            journal.close()
            clear_stop_request(Path(trial.folder))
        return TrialRun("stopped early" if stop else "stopped")


def is_trial_locked(trial: Trial) -> bool:
    """Return whether a process runs a trial now."""
    return is_run_locked(Path(trial.folder))


def _measure(
    trial: Trial,
    outcome: TrainingOutcome | None,
    on_device: Callable[[Measure], dict[str, float]],
) -> Trial:
    """Measure the trained checkpoint, or the planned one, and write the result."""
    checkpoint = outcome.checkpoint if outcome else trial.checkpoint
    assert checkpoint is not None
    measured = trial.model_copy(
        update={
            "checkpoint": checkpoint,
            "quality": on_device(partial(_quality, trial, checkpoint)),
            "train": _training_numbers(outcome) if outcome else _numbers_of_run(Path(checkpoint)),
        }
    )
    measured.write(trial.result_path)
    return measured


def _quality(trial: Trial, checkpoint: str, device: str) -> dict[str, float]:
    dtype = DTYPES[trial.suite.precision]
    schedule = trial.model.corrections
    decoder = load_model(Path(checkpoint), device=device, dtype=dtype, schedule=schedule)
    return measure_quality(decoder, trial.suite, Path(trial.folder) / items_file_name(trial.key))


def measure_quality(decoder: Decoder, suite: TrialSuite, items_path: Path) -> dict[str, float]:
    """Measure a decoder's accuracy and losses.

    Args:
        decoder: The model under the schedule that is measured.
        suite: Tokens, tasks and batch size, as planned.
        items_path: File for the values of single items, for paired comparisons.

    Returns:
        `accuracy`, `bits_per_byte`, `validation_loss` and `TASK/METRIC`; `_stderr` where known.
    """
    store = open_tokens(suite.tokens_folder)
    tasks = load_suite(
        suite.tasks,
        folders=[Path(suite.include_folder)] if suite.include_folder else [],
        heldout=Path(suite.suite_folder) if suite.suite_folder else None,
        num_fewshot=suite.num_fewshot,
        prompts=suite.prompts,
        planned=suite.fingerprints,
    )
    # Students of an imported model read text as it does.
    imported = suite.vocabulary_folder
    tokenizer = checkpoint_tokenizer(Path(imported)) if imported else store.tokenizer_path
    evaluation = run_suite(
        tasks, decoder, tokenizer, batch_size=suite.batch_size, limit=suite.limit
    )
    evaluation.write(items_path)
    return {
        **evaluation.quality(),
        "validation_loss": heldout_loss(decoder, store.folder),
    }


def heldout_loss(decoder: Decoder, tokens_folder: Path) -> float:
    """Return the mean next-token loss over held-out tokens, in nats, under the model's schedule."""
    batches = validation_batches(
        open_tokens(tokens_folder).validation,
        context_length=decoder.config.context_length,
        num_tokens=NUM_VALIDATION_TOKENS,
        batch_size=16,
    )
    world = World(device=str(decoder.device))
    return validation_loss(decoder, list(batches), decoder.schedule, precision="fp32", world=world)


def _training_numbers(outcome: TrainingOutcome) -> dict[str, float]:
    numbers = {
        "steps": outcome.step,
        "tokens": outcome.num_tokens,
        "flops": outcome.training_flops,
        "seconds": outcome.train_seconds,
    }
    if outcome.shared_flops:
        numbers["shared_flops"] = outcome.shared_flops
    return numbers


def _numbers_of_run(checkpoint: Path) -> dict[str, float]:
    """Return what a checkpoint's own run took, if its record is there, whole, and of its step."""
    step = load_provenance(checkpoint).get("step", 0)
    outcome = None
    with suppress(UserError):
        outcome = TrainingOutcome.read(checkpoint.parent / DONE_NAME)
    if outcome and outcome.step == step:
        return _training_numbers(outcome)
    return {"steps": float(step)}
