"""Continue a finished training for more steps, with bitwise the result of one longer training.

The user names the finished training. The two trainings share their first n steps if two things are
equal: the fields of their keys, except those marked `LATER_WEIGHTS` and the iteration schedule; and
what each of the n steps trains (`step_settings`). The longer training starts from the newest
checkpoint within these steps: with `decay: wsd` the one before the decay, with `constant` the last
one. `cosine` is refused, because its rates depend on the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from iiet.model.schedule import IterationSchedule
from orchestrator.data.preparation import tokens_folder_of
from orchestrator.models.folder import newest_checkpoint
from orchestrator.models.lookup import find_pretraining
from orchestrator.records.training import TrainingJob
from orchestrator.records.training_state import Training
from orchestrator.settings import SETTINGS_NAME, Settings, TrainingSettings, read_settings
from orchestrator.settings.effects import Effect, fields_with
from orchestrator.training.job import describe_difference, key_fields
from orchestrator.training.schedules import (
    drawn_by_step,
    learning_rate_at,
    schedule_by_step,
    stable_steps,
    steps_before_corrections,
)
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import read_metrics
from orchestrator.workspace.layout import (
    Workspace,
    find_checkpoints,
    step_of,
)


def first_steps_fields(job: TrainingJob) -> dict[str, Any]:
    """Return what, together with `step_settings`, determines the first steps, as JSON values."""
    fields = key_fields(job)
    for name in fields_with(TrainingSettings, Effect.LATER_WEIGHTS):
        fields["recipe"].pop(name, None)
    if job.recipe.trained_layers == "all":
        # Without it, the schedule may determine which layers a step trains.
        fields["model"].pop("schedule", None)
    return fields


def step_settings(
    full_schedule: IterationSchedule, recipe: TrainingSettings
) -> Callable[[int], tuple[object, ...]]:
    """Return step -> what the settings marked `LATER_WEIGHTS` mean in it, as JSON values.

    These are its learning rate and iteration schedule; with elastic training also the cheaper
    schedules that it draws, and the weights of their losses.
    """
    schedule_at = schedule_by_step(full_schedule, recipe)
    drawn_at = drawn_by_step(full_schedule, recipe)

    def settings_at(step: int) -> tuple[object, ...]:
        cheaper = drawn_at(step)
        losses = recipe.elastic.model_dump(mode="json") if recipe.elastic and cheaper else None
        rate = learning_rate_at(step, recipe)
        return rate, str(schedule_at(step)), [str(schedule) for schedule in cheaper], losses

    return settings_at


def num_shared_steps(job: TrainingJob, other: TrainingJob) -> int:
    """Return how many first steps two trainings of equal `first_steps_fields` share."""
    settings_at = step_settings(job.model.corrections, job.recipe)
    others_at = step_settings(other.model.corrections, other.recipe)
    most = min(job.recipe.num_steps, other.recipe.num_steps)
    different = (step for step in range(most) if settings_at(step) != others_at(step))
    return next(different, most)


def metrics_until(checkpoint: Path) -> list[tuple[int, dict[str, float]]]:
    """Return steps and metrics of a checkpoint's journal, up to the checkpoint."""
    last_step = step_of(checkpoint)
    records = read_metrics(checkpoint.parent)
    return [(step, values) for step, values in records if step <= last_step]


def first_step(job: TrainingJob, saved_step: int) -> int:
    """Return the step after which a job starts: that of its own checkpoint or of the continued run.

    Args:
        saved_step: Step of the job's own newest checkpoint; 0 without one.
    """
    start = step_of(Path(job.continued_from)) if job.continued_from else 0
    return max(saved_step, start)


