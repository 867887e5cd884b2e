"""Continue a finished training to more steps: the weights are those of one longer training.

A longer training equals a finished one until the first step whose learning rate or iteration
schedule differs. It starts from the newest checkpoint before that step: the one before the decay
with `decay: wsd`, the last one with `constant`. A `cosine` is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orchestrator.data.model_tokens import tokens_folder_of
from orchestrator.models.folder import newest_intact_checkpoint
from orchestrator.models.lookup import find_run_folder
from orchestrator.records.training import TrainingJob
from orchestrator.settings import SETTINGS_NAME, Settings, TrainingSettings, read_settings
from orchestrator.training.job import key_fields
from orchestrator.training.job_checks import describe_difference
from orchestrator.training.learning_rate import learning_rate_at, stable_steps
from orchestrator.training.schedules import schedule_by_step
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json
from orchestrator.workspace.layout import DONE_NAME, JOB_NAME, Workspace, find_checkpoints, step_of

FIELDS_OF_LATER_STEPS = {
    "num_steps",
    "decay",
    "decay_fraction",
    "final_learning_rate_fraction",
    "iterate_from_fraction",
    "iterate_ramp_fraction",
}
"""Fields of a recipe that may differ: `shared_steps` says where their effect begins."""


def continued_settings(
    settings: Settings, workspace: Workspace, run: Path
) -> tuple[Settings, TrainingJob]:
    """Return the settings that continue a finished pretraining, and its job.

    Args:
        settings: The settings of that run with more steps; see `continued_recipe`.
        workspace: Where names are looked up.
        run: The run, by path or name.

    Raises:
        UserError: If there is none, it is not finished or not shorter, or its tokens are others or
            are missing.
    """
    folder = find_run_folder(workspace, run)
    path = folder / JOB_NAME
    stored = read_json(path)
    if stored is None or not (folder / SETTINGS_NAME).is_file():
        raise UserError(f"{folder} was not made by `iiet-orch pretrain`, so it cannot be continued")
    checkpoints = find_checkpoints(folder)
    if not checkpoints or not (folder / DONE_NAME).is_file():
        raise UserError(
            f"{folder} is not finished or has lost its checkpoints; the command that started it "
            "resumes it, and then it can be continued"
        )
    if read_settings(folder / SETTINGS_NAME).data != settings.data:
        raise UserError(f"a run is continued on its own tokens; leave data as {folder} has it")
    tokens = tokens_folder_of(checkpoints[-1], workspace)
    job = TrainingJob.parse(stored.get("job", {}), path)
    recipe = continued_recipe(job.recipe, settings.training)
    job = job.model_copy(update={"run_folder": str(folder), "tokens_folder": str(tokens)})
    return settings.model_copy(update={"training": recipe}), job


def continued_recipe(earlier: TrainingSettings, longer: TrainingSettings) -> TrainingSettings:
    """Return the longer recipe with the corrections switched on at the same steps as before.

    Its shares of the steps are recomputed, unless they already differ from the earlier ones.

    Raises:
        UserError: If it is not longer.
    """
    if longer.num_steps <= earlier.num_steps:
        raise UserError(
            f"the run has trained {earlier.num_steps:,} steps; --steps takes a larger number, got "
            f"{longer.num_steps:,}"
        )
    shares = ("iterate_from_fraction", "iterate_ramp_fraction")
    if any(getattr(longer, name) != getattr(earlier, name) for name in shares):
        return longer
    first = round(earlier.num_steps * earlier.iterate_from_fraction)
    ramp_end = earlier.iterate_from_fraction + earlier.iterate_ramp_fraction
    ramp = round(earlier.num_steps * ramp_end) - first
    values = (first / longer.num_steps, ramp / longer.num_steps)
    return longer.model_copy(update=dict(zip(shares, values, strict=True)))


def continue_job(
    earlier: TrainingJob, longer: TrainingJob, note: Callable[[str], None]
) -> TrainingJob:
    """Return the longer job, which starts from a checkpoint of the finished one.

    Args:
        earlier: The finished job; see `continued_settings`.
        longer: The job with more steps; one that has begun resumes from its own checkpoints.
        note: Called with a sentence that says where it starts and how the learning rate goes on.

    Raises:
        UserError: As `find_start`.
    """
    if find_checkpoints(longer.folder):
        return longer
    start, recipe = find_start(earlier, longer), longer.recipe
    stable = stable_steps(recipe)
    rule = f"is stable until step {stable:,} and decays until the last" if stable else "is constant"
    note(
        f"{longer.folder.name} continues {earlier.folder.name} from step {step_of(start):,} of "
        f"{recipe.num_steps:,}; the learning rate {rule}"
    )
    return longer.model_copy(update={"continued_from": str(start)})


def find_start(earlier: TrainingJob, longer: TrainingJob) -> Path:
    """Return the checkpoint of a finished job that a longer one starts from.

    Raises:
        UserError: If the two differ from the start, or no checkpoint before their first different
            step is left; says what would have to be different.
    """
    if earlier.recipe.decay == "cosine":
        raise UserError(
            f"{earlier.folder} cannot be continued: its learning rate follows a cosine over all of "
            f"its {earlier.recipe.num_steps:,} steps, so every step after the warm-up of a longer "
            "training differs. Train a new run with --set training.decay=wsd: its stable part does "
            "not depend on the number of steps"
        )
    if difference := describe_difference(_other_fields(earlier), _other_fields(longer)):
        raise UserError(
            f"{earlier.folder} cannot be continued with other settings ({difference}); train a new "
            "run with them"
        )
    common = shared_steps(earlier, longer)
    found, damage = newest_intact_checkpoint(
        earlier.folder, up_to_step=common, with_training_state=True
    )
    if found:
        return found
    steps = ", ".join(f"{step_of(folder):,}" for folder in find_checkpoints(earlier.folder))
    problem = f"; {damage[0]}" if damage else ""
    raise UserError(
        f"{earlier.folder} cannot be continued: a training of {longer.recipe.num_steps:,} steps "
        f"differs from it after step {common:,}, and it has no intact checkpoint until there "
        f"(only of the steps {steps}{problem}); train a new run"
    )


def shared_steps(earlier: TrainingJob, longer: TrainingJob) -> int:
    """Return the number of first steps with the same learning rate and iteration schedule."""
    schedules = [schedule_by_step(job.model.corrections, job.recipe) for job in (earlier, longer)]
    for step in range(earlier.recipe.num_steps):
        rates = {learning_rate_at(step, job.recipe) for job in (earlier, longer)}
        if len(rates) > 1 or len({schedule_at(step) for schedule_at in schedules}) > 1:
            return step
    return earlier.recipe.num_steps


def _other_fields(job: TrainingJob) -> dict[str, object]:
    fields = key_fields(job)
    recipe = fields["recipe"]
    kept = {name: recipe[name] for name in recipe if name not in FIELDS_OF_LATER_STEPS}
    return {**fields, "recipe": kept}
