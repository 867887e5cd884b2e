"""Run one planned trial in this process: train, measure, write the result.

A Ray Tune trial calls this, and a debugger can, without Ray. It is idempotent: a finished trial
returns its result, a trained one is only measured, an interrupted one resumes from its checkpoint.

ASHA (`cluster/tune.py`) may stop a trial early if the same model is better at another learning
rate. The trial learns this when it reports a validation loss. It keeps its checkpoint and has no
result, so a sweep without ASHA, or with another rule, resumes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from orchestrator.cluster.work import CPU, Executor
from orchestrator.evaluation.measuring import VALIDATION_LOSS_ENTRY, ModelMeasurer
from orchestrator.evaluation.store import EvaluationStore
from orchestrator.evaluation.tasks import load_suite
from orchestrator.models.folder import load_provenance
from orchestrator.models.open import open_model
from orchestrator.planning.fit import out_of_memory_explained, sequences_if_uncompiled
from orchestrator.records.training import TrainingJob, TrainingOutcome
from orchestrator.records.trial import Trial
from orchestrator.terminal.progress import Progress
from orchestrator.terminal.stop import stop_requested, stop_when
from orchestrator.training.run_locks import lock_run_folder
from orchestrator.training.trainer import run_job
from orchestrator.training.world import World
from orchestrator.workspace.errors import Interrupted, UserError
from orchestrator.workspace.layout import DONE_NAME, STOPPED_NAME, Workspace


class TrialProcess(Protocol):
    """The process of a trial: its devices, and the receiver of its validation losses.

    `ThisProcess` reports to nobody; under Ray Tune, `TuneProcess` reports to the sweep.
    """

    @property
    def num_workers(self) -> int:
        """Processes that train together."""

    @property
    def device(self) -> str:
        """Device of this process."""

    @property
    def executor(self) -> Executor:
        """Executor of the trial's measurements, on one of its devices."""

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Report a validation loss; returns after the decision whether the trial continues."""

    def is_beaten(self) -> bool:
        """Return whether the trial was stopped early after its last report."""

    def train_on_workers(self, job: TrainingJob) -> TrainingOutcome:
        """Train a job on several workers, which call `report` and `is_beaten`."""


class ThisProcess:
    """Runs a trial without Ray, on the CPU, and without competitors."""

    num_workers = 1
    device = "cpu"
    executor = CPU

    def report(self, step: int, numbers: Mapping[str, float]) -> None:
        """Tell nobody."""

    def is_beaten(self) -> bool:
        """Return False: there is no other trial."""
        return False

    def train_on_workers(self, job: TrainingJob) -> TrainingOutcome:
        """Raise an error: this host has one worker."""
        raise NotImplementedError


def run_trial(trial: Trial, process: TrialProcess | None = None) -> Trial | None:
    """Run a trial, or return the result of another process that ran it.

    The folder is locked until the result is written, so that another sweep with the same trial
    waits for the result.

    Args:
        trial: What is trained and measured.
        process: Where it runs; in this process, on the CPU, when unset.

    Returns:
        The trial with its results; None after a request to stop or an early stop.
    """
    process = process or ThisProcess()
    folder = Path(trial.folder)
    with lock_run_folder(folder, wait=True) as is_ours:
        if not is_ours:
            return None
        if finished := trial.result():
            return finished
        # An earlier call stopped it by another rule.
        (folder / STOPPED_NAME).unlink(missing_ok=True)

        # Train it, unless it only measures a checkpoint.
        outcome = None
        if trial.job:
            with stop_when(process.is_beaten):
                if process.num_workers > 1:
                    outcome = process.train_on_workers(trial.job)
                else:
                    world = World(device=process.device)
                    with out_of_memory_explained(trial.job, world):
                        outcome = run_job(
                            trial.job,
                            world=world,
                            report=process.report,
                            sequences_if_uncompiled=sequences_if_uncompiled(trial.job, world),
                        )
            if not outcome.finished or stop_requested():
                return None
            trial = trial.model_copy(update={"checkpoint": outcome.checkpoint})

        # Measure it on the same device.
        trained = trial.with_numbers("train", _training_numbers(trial, outcome))
        try:
            measured = process.executor.run(partial(measure_trial, trained), Progress())
        except Interrupted:
            return None
        measured.write(trial.result_path)
        return measured


def measure_trial(trial: Trial, device: str, progress: Progress) -> Trial:
    """Measure a trial's checkpoint on a device, and return the trial with its quality.

    Quality is `accuracy`, `bits_per_byte`, `validation_loss` and `TASK/METRIC`, with `_stderr`.
    """
    suite = trial.suite
    model = open_model(str(trial.checkpoint), schedule=trial.opened_schedule)
    if suite.vocabulary_folder:  # Students of an imported model read text as it does.
        model = replace(model, text_folder=Path(suite.vocabulary_folder))
    # A trial's folder lies in `trials` or `runs` of its workspace.
    store = EvaluationStore(Workspace(Path(trial.folder).parents[1]).evaluations)
    measurer = ModelMeasurer(model, store, suite, device=device, progress=progress)
    measured = measurer.measure_tasks(load_suite(suite))
    loss = measurer.validation_loss(Path(suite.tokens_folder))
    quality = {**measured.evaluation.quality(), VALIDATION_LOSS_ENTRY: loss}
    measured_trial = trial.model_copy(update={"evaluation": measured.keys})
    return measured_trial.with_numbers("quality", quality)


def _training_numbers(trial: Trial, outcome: TrainingOutcome | None) -> dict[str, float | None]:
    """Return steps, tokens, FLOPs and seconds of a training; for a checkpoint, of its own run.

    If that run's record is missing, damaged or of another step, only the steps are known.
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
    }
