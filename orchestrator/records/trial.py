"""A trial: one value from the plan of a sweep to tables, fronts, reports and MLflow.

The full model (`teacher`) and models of other kinds (`baseline`) have the same form, so that a
front can hold all three. Its numbers are tracked by their names: `cost.evaluations` is the metric
`cost/evaluations`. A number that was not measured is None, and no metric.

Usual names of qualities: accuracy, accuracy_stderr, bits_per_byte, bits_per_byte_stderr,
validation_loss, perplexity (per token: exp of that loss), and `TASK/METRIC` for each task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from iiet.methods import METHODS
from orchestrator.records.evaluation import EvaluationKeys
from orchestrator.records.parameters import job_parameters, model_parameters
from orchestrator.records.record import Config, Record, WorkspacePath
from orchestrator.records.training import TrainingJob
from orchestrator.settings.evaluation import Prompts
from orchestrator.workspace.provenance import content_key

Role = Literal["trial", "teacher", "baseline"]
T = TypeVar("T")
NUMBER_GROUPS = ("cost", "quality", "train", "decoding")
"""First parts of the tracked names."""
MAX_EXPONENT = 700.0
"""Above it, `exp` overflows a float."""


def finite_or_none(number: float | None) -> float | None:
    """Return the number, or None if strict JSON cannot hold it."""
    return number if number is not None and math.isfinite(number) else None


def _finite_only(values: dict[str, int | float]) -> dict[str, int | float]:
    return {name: number for name, number in values.items() if math.isfinite(number)}


Threshold = Annotated[float | None, AfterValidator(finite_or_none)]
"""A bound of a range of thresholds. Strict JSON has no infinity, so no bound is None."""
Numbers = Annotated[dict[str, int | float], PlainSerializer(_finite_only)]
"""Numbers by name, without NaN and infinity in JSON."""


class _NumbersByName(Record):
    """Optional numbers; JSON holds those that are known and finite."""

    def numbers(self) -> dict[str, int | float]:
        """Return the known and finite numbers by name."""
        known = {k: v for k, v in vars(self).items() if v is not None}
        return _finite_only(known)

    @model_serializer
    def _known(self) -> dict[str, int | float]:
        return self.numbers()


class TrialCost(_NumbersByName):
    """Inference cost of a model, lower is better: counted from shapes, and measured times."""

    evaluations: int | float | None = None
    """Field evaluations per token (NFE)."""
    relative_evaluations: float | None = None
    """Share of the full model's evaluations."""
    flops_per_token: float | None = None
    """FLOPs to decode a token at full context."""
    relative_flops: float | None = None
    """Share of the full model's FLOPs."""
    prefill_flops_per_token: float | None = None
    """FLOPs per token to read a full context."""
    kv_bytes_per_token: int | float | None = None
    weight_bytes_per_token: int | float | None = None
    num_parameters: int | float | None = None
    decode_ms_per_token: float | None = None
    decode_ms_spread: float | None = None


class TrialDecoding(_NumbersByName):
    """How a model drafts for the full one."""

    acceptance: float | None = None
    """Share of its drafted tokens that the full model keeps, on the full model's own
    continuations."""
    exact_ms_per_token: float | None = None
    """Time of a token of the full model's output, with this draft."""
    speed_up: float | None = None
    """Plain decoding's time over that."""


class TrialTraining(_NumbersByName):
    """What the training of a model took."""

    steps: int | float | None = None
    tokens: int | float | None = None
    flops: float | None = None
    seconds: float | None = None
    shared_flops: float | None = None
    """Part of the FLOPs that another run spent on a shared first stage."""
    seeds: int | float | None = None
    """Number of seeds that this is the mean of."""


class TrialSuite(Record):
    """What a trial is measured on. Its folders differ between machines and are not in its key."""

    tokens_folder: WorkspacePath
    """Prepared tokens, for the validation loss and the held-out tasks."""
    tokens: str = ""
    """Fingerprint of these tokens."""
    tasks: tuple[str, ...] = ()
    """Names of tasks; if empty, all tasks of `suite_folder`."""
    suite: str = ""
    """Key of the held-out tasks; empty if none are measured."""
    suite_folder: WorkspacePath = ""
    """Folder of the held-out tasks."""
    include_folder: WorkspacePath = ""
    """The user's folder of task files."""
    batch_size: int = 32
    """Sequences in one forward pass."""
    limit: int | None = None
    """Score only this many items of each task."""
    num_fewshot: int | None = None
    """Solved examples before each item; the task's own number when unset."""
    prompts: Prompts | None = None
    """How items become prompts, if not as the tasks' files say."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Weights and arithmetic of the measured model."""
    fingerprints: dict[str, str] | None = None
    """Task -> hash of its items and metrics, without held-out tasks."""
    vocabulary: str | None = None
    """Hash of the tokenizer files of an imported teacher."""
    vocabulary_folder: WorkspacePath | None = None
    """Folder of these files."""

    @model_serializer(mode="wrap")
    def _without_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The other fields are part of the key even if they are None.
        absent = ("prompts", "fingerprints", "vocabulary", "vocabulary_folder")
        return {k: v for k, v in dump(self).items() if v is not None or k not in absent}

    @property
    def key(self) -> str:
        """Hash of what is measured."""
        values = self.model_dump(mode="json")
        return content_key({k: v for k, v in values.items() if not k.endswith("_folder")})


