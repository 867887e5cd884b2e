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

from orchestrator.evaluation.measuring import Conditions, ModelMeasurer
from orchestrator.evaluation.store import EvaluationStore
from orchestrator.evaluation.suite import load_suite
from orchestrator.evaluation.tasks import TaskSelection
from orchestrator.models.folder import load_provenance
from orchestrator.models.open import open_model
from orchestrator.records.training import TrainingOutcome
from orchestrator.records.trial import AshaTrial, Trial
from orchestrator.sweeping.asha import discard_early_stop, stored_early_stop
from orchestrator.terminal.stop import stop_requested
from orchestrator.training.trainer import Report, run_job
from orchestrator.training.watching import is_run_locked, lock_run_folder
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import STOPPED_EVENT, Journal
from orchestrator.workspace.layout import DONE_NAME, Workspace

Train = Callable[..., TrainingOutcome]
"""Trains a job as `run_job` does, with its argument `report`."""
Measure = Callable[[str], Trial]
"""Returns a trial with its quality, measured on a device, given by name."""


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
    report: Report | None = None,
    asha: AshaTrial | None = None,
    train: Train | None = None,
    on_device: Callable[[Measure], Trial] | None = None,
) -> TrialRun:
    """Run a trial to its result, or take the result of the process that runs it.

    Args:
        trial: What is trained and measured.
        wait: Wait for another process that runs this trial; otherwise the trial ends as `busy`.
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
    with lock_run_folder(Path(trial.folder), wait=wait) as is_ours:
        if not is_ours:
            return TrialRun("stopped" if wait else "busy")
        # Once more: the process that had the lock before may have finished it.
        finished = trial.result()
        if finished:
            return TrialRun("found", finished)
        if stored_early_stop(trial, asha):
            return TrialRun("stopped early")
        discard_early_stop(trial)  # Left by another rule.
        outcome = None
        if trial.job:
            outcome = (train or run_job)(trial.job, report=report)
        if outcome is None or (outcome.finished and not stop_requested()):
            trained = trial.with_numbers("train", _training_numbers(trial, outcome))
            if outcome:
                trained = trained.model_copy(update={"checkpoint": outcome.checkpoint})
            measure = partial(measure_trial, trained)
            measured = on_device(measure) if on_device else measure("cpu")
            measured.write(trial.result_path)
            return TrialRun("made", measured)
        if stop := stored_early_stop(trial, asha):
            journal = Journal(Path(trial.folder))
            journal.event(STOPPED_EVENT, text=stop.text)
            journal.close()
        return TrialRun("stopped early" if stop else "stopped")


def is_trial_locked(trial: Trial) -> bool:
    """Return whether a process runs a trial now."""
    return is_run_locked(Path(trial.folder))


def measure_trial(trial: Trial, device: str) -> Trial:
    """Return a trial with its quality, measured on a device; its checkpoint is known.

    Quality is `accuracy`, `bits_per_byte`, `validation_loss` and `TASK/METRIC`; `_stderr` where
    known. The results of the tasks are in the workspace's store of evaluations.
    """
    suite = trial.suite
    asked = TaskSelection(
        names=suite.tasks,
        folders=(Path(suite.include_folder),) if suite.include_folder else (),
        heldout=Path(suite.suite_folder) if suite.suite_folder else None,
        num_fewshot=suite.num_fewshot,
        prompts=suite.prompts,
    )
    # Students of an imported model read text as it does.
    imported = Path(suite.vocabulary_folder) if suite.vocabulary_folder else None
    model = open_model(Path(str(trial.checkpoint)), trial.model.corrections, text_folder=imported)
    # A trial's folder lies in `trials` or `runs` of its workspace.
    store = EvaluationStore(Workspace(Path(trial.folder).parents[1]).evaluations)
    conditions = Conditions(
        precision=suite.precision, limit=suite.limit, batch_size=suite.batch_size, device=device
    )
    measurer = ModelMeasurer(model, store, conditions)
    measured = measurer.tasks(load_suite(asked, suite.fingerprints))
    loss = measurer.validation_loss(Path(suite.tokens_folder))
    quality = {**measured.evaluation.quality(), "validation_loss": loss}
    found = trial.model_copy(update={"evaluation": measured.keys})
    return found.with_numbers("quality", quality)


def _training_numbers(trial: Trial, outcome: TrainingOutcome | None) -> dict[str, float | None]:
    """Return what a training took; of a given checkpoint, what its own run took.

    That run's record may be missing, damaged or of another step; only steps are known then.
    """
    if outcome is None:
        checkpoint = Path(str(trial.checkpoint))
        step = load_provenance(checkpoint).get("step", 0)
        with suppress(UserError):
            outcome = TrainingOutcome.read(checkpoint.parent / DONE_NAME)
        if outcome is None or outcome.step != step:
            return {"steps": step}
    return {
        "steps": outcome.step,
        "tokens": outcome.num_tokens,
        "flops": outcome.training_flops,
        "seconds": outcome.train_seconds,
        "shared_flops": outcome.shared_flops or None,
    }
