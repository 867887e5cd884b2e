"""Run one planned trial in this process: train, measure, write the result.

A Ray Tune trial calls this, and a debugger can, without Ray. It is idempotent: a finished trial
returns its result, a trained one is only measured, an interrupted one resumes from its checkpoint.

A trial that competes with the same model at other learning rates may be stopped early, by ASHA
(`cluster/tune.py`). The reason then lies in its folder. It keeps its checkpoint and has no result,
so a sweep without ASHA, or with another rule, trains it to its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.evaluation.measuring import Conditions, ModelMeasurer
from orchestrator.evaluation.store import EvaluationStore
from orchestrator.evaluation.tasks import TaskSelection, load_suite
from orchestrator.models.folder import load_provenance
from orchestrator.models.open import open_model
from orchestrator.records.training import TrainingOutcome
from orchestrator.records.trial import Trial
from orchestrator.terminal.stop import stop_requested, stop_when
from orchestrator.training.trainer import run_job
from orchestrator.training.watching import lock_run_folder
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import DONE_NAME, STOPPED_NAME, Workspace

if TYPE_CHECKING:
    from orchestrator.cluster.tune import TrialPlace


def run_trial(trial: Trial, place: TrialPlace | None = None) -> Trial | None:
    """Run a trial to its result, or return the result of the process that ran it.

    The folder is locked until the result is written: a trial of another sweep that is the same
    waits for this one, so none is made twice.

    Args:
        trial: What is trained and measured.
        place: Where; in this process, on the CPU, when unset.

    Returns:
        The trial with what was measured; None after a request to stop, or if it was stopped early.
    """
    folder, is_beaten = Path(trial.folder), False
    verdict = folder / STOPPED_NAME

    def report(step: int, numbers: Mapping[str, float]) -> None:
        nonlocal is_beaten
        if place:
            place.report(step, numbers)
        is_beaten = verdict.exists()

    with lock_run_folder(folder, wait=True) as is_ours:
        if not is_ours:
            return None
        if finished := trial.result():
            return finished
        verdict.unlink(missing_ok=True)  # Whoever runs the trial follows another rule.
        outcome = None
        if trial.job:
            with stop_when(lambda: is_beaten):
                train = place.train if place else run_job
                outcome = train(trial.job, report=report)
            if not outcome.finished or stop_requested():
                return None
        trained = trial.with_numbers("train", _training_numbers(trial, outcome))
        if outcome:
            trained = trained.model_copy(update={"checkpoint": outcome.checkpoint})
        measure = partial(measure_trial, trained)
        measured = place.on_device(measure) if place else measure("cpu")
        measured.write(trial.result_path)
        return measured


def measure_trial(trial: Trial, device: str) -> Trial:
    """Return a trial with its quality, measured on a device; its checkpoint is known.

    Quality is `accuracy`, `bits_per_byte`, `validation_loss` and `TASK/METRIC`, with `_stderr`.
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
        precision=suite.precision,
        limit=suite.limit,
        sequence_length=suite.sequence_length,
        batch_size=suite.batch_size,
        device=device,
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