class Trial(Record):
    """One model of a sweep: what is trained and measured, and what was measured."""

    key: str
    """Hash of all that determines the result; the same trial in another sweep has the same key."""
    role: Role
    """`trial`, `teacher` (the full model) or `baseline` (a model of another kind, beside the
    front)."""
    label: str = ""
    """Name in tables and figures."""
    model: Config
    """The model, with the schedule that is measured."""
    folder: WorkspacePath
    """Folder of its training and its result."""
    job: TrainingJob | None = None
    """Its training; None when a checkpoint is measured without training."""
    checkpoint: WorkspacePath | None = None
    """Folder of the weights; None before they are trained."""
    suite: TrialSuite
    """What is measured."""
    threshold_above: Threshold = None
    """Thresholds above this, up to `threshold_up_to`, give this schedule; both are None if no
    threshold does."""
    threshold_up_to: Threshold = None
    """Largest threshold that gives this schedule."""
    parent: str | None = None
    """Weights key of the teacher."""
    is_elastic: bool = False
    """Whether its weights serve other schedules of the sweep, too."""
    seed: int | None = None
    """Seed of its training, if the sweep has several."""
    group: str | None = None
    """Label without the seed; trials of one group are seeds of one model."""
    cost: TrialCost = TrialCost()
    """Inference cost; like all numbers unknown until it is measured."""
    quality: Numbers = Field(default_factory=dict)
    """Accuracy and losses, with standard errors as `NAME_stderr`."""
    evaluation: EvaluationKeys | None = None
    """Where the results of the tasks are stored, with a value for each item."""
    train: TrialTraining = TrialTraining()
    """What its training took."""
    decoding: TrialDecoding = TrialDecoding()
    """How it drafts and decodes, if that was measured."""
    run_id: str | None = None
    """MLflow run of the trial."""

    @property
    def method(self) -> str:
        """Registry key of the method: iiet, vanilla, pcformer."""
        return self.model.method

    @property
    def is_distilled_baseline(self) -> bool:
        """Whether it is no schedule of its teacher, but learned from it."""
        return self.role == "baseline" and self.parent is not None

    @property
    def schedule(self) -> tuple[int, ...] | None:
        """Corrections per layer; None if the method has none."""
        return tuple(self.model.corrections) if METHODS[self.method].has_corrections else None

    @property
    def result_path(self) -> Path:
        """File of the measured trial; it exists when the trial is finished."""
        return Path(self.folder) / f"result-{self.key}.json"

    def result(self) -> Trial | None:
        """Return the trial with what was measured; None while it is not finished.

        All else is this sweep's: another sweep may have measured the same trial under other names.
        """
        found = Trial.read(self.result_path)
        if not found:
            return None
        measured = ("quality", "evaluation", "train", "checkpoint")
        return self.model_copy(update={name: getattr(found, name) for name in measured})

    def value(self, name: str) -> float | None:
        """Return a number by its tracked name (`cost/evaluations`); None if it was not measured."""
        group, _, key = name.partition("/")
        number = self._numbers(group).get(key) if group in NUMBER_GROUPS else None
        return None if number is None or number != number else float(number)

    @property
    def schedule_text(self) -> str:
        """The iteration schedule as `2,2,1,1`; empty if there is none."""
        return ",".join(str(r) for r in self.schedule or ())

    @property
    def name(self) -> str:
        """The label, else method and schedule."""
        return self.label or " ".join(part for part in (self.method, self.schedule_text) if part)

    @property
    def threshold_text(self) -> str:
        """Thresholds that give this schedule: `0.003 to 0.004`, `<=0.0003` or `>0.03`."""
        return threshold_range_text(self.threshold_above, self.threshold_up_to)

    def metrics(self) -> dict[str, float]:
        """Return every number by its tracked name, such as `cost/evaluations`."""
        return {
            f"{group}/{name}": float(number)
            for group in NUMBER_GROUPS
            for name, number in self._numbers(group).items()
            if number is not None
        }

    def params(self, job: TrainingJob | None = None) -> dict[str, str]:
        """Return the tracked parameters, those of its training included.

        Args:
            job: The training of its weights, if another run trained them.
        """
        trained = self.job or job
        params = {"role": self.role, **(job_parameters(trained) if trained else {})}
        # Elastic weights are trained under another schedule than they are measured under.
        params |= model_parameters(self.model)
        if self.threshold_text:
            up_to = self.threshold_up_to
            params["threshold"] = "inf" if up_to is None else f"{up_to:.6g}"
            params["threshold_range"] = self.threshold_text
        if self.checkpoint:
            params["checkpoint"] = self.checkpoint
            if self.parent and not trained:
                params["teacher"] = self.checkpoint  # It was pruned, and not trained.
        return params | ({"group": self.group} if self.group else {})

    def _numbers(self, group: str) -> Mapping[str, float | None]:
        if group == "cost":
            return self.cost.numbers()
        if group == "train":
            return self.train.numbers()
        if group == "decoding":
            return self.decoding.numbers()
        loss = finite_or_none(self.quality.get("validation_loss"))
        if loss is not None and loss < MAX_EXPONENT:
            return {"perplexity": math.exp(loss), **self.quality}
        return self.quality


def teacher_or_costliest(
    models: Sequence[T], *, role: Callable[[T], str], cost: Callable[[T], float]
) -> T | None:
    """Return the model that others are compared with; None if there are no models.

    This is the teacher, else the costliest trial, else the costliest model.
    """
    for wanted in ({"teacher"}, {"teacher", "trial"}, set(get_args(Role))):
        if found := [model for model in models if role(model) in wanted]:
            return max(found, key=cost)
    return None


def threshold_range_text(above: float | None, up_to: float | None) -> str:
    """Format the thresholds from above one up to another; None is no bound."""
    if above is None:
        return "" if up_to is None else f"<={up_to:.2g}"
    return f">{above:.2g}" if up_to is None else f"{above:.2g} to {up_to:.2g}"
