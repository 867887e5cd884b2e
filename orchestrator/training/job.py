"""A training before it runs: the job of some settings, its key, its checks, its outcome, and the
steps that it takes over from another training, bitwise as if it had made them itself.

The key is the hash of everything that determines the result. Equal weights are not trained twice,
whatever they are for: a run of `pretrain --name`, a model of a sweep and a student may be the same
training.

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
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from iiet.config import DistillationConfig, ModelConfig
from iiet.facts import facts_of
from orchestrator.data.mixture import open_data
from orchestrator.data.order import check_even_split
from orchestrator.data.preparation import check_sequence_length, expected_tokens, tokens_folder_of
from orchestrator.data.store import verify_data
from orchestrator.models.folder import (
    FIRST_STAGE,
    check_checkpoint,
    load_provenance,
    newest_checkpoint,
    weights_key,
)
from orchestrator.models.lookup import find_pretraining
from orchestrator.records.training import StoredJob, TrainingJob, TrainingOutcome
from orchestrator.settings import SETTINGS_NAME, Settings, TrainingSettings, read_settings
from orchestrator.training.remote_copy import RemoteCopy
from orchestrator.training.schedules import (
    DRAWS_VERSION,
    checked_family,
    learning_rate_at,
    schedule_by_step,
    stable_steps,
)
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json
from orchestrator.workspace.journal import read_journal
from orchestrator.workspace.layout import (
    DONE_NAME,
    JOB_NAME,
    Workspace,
    checkpoint_name,
    find_checkpoints,
    step_of,
)
from orchestrator.workspace.provenance import RECIPE_VERSION, content_key

KEY_CHARACTERS = 8
"""Characters of the key in the name of a run."""

JOURNAL_ONLY_FIELDS = (
    "num_sequences_per_pass",
    "activation_checkpointing",
    "compile",
    "skip_bad_steps",
    "validate_every_steps",
    "num_validation_tokens",
)
"""Fields of a recipe that change the journal or the rounding of a run, but not its result.
`skip_bad_steps` decides only whether a run gets to its end."""

NON_KEY_FIELDS = {
    *JOURNAL_ONLY_FIELDS,
    "checkpoint_every_steps",
    "checkpoint_every_minutes",
    "num_checkpoints_kept",
    "profile_steps",
}
"""Fields of a recipe that are not part of the key."""

FIELDS_OF_LATER_STEPS = {
    "num_steps",
    "decay",
    "decay_fraction",
    "final_learning_rate_fraction",
    "iterate_from_fraction",
    "iterate_ramp_fraction",
}
"""Fields of a recipe that may differ: `shared_steps` says where their effect begins."""


def pretraining_job(
    settings: Settings, workspace: Workspace, tokens: Path | None, name: str | None = None
) -> TrainingJob:
    """Return the job that pretrains the model of these settings; its sizes are checked.

    Args:
        tokens: Folder of prepared tokens. Without it the job has the expected vocabulary and can be
            planned, but not run.
        name: Name of the run's folder; when unset, that of a finished run of this model, or else
            made from method, schedule and content.

    Raises:
        UserError: If the settings do not go together.
    """
    expected = expected_tokens(settings.data, tokens)
    config = settings.model.build(
        vocab_size=expected.vocab_size, context_length=expected.context_length
    )
    recipe = checked_family(settings.training, config)
    sequences_per_step(recipe, config)
    check_sequence_length(settings.data, recipe.tokens_per_sequence(config))
    if facts_of(config.method).full_level is not None:  # Its levels are no stages of a training.
        stages = {"iterate_from_fraction": 0.0, "iterate_ramp_fraction": 0.0}
        recipe = recipe.model_copy(update=stages)
    job = TrainingJob(
        run_folder="",
        tokens_folder=str(tokens or ""),
        model=config,
        recipe=recipe,
        first_stages=str(workspace.runs),
        storage=settings.cluster.storage,
    )
    folder = workspace.runs / (name or "")
    if name is None:
        key = job_key(job)
        counts = sorted(set(config.corrections))
        schedule = f"-r{counts[0]}" if len(counts) == 1 else "-ragged"
        middle = schedule if facts_of(config.method).has_corrections else ""
        usual = workspace.runs / f"{config.method}{middle}-{key[:KEY_CHARACTERS]}"
        folder = folder_of_weights(workspace, key, usual)
    return job.model_copy(update={"run_folder": str(folder)})


def sequences_per_step(
    recipe: TrainingSettings, config: ModelConfig, *, section: str = "training"
) -> int:
    """Return the number of sequences in the global batch.

    Raises:
        UserError: If a sequence is longer than the model's context, or the tokens per step are no
            multiple of a sequence.
    """
    length = recipe.tokens_per_sequence(config)
    if length > config.context_length:
        raise UserError(
            f"{section}.sequence_length={length}: the model's context has {config.context_length} "
            "tokens; set it to at most that, or leave it out"
        )
    sequences, rest = divmod(recipe.num_tokens_per_step, length)
    if rest or not sequences:
        what = f"{section}.sequence_length" if recipe.sequence_length else "the context length"
        raise UserError(
            f"{section}.num_tokens_per_step must be a multiple of {what} {length}, such as "
            f"{max(1, sequences) * length}; got {recipe.num_tokens_per_step}"
        )
    return sequences


# The key


def job_key(job: TrainingJob) -> str:
    """Return the hash of everything that determines a job's result.

    Raises:
        UserError: If the tokens, the teacher or the initial weights are missing or damaged.
    """
    return content_key(key_fields(job))


def key_fields(job: TrainingJob) -> dict[str, Any]:
    """Return everything that determines a job's result, as JSON-able values."""
    distills = job.objective == "distill"
    teacher = job.teacher_folder if distills else None
    recipe = job.recipe.model_dump(mode="json", exclude=NON_KEY_FIELDS)
    # What is off is absent, so that keys of such jobs are those of earlier versions.
    more: dict[str, Any] = {}
    if job.recipe.elastic is None:
        del recipe["elastic"]
    else:
        recipe["elastic"]["draws"] = DRAWS_VERSION
    if not facts_of(job.model.method).has_gates(job.model.options):
        del recipe["gate_rate_factor"]
    if job.sequence_length == job.model.context_length:
        del recipe["sequence_length"]
    if job.kept_layers is not None:
        more["kept_layers"] = list(job.kept_layers)
    if (version := facts_of(job.model.method).version) > 1:
        more["method_version"] = version
    return {
        **more,
        "model": job.model.to_dict(),
        "recipe": recipe,
        # A dry run plans jobs whose tokens are not prepared; no stored job has their key.
        "tokens": open_data(job.tokens_folder).fingerprint if job.tokens_folder else "",
        "teacher": weights_key(Path(teacher)) if teacher else None,
        "initial": weights_key(Path(job.initial_folder)) if job.initial_folder else None,
        "distillation": asdict(job.distillation or DistillationConfig()) if distills else None,
    }


