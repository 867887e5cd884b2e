"""A training: everything that determines it, how it ended, and its parameters in MLflow.

The same job runs in this process (`training/trainer.py`), in a Ray Train worker or in a Ray Tune
trial.

A parameter has the same name in every run. A method without corrections has no schedule, a recipe
without a teacher no divergence, and settings that are off are left out. Settings that do not change
results (how often to save, how to share memory) are not parameters: they are in the run's
`settings.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, Field

from iiet.model.config import ATTENTION_OPTIONS, PRESETS, DistillationConfig, ModelConfig
from iiet.model.facts import facts_of
from orchestrator.records.record import Config, Record, WorkspacePath
from orchestrator.settings import TrainingSettings
from orchestrator.settings.effects import Effect, key_values
from orchestrator.workspace.layout import JOB_NAME

SIZES = (
    "num_layers", "dim", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size", "context_length",
    "tie_embeddings",
)  # fmt: skip


class TrainingJob(Record):
    """Everything that determines one training.

    Fields that are marked `WEIGHTS` are part of its key (`key_fields` in `training/job.py`); for a
    path, that is the hash of its content.
    """

    run_folder: Annotated[WorkspacePath, Effect.FILES]
    """Folder of journal, checkpoints and result; every worker must see it."""
    tokens_folder: Annotated[WorkspacePath, Effect.WEIGHTS]
    """Prepared tokens; empty in a dry run while there are none."""
    model: Annotated[Config, Effect.WEIGHTS]
    """The model, with the iteration schedule to train."""
    recipe: Annotated[TrainingSettings, Effect.WEIGHTS]
    """Steps, batch, learning rate, when to validate and save."""
    objective: Annotated[Literal["pretrain", "distill", "cross_entropy"], Effect.WEIGHTS] = (
        "pretrain"
    )
    """`pretrain`: cross-entropy, from random weights or a source model; `distill`: from a teacher;
    `cross_entropy`: a student trained without its teacher."""
    teacher_folder: Annotated[WorkspacePath | None, Effect.WEIGHTS] = None
    """Checkpoint of the frozen teacher; for `distill`."""
    initial_folder: Annotated[WorkspacePath | None, Effect.WEIGHTS] = None
    """Checkpoint with the initial weights; random weights when unset."""
    kept_layers: Annotated[tuple[int, ...] | None, Effect.WEIGHTS] = None
    """Layers of the initial weights that the model has, the first being 0; all when unset."""
    continued_from: Annotated[WorkspacePath | None, Effect.FILES] = None
    """Checkpoint of a shorter run whose steps are also this run's first steps; it starts there."""
    distillation: Annotated[DistillationConfig | None, Effect.WEIGHTS] = None
    """The distillation loss; defaults when unset."""
    storage: Annotated[str | None, Effect.FILES] = None
    """URI to which checkpoints are uploaded."""
    section: Annotated[str, Effect.FILES] = "training"
    """Settings section of the recipe, named in errors."""
    provenance: Annotated[dict[str, Any], Effect.FILES] = Field(default_factory=dict)
    """Entries of the `provenance.json` of every checkpoint, as JSON values."""

    @classmethod
    def of_folder(cls, folder: Path) -> TrainingJob | None:
        """Return the job of a run's folder; None if the folder has no such file.

        Raises:
            DamagedFile: If the file is damaged.
        """
        stored = StoredJob.read(folder / JOB_NAME)
        return stored.job if stored else None

    @property
    def schedule(self) -> tuple[int, ...] | None:
        """Corrections per layer; None if the method has none."""
        has_corrections = facts_of(self.model.method).has_corrections
        return tuple(self.model.corrections) if has_corrections else None

    @property
    def schedule_text(self) -> str | None:
        """Corrections per layer as text; None if the method has none."""
        return None if self.schedule is None else str(self.model.corrections)

    @property
    def frozen_teacher(self) -> str | None:
        """Folder of a frozen model that the training also runs: a student's teacher, or a source
        model from which the model must not move far; None without one."""
        if self.objective == "distill":
            return self.teacher_folder
        return self.initial_folder if self.recipe.source_kl_weight else None

    @property
    def teaching(self) -> DistillationConfig | None:
        """The loss by which the trained model learns from the frozen one; None without one."""
        if self.objective == "distill":
            return self.distillation or DistillationConfig()
        weight = self.recipe.source_kl_weight
        return DistillationConfig(kl_weight=weight) if weight else None

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence."""
        return self.recipe.tokens_per_sequence(self.model)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run_folder)


class StoredJob(Record):
    """What `job.json` in a run's folder holds."""

    recipe_version: int
    """Version of the program's recipe that began the run."""
    key: str
    """The job's key: the hash of `key_fields`."""
    # Runs that were begun before this name have `essence`.
    key_fields: dict[str, Any] = Field(validation_alias=AliasChoices("key_fields", "essence"))
    """Everything that determines the result."""
    job: TrainingJob