def continued_settings(
    settings: Settings, workspace: Workspace, run: Path
) -> tuple[Settings, TrainingJob]:
    """Return the settings that continue a finished pretraining, and its job.

    Args:
        settings: The settings of that run with more steps; see `continued_recipe`.
        workspace: Where names are looked up.
        run: The run, by path or name.

    Raises:
        UserError: If there is no such run, it is not finished or not shorter, or its tokens differ
            or are missing.
    """
    folder = find_pretraining(workspace, run)
    finished = Training(folder)
    # The last checkpoint may be lost: an earlier one may do.
    reached_its_end = finished.outcome or finished.lost_end
    if finished.job is None or not reached_its_end or not finished.checkpoints:
        raise UserError(
            f"{folder} is not finished or has lost its checkpoints; the command that started it "
            "resumes it, and then it can be continued"
        )
    if read_settings(folder / SETTINGS_NAME).data != settings.data:
        raise UserError(f"a run is continued on its own tokens; leave data as {folder} has it")
    tokens = tokens_folder_of(finished.checkpoints[-1], workspace)
    recipe = continued_recipe(finished.job.recipe, settings.training)
    folders = {"run_folder": str(folder), "tokens_folder": str(tokens)}
    job = finished.job.model_copy(update=folders)
    return settings.model_copy(update={"training": recipe}), job


def continued_recipe(earlier: TrainingSettings, longer: TrainingSettings) -> TrainingSettings:
    """Return the longer recipe, whose corrections are switched on at the same steps as before.

    Settings that are shares of the steps are recomputed, unless the user has changed them.

    Raises:
        UserError: If it is not longer.
    """
    if longer.num_steps <= earlier.num_steps:
        raise UserError(
            f"the run has trained {earlier.num_steps:,} steps; --steps takes a larger number, got "
            f"{longer.num_steps:,}"
        )
    shares = (earlier.iterate_from_fraction, earlier.iterate_ramp_fraction)
    if (longer.iterate_from_fraction, longer.iterate_ramp_fraction) != shares:
        return longer
    ramp_start = steps_before_corrections(earlier)
    ramp_end = round(earlier.num_steps * sum(shares))
    same_steps = {
        "iterate_from_fraction": ramp_start / longer.num_steps,
        "iterate_ramp_fraction": (ramp_end - ramp_start) / longer.num_steps,
    }
    return longer.model_copy(update=same_steps)


def continue_job(
    earlier: TrainingJob, longer: TrainingJob, note: Callable[[str], None]
) -> TrainingJob:
    """Return the longer job, which starts from a checkpoint of the finished one.

    Args:
        earlier: The finished job; see `continued_settings`.
        longer: The job with more steps; one that has begun resumes from its own checkpoints.
        note: Called with a sentence that says where it starts and how the learning rate goes on.

    Raises:
        UserError: If the two differ from the first step, or no checkpoint before their first
            different step exists; names what to change.
    """
    if find_checkpoints(longer.folder):
        return longer
    recipe = longer.recipe
    if earlier.recipe.decay == "cosine":
        raise UserError(
            f"{earlier.folder} cannot be continued: its learning rate follows a cosine over all of "
            f"its {earlier.recipe.num_steps:,} steps, so every step after the warm-up of a longer "
            "training differs. Train a new run with --set training.decay=wsd: its stable part does "
            "not depend on the number of steps"
        )
    if difference := describe_difference(first_steps_fields(earlier), first_steps_fields(longer)):
        raise UserError(
            f"{earlier.folder} cannot be continued with other settings ({difference}); train a new "
            "run with them"
        )
    num_shared = num_shared_steps(earlier, longer)
    damage: list[str] = []
    start = newest_checkpoint(
        earlier.folder, damage.append, up_to_step=num_shared, with_training_state=True
    )
    if start is None:
        steps = ", ".join(f"{step_of(folder):,}" for folder in find_checkpoints(earlier.folder))
        problem = f"; {damage[0]}" if damage else ""
        raise UserError(
            f"{earlier.folder} cannot be continued: a training of {recipe.num_steps:,} steps "
            f"differs from it after step {num_shared:,}, and it has no intact checkpoint until "
            f"there (only of the steps {steps}{problem}); train a new run"
        )
    stable = stable_steps(recipe)
    rule = f"is stable until step {stable:,} and decays until the last" if stable else "is constant"
    note(
        f"{longer.folder.name} continues {earlier.folder.name} from step {step_of(start):,} of "
        f"{recipe.num_steps:,}; the learning rate {rule}"
    )
    return longer.model_copy(update={"continued_from": str(start)})
