"""Steps that a training takes over from another one, bitwise as if it had made them itself.

A first stage: an IIET is first trained without corrections, so models with the same seed, rate and
recipe are equal until then. The run that gets there first keeps its checkpoint, whose provenance
names the stage; later runs continue it. Models that start at the same time each train the stage:
none waits.

A longer training equals a finished one until the first step whose learning rate or iteration
schedule differs. It continues the newest checkpoint before that step: the one before the decay with
`decay: wsd`, the last one with `constant`. A `cosine` is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from iiet.facts import facts_of
from orchestrator.data.model_tokens import tokens_folder_of
from orchestrator.models.folder import (
    FIRST_STAGE,
    check_checkpoint,
    load_provenance,
    newest_checkpoint,
)
from orchestrator.models.lookup import find_run_folder
from orchestrator.records.training import TrainingJob
from orchestrator.settings import SETTINGS_NAME, Settings, TrainingSettings, read_settings
from orchestrator.training.job import JOURNAL_ONLY_FIELDS, describe_difference, job_key, key_fields
from orchestrator.training.schedules import learning_rate_at, schedule_by_step, stable_steps
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import (
    DONE_NAME,
    Workspace,
    checkpoint_name,
    find_checkpoints,
    step_of,
)
from orchestrator.workspace.provenance import content_key

FIELDS_OF_LATER_STEPS = {
    "num_steps",
    "decay",
    "decay_fraction",
    "final_learning_rate_fraction",
    "iterate_from_fraction",
    "iterate_ramp_fraction",
}
"""Fields of a recipe that may differ: `shared_steps` says where their effect begins."""


def metrics_until(checkpoint: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the steps and metrics in the journal beside a checkpoint, until the checkpoint."""
    return [
        (record["step"], record["values"])
        for record in read_journal(checkpoint.parent)[0]
        if record["kind"] == "metrics" and record["step"] <= step_of(checkpoint)
    ]


# First stages


@dataclass(frozen=True)
class FirstStage:
    """The steps of a model before its corrections are switched on."""

    key: str
    """Hash of all that determines them."""
    num_steps: int
    runs: Path
    """Folder of the runs that may have made them."""
    own: Path = field(compare=False)
    """Folder of the run whose stage it is."""

    def checkpoints(self) -> Iterator[Path]:
        """Yield the checkpoints after the last step, of any run; they may be damaged."""
        for folder in sorted(self.runs.glob(f"*/{checkpoint_name(self.num_steps)}")):
            with suppress(UserError):  # Its provenance is damaged.
                if load_provenance(folder).get(FIRST_STAGE) == self.key:
                    yield folder

    @property
    def exists(self) -> bool:
        """Whether there is a checkpoint; it may be damaged."""
        return any(self.checkpoints())

    def find(self, warn: Callable[[str], None] = lambda _: None) -> Path | None:
        """Return an intact checkpoint of another run; None without one. Damaged ones are told."""
        for folder in self.checkpoints():
            if folder.parent != self.own:
                try:
                    check_checkpoint(folder, with_training_state=True)
                    return folder
                except UserError as error:
                    warn(f"{error}; the first stage is taken from another run, or trained again")
        return None


def first_stage_of(job: TrainingJob) -> FirstStage | None:
    """Return the first stage that a job may share with others; None if there is none."""
    config, recipe = job.model, job.recipe
    num_steps = round(recipe.num_steps * recipe.iterate_from_fraction)
    may_share = job.first_stages and job.objective == "pretrain" and not job.initial_folder
    has_stages = 0 < num_steps < recipe.num_steps and facts_of(config.method).has_corrections
    if not (may_share and has_stages):
        return None
    no_stages = {"iterate_from_fraction": 0.0, "iterate_ramp_fraction": 0.0, "elastic": None}
    plain = job.model_copy(
        update={
            "model": replace(config, schedule=config.corrections.none(config.num_layers)),
            "recipe": recipe.model_copy(update=no_stages),
        }
    )
    journal_fields = {name: getattr(recipe, name) for name in JOURNAL_ONLY_FIELDS}
    key = content_key("first stage", job_key(plain), num_steps, journal_fields)
    return FirstStage(key, num_steps, Path(str(job.first_stages)), job.folder)


def share_first_stages(jobs: Sequence[TrainingJob]) -> list[TrainingJob]:
    """Return the jobs; those whose first stage is neither trained nor shared look for none."""
    stages = [first_stage_of(job) for job in jobs]
    users: dict[str, set[str]] = {}
    for job, stage in zip(jobs, stages, strict=True):
        if stage:
            users.setdefault(stage.key, set()).add(job.run_folder)
    return [
        job
        if stage and (stage.exists or len(users[stage.key]) > 1)
        else job.model_copy(update={"first_stages": None})
        for job, stage in zip(jobs, stages, strict=True)
    ]


# Longer trainings


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
    job = TrainingJob.of_folder(folder)
    if job is None or not (folder / SETTINGS_NAME).is_file():
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
        UserError: If the two differ from the start, or no checkpoint before their first different
            step is left; says what would have to be different.
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
    if difference := describe_difference(_other_fields(earlier), _other_fields(longer)):
        raise UserError(
            f"{earlier.folder} cannot be continued with other settings ({difference}); train a new "
            "run with them"
        )
    common, damage = shared_steps(earlier, longer), list[str]()
    start = newest_checkpoint(
        earlier.folder, damage.append, up_to_step=common, with_training_state=True
    )
    if start is None:
        steps = ", ".join(f"{step_of(folder):,}" for folder in find_checkpoints(earlier.folder))
        problem = f"; {damage[0]}" if damage else ""
        raise UserError(
            f"{earlier.folder} cannot be continued: a training of {recipe.num_steps:,} steps "
            f"differs from it after step {common:,}, and it has no intact checkpoint until there "
            f"(only of the steps {steps}{problem}); train a new run"
        )
    stable = stable_steps(recipe)
    rule = f"is stable until step {stable:,} and decays until the last" if stable else "is constant"
    note(
        f"{longer.folder.name} continues {earlier.folder.name} from step {step_of(start):,} of "
        f"{recipe.num_steps:,}; the learning rate {rule}"
    )
    return longer.model_copy(update={"continued_from": str(start)})


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
