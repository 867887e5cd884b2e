"""Trials with their keys, and the plan of a sweep that holds them.

A trial's key is the hash of all that determines its result, and its folder is named by the hash of
all that determines its weights. So a second sweep, another range of thresholds or a restart finds
finished trials, and other tasks are measured with the same weights without training again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from iiet.config import ModelConfig
from iiet.cost import inference_cost
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import (
    Role,
    Threshold,
    TrialResult,
    teacher_or_costliest,
    threshold_range_text,
)
from orchestrator.training.checkpoint import weights_key
from orchestrator.workspace.files import damage_as_user_error, read_json_object
from orchestrator.workspace.folders import Workspace
from orchestrator.workspace.provenance import content_key

SweepKind = Literal["threshold", "iterations", "search"]


class TrialSuite(BaseModel):
    """What a trial is measured on. Its folders differ between machines and are not in its key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokens_folder: str
    """Prepared tokens, for the validation loss and the held-out tasks."""
    tokens: str = ""
    """Fingerprint of these tokens."""
    tasks: tuple[str, ...] = ()
    """Names of tasks; if empty, all tasks of `suite_folder`."""
    suite: str = ""
    """Key of the held-out tasks; empty if none are measured."""
    suite_folder: str = ""
    """Folder of the held-out tasks."""
    include_folder: str = ""
    """The user's folder of task files."""
    batch_size: int = 32
    """Sequences in one forward pass."""
    limit: int | None = None
    """Score only this many items of each task."""
    num_fewshot: int | None = None
    """Solved examples before each item; the task's own number when unset."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Weights and arithmetic of the measured model."""
    fingerprints: dict[str, str] | None = None
    """Task -> hash of its items and metrics, without held-out tasks."""
    vocabulary: str | None = None
    """Hash of the tokenizer files of an imported teacher."""
    vocabulary_folder: str | None = None
    """Folder of these files."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The other fields are part of the key even if they are None.
        absent = ("fingerprints", "vocabulary", "vocabulary_folder")
        return {k: v for k, v in dump(self).items() if v is not None or k not in absent}

    @property
    def key(self) -> str:
        """Hash of what is measured."""
        values = self.model_dump(mode="json")
        return content_key({k: v for k, v in values.items() if not k.endswith("_folder")})


class PlannedTrial(BaseModel):
    """One trial, which any process that sees the workspace can run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Hash of all that determines the result; the same trial in another sweep has the same key."""
    role: Role
    label: str
    """Name in tables and figures."""
    model: dict[str, Any]
    """`ModelConfig.to_dict()` with the schedule that is measured."""
    folder: str
    """Folder of its training and its result."""
    job: TrainingJob | None = None
    """Its training; None when a checkpoint is measured without training."""
    checkpoint: str | None = None
    """Checkpoint to measure when nothing is trained."""
    suite: TrialSuite
    """What is measured."""
    threshold_above: Threshold = None
    """Thresholds above this, up to `threshold_up_to`, give this schedule; both are None if no
    threshold does."""
    threshold_up_to: Threshold = None
    """Largest threshold that gives this schedule."""
    parent: str | None = None
    """Weights key of the teacher."""
    seed: int | None = None
    """Seed of its training, if the sweep has several."""
    group: str | None = None
    """Label without the seed; trials of one group are seeds of one model."""

    def config(self) -> ModelConfig:
        """Return the model's configuration."""
        return ModelConfig.from_dict(self.model)

    @property
    def result_path(self) -> Path:
        """File of the result; it exists when the trial is finished."""
        return Path(self.folder) / f"result-{self.key}.json"

    def result(self) -> TrialResult | None:
        """Return the finished result; None while there is none.

        The label and the thresholds are this sweep's: another sweep may have measured the same
        trial under other names.
        """
        found = read_json_object(self.result_path)
        if not found:
            return None
        with damage_as_user_error(self.result_path):
            result = TrialResult.from_stored(found)
        return result.model_copy(
            update={
                "role": self.role,
                "label": self.label,
                "threshold_above": self.threshold_above,
                "threshold_up_to": self.threshold_up_to,
                "seed": self.seed,
                "group": self.group,
                "parent": self.parent,
                "recipe": _recipe(self.job) if self.job else {},
            }
        )

    @property
    def threshold_text(self) -> str:
        """The thresholds that give this schedule; see `threshold_range_text`."""
        return threshold_range_text(self.threshold_above, self.threshold_up_to)