def folder_of_weights(workspace: Workspace, key: str, usual: Path) -> Path:
    """Return the folder in which the training of a key is finished, else its usual folder."""
    if (usual / JOB_NAME).exists():
        return usual
    # Folders of trials are named by their keys, so only the names of runs tell nothing.
    runs = sorted(workspace.runs.glob(f"*/{DONE_NAME}"))
    for done in (*runs, workspace.trials / key / DONE_NAME):
        record = done.with_name(JOB_NAME)
        are_files = done.is_file() and record.is_file()
        if are_files and _key_in(record, record.stat().st_mtime_ns) == key:
            return done.parent
    return usual


@lru_cache(maxsize=4096)
def _key_in(record: Path, _modified: int) -> str | None:
    try:
        return (read_json(record) or {}).get("key")
    except UserError:
        return None  # Who uses that run is told of the damage.


# Checks, within a moment, and what a folder holds


def check_job(job: TrainingJob, *, num_workers: int = 1) -> None:
    """Check that a job can run, and that its folder holds no other job.

    Raises:
        UserError: If tokens or checkpoints are missing, sizes do not fit together, or the batch
            cannot be divided among the workers.
    """
    config = job.model
    verify_data(Path(job.tokens_folder), remember=True)
    data = open_data(job.tokens_folder)
    if data.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokens need a vocab_size of {data.vocab_size}, the model's is {config.vocab_size}"
        )
    global_batch = sequences_per_step(job.recipe, config, section=job.section)
    data.check_length(job.sequence_length)
    check_even_split(global_batch, num_workers, section=job.section)
    for origin in filter(None, (job.teacher_folder, job.initial_folder)):
        check_checkpoint(Path(origin), remember=True)
    essence = check_folder(job)
    if job.storage:
        RemoteCopy(job.storage, job.folder, content_key(essence))