class TrainingOutcome(Record):
    """The result of a run, finished or stopped."""

    checkpoint: WorkspacePath | None
    """Folder of the newest checkpoint; None if the run was stopped before the first."""
    step: int
    """Optimizer steps done."""
    finished: bool
    """False if the run was stopped on request; the same job resumes it."""
    validation_loss: float = math.nan
    """Latest validation loss; NaN before the first."""
    train_seconds: float = 0.0
    """Time spent in steps, over all restarts."""
    num_tokens: int = 0
    """Number of training tokens."""
    training_flops: float = 0.0
    """Training FLOPs, with the forward passes of a teacher."""
    shared_flops: float = 0.0
    """Part of the training FLOPs that the continued run has spent."""


def method_parameters(model: ModelConfig) -> dict[str, str]:
    """Return a model's method, and its schedule if the method makes corrections."""
    params = {"method": model.method}
    if facts_of(model.method).has_corrections:
        params["schedule"] = str(model.corrections)
    return params


def schedule_parameters(model: ModelConfig) -> dict[str, str]:
    """Return a model's method and corrections; `r_NN` are those of a layer, for charts."""
    params = method_parameters(model)
    if "schedule" in params:
        params |= {f"r_{layer:02d}": str(r) for layer, r in enumerate(model.corrections, start=1)}
    return params


def model_parameters(model: ModelConfig) -> dict[str, str]:
    """Return the method, the corrections, the sizes, and the options that are no defaults."""
    without_defaults = model.to_dict()
    options = without_defaults.get("method_options", {})
    values = {f"option.{name}": value for name, value in options.items()}
    values |= {name: without_defaults.get(name) for name in ("head_dim", *ATTENTION_OPTIONS)}
    values |= {name: getattr(model, name) for name in SIZES}
    return schedule_parameters(model) | {n: str(v) for n, v in values.items() if v is not None}


def job_parameters(job: TrainingJob) -> dict[str, str]:
    """Return the parameters of a training: its model, and the part of the recipe that applies."""
    recipe = job.recipe
    params = key_values(recipe)
    params["objective"] = job.objective
    # Settings without effect in this training are None, and left out.
    if not facts_of(job.model.method).has_gates(job.model.options):
        params["gate_rate_factor"] = None
    if recipe.optimizer != "muon":
        params["muon_rate_factor"] = None
        params["muon_momentum"] = None
    if recipe.decay == "constant":
        params["final_learning_rate_fraction"] = None
    if recipe.decay != "wsd":
        params["decay_fraction"] = None
    if not any(job.model.corrections):
        params["iterate_from_fraction"] = None
    if not any(job.model.corrections) or not recipe.iterate_ramp_fraction:
        params["iterate_ramp_fraction"] = None
    if recipe.elastic:
        elastic = params.pop("elastic")
        elastic["schedules"] = " ".join(map(str, recipe.elastic.schedules)) or None
        params |= {f"elastic.{name}": value for name, value in elastic.items()}
    if recipe.skip_bad_steps:  # Not part of the key, but some runs need it.
        params["skip_bad_steps"] = recipe.skip_bad_steps
    if job.objective == "distill":
        loss = job.distillation or DistillationConfig()
        has_divergence = loss.kl_weight > 0
        params |= {
            "kl_weight": loss.kl_weight,
            "temperature": loss.temperature if has_divergence else None,
            "divergence": loss.divergence if has_divergence else None,
            "hidden_weight": loss.hidden_weight or None,
            "teacher_from_step": loss.start_step or None,
            "teacher_until_step": loss.end_step,
        }
    if job.kept_layers is not None:
        params["kept_layers"] = ",".join(map(str, job.kept_layers))
    if job.objective == "pretrain":
        params["source"] = job.initial_folder
    if "teacher" in job.provenance:
        params["teacher"] = job.teacher_folder or job.initial_folder
    return model_parameters(job.model) | {n: str(v) for n, v in params.items() if v is not None}


def model_family(config: ModelConfig) -> str:
    """Return method and size: `iiet-tiny` for a preset's layers, else `iiet-2x64`, layers x width.

    Vocabulary and context length, which follow the data, are not part of it.
    """
    names = ("num_layers", "dim", "ffn_dim", "num_heads")
    sizes = [getattr(config, name) for name in names]
    for preset_name, preset in PRESETS.items():
        if [preset[name] for name in names] == sizes:
            return f"{config.method}-{preset_name}"
    return f"{config.method}-{config.num_layers}x{config.dim}"


def shared_parameters(runs: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the parameters that have one value in all runs."""
    first, *other_runs = runs or [{}]
    return {
        name: value
        for name, value in first.items()
        if all(parameters.get(name) == value for parameters in other_runs)
    }