def _recipe(job: TrainingJob) -> dict[str, str]:
    """Return the settings of a job's training, those of the distillation loss included."""
    settings = {**job.recipe.model_dump(mode="json"), "objective": job.objective}
    loss = asdict(job.distillation) if job.distillation else {}
    settings |= {f"distillation.{name}": value for name, value in loss.items()}
    return {name: str(value) for name, value in settings.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """All trials of a sweep."""

    key: str
    """Hash of the trials' keys: the same sweep has the same key."""
    name: str
    """Name of its folder and of its run in MLflow."""
    kind: str
    """`threshold`, `iterations` or `search`."""
    tokens_folder: str
    """Folder of prepared tokens."""
    teacher: str | None
    """Checkpoint of the teacher; None for `iterations`."""
    num_requested: int
    """Thresholds, budgets, schedules or models asked for, before those that coincide were merged;
    seeds do not count."""
    trials: tuple[PlannedTrial, ...]
    """Trials, teacher and baselines, each once."""
    num_distinct: int = 0
    """Different schedules or models among them; those that a search adds do not count."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Run and reason of models that cannot be baselines; not part of the key."""

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping that strict JSON can hold."""
        return vars(self) | {"trials": [trial.model_dump(mode="json") for trial in self.trials]}


def exact_cost(config: ModelConfig, full: ModelConfig) -> dict[str, float]:
    """Return the cost of a model in all units that follow from shapes, and relative to `full`."""
    cost, most = inference_cost(config), inference_cost(full)
    return {
        "evaluations": cost.evaluations_per_token,
        "relative_evaluations": cost.evaluations_per_token / most.evaluations_per_token,
        "flops_per_token": cost.decode_flops_per_token,
        "relative_flops": cost.decode_flops_per_token / most.decode_flops_per_token,
        "prefill_flops_per_token": cost.prefill_flops_per_token,
        "kv_bytes_per_token": cost.kv_bytes_per_token,
        "weight_bytes_per_token": cost.weight_bytes_per_token,
        "num_parameters": cost.num_parameters,
    }


def full_trial(plan: SweepPlan) -> PlannedTrial:
    """Return the trial that the others are compared with; see `teacher_or_costliest`."""
    found = teacher_or_costliest(
        plan.trials,
        role=lambda trial: trial.role,
        cost=lambda trial: inference_cost(trial.config()).evaluations_per_token,
    )
    assert found is not None, "a plan has trials"
    return found


def full_config(plan: SweepPlan) -> ModelConfig:
    """Return the model that relative costs are relative to."""
    return full_trial(plan).config()


def checkpoint_trial(
    role: Role,
    label: str,
    checkpoint: Path,
    config: ModelConfig,
    suite: TrialSuite,
    workspace: Workspace,
) -> PlannedTrial:
    """Return the trial that measures a checkpoint without training it."""
    weights = content_key("as it is", weights_key(checkpoint), config.to_dict())
    return PlannedTrial(
        key=content_key("trial", weights, suite.key),
        role=role,
        label=label,
        model=config.to_dict(),
        folder=str(workspace.trials / weights),
        checkpoint=str(checkpoint),
        suite=suite,
    )


def make_plan(
    kind: str,
    name: str | None,
    trials: Sequence[PlannedTrial],
    suite: TrialSuite,
    num_requested: int,
    *,
    teacher: Path | None,
) -> SweepPlan:
    """Return the plan of these trials, named by their keys where the user gave no name."""
    # Two measures of influence may lead to the same schedules by other thresholds.
    shown = [[t.key, t.threshold_above, t.threshold_up_to] for t in trials]
    key = content_key("sweep", kind, shown)
    return SweepPlan(
        key=key,
        name=name or f"{kind}-{key[:8]}",
        kind=kind,
        tokens_folder=suite.tokens_folder,
        teacher=str(teacher) if teacher else None,
        num_requested=num_requested,
        trials=tuple(trials),
        num_distinct=num_models(trials),
    )


def num_models(trials: Sequence[PlannedTrial]) -> int:
    """Return the number of models that a sweep makes itself; seeds of one model count once."""
    own = [trial for trial in trials if trial.role == "trial" or trial.job]
    return len({trial.group or trial.key for trial in own})