def write_job_file(job: TrainingJob) -> None:
    """Write `job.json`, so that a job with other settings cannot resume in this folder.

    Raises:
        UserError: If the folder holds another job.
    """
    essence = check_folder(job)
    path = job.folder / JOB_NAME
    if not path.exists():
        StoredJob(
            recipe_version=RECIPE_VERSION, key=content_key(essence), essence=essence, job=job
        ).write(path)


def check_folder(job: TrainingJob) -> dict[str, Any]:
    """Return the fields of a job's key, if its folder holds no other job.

    Raises:
        UserError: If it does; says what differs.
    """
    earlier = StoredJob.read(job.folder / JOB_NAME)
    saved = find_checkpoints(job.folder)
    if earlier is None and saved and "imported" in load_provenance(saved[-1]):
        raise UserError(f"{job.folder} holds an imported model; choose another name")
    if earlier and earlier.recipe_version != RECIPE_VERSION:
        raise UserError(
            f"{job.folder} holds a run of another version of this program, which this version "
            "cannot resume; choose another name or another workspace"
        )
    essence = key_fields(job)
    if earlier and earlier.key != content_key(essence):
        raise UserError(
            f"{job.folder} holds a run with other settings "
            f"({describe_difference(earlier.essence, essence)}); "
            "choose another name, or delete the folder"
        )
    return essence


def describe_difference(earlier: Any, now: Any, prefix: str = "") -> str:
    """Say which fields of two nested mappings differ; empty if none."""
    if isinstance(earlier, dict) and isinstance(now, dict):
        names = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
        parts = [
            describe_difference(earlier.get(name), now.get(name), f"{prefix}{name}.")
            for name in names
        ]
        return ", ".join(parts)
    return f"{prefix.removesuffix('.')} was {earlier!r}, is {now!r}"


def stored_job(folder: Path) -> TrainingJob | None:
    """Return the job of a run's folder; None if its file is missing, damaged or too old."""
    try:
        return TrainingJob.of_folder(folder)
    except UserError:
        return None


def finished_outcome(
    job: TrainingJob, warn: Callable[[str], None] | None = None
) -> TrainingOutcome | None:
    """Return the outcome of a finished job with an intact last checkpoint, else None.

    `warn` is called with a sentence if the last checkpoint of a finished job is damaged.
    """
    outcome = TrainingOutcome.read(job.folder / DONE_NAME) if job.tokens_folder else None
    if not outcome:
        return None
    folder = job.folder / checkpoint_name(outcome.step)  # The workspace may have been moved.
    try:
        check_checkpoint(folder)
    except UserError as error:
        if warn:
            warn(f"{error}; the end of this training is lost and is trained again")
        return None
    return outcome.model_copy(update={"checkpoint": str(folder)})


# Steps taken over from other trainings: first stages


def metrics_until(checkpoint: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the steps and metrics in the journal beside a checkpoint, until the checkpoint."""
    return [
        (record["step"], record["values"])
        for record in read_journal(checkpoint.parent)[0]
        if record["kind"] == "metrics" and record["step"] <= step_of(checkpoint)
    ]


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
    folder = find_pretraining(workspace, run)
    job = TrainingJob.of_folder(folder)
    assert job, "its file exists"
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
