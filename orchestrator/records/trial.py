"""A trial: the value that goes from a sweep's plan to tables, fronts, reports and MLflow.

The full model (`teacher`) and other models (`baseline`) have the same form, so that a front can
hold all of them. Trials that differ only in their learning rates may compete: ASHA stops the worse
ones early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    Field,
)

from iiet.model.facts import facts_of
from orchestrator.records.evaluation import MAX_PERPLEXITY, EvaluationKeys, Suite
from orchestrator.records.metrics import PERPLEXITY, VALIDATION_LOSS
from orchestrator.records.record import Config, Record, WorkspacePath
from orchestrator.records.training import TrainingJob, job_parameters, model_parameters
from orchestrator.settings import SweepSettings

Role = Literal["trial", "teacher", "baseline", "source", "source_continued"]
T = TypeVar("T")
BASELINE_ROLES: tuple[Role, ...] = ("baseline", "source", "source_continued")
"""Roles of models that are shown with a front but do not compete for it."""
SOURCE = "source"
"""Role and name of the teacher's source model, unchanged."""
SOURCE_CONTINUED = "source_continued"
"""Role and name of the source model, fine-tuned without corrections with the teacher's FLOPs."""


def baseline_role(label: str) -> Role:
    """Return the role of a baseline by its label."""
    role_by_label: dict[str, Role] = {SOURCE: "source", SOURCE_CONTINUED: "source_continued"}
    return role_by_label.get(label, "baseline")


def _finite_or_none(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


Threshold = Annotated[float | None, AfterValidator(_finite_or_none)]
"""A bound of a range of thresholds; None is infinity, which strict JSON lacks."""


class Trial(Record):
    """One model of a sweep: what is trained and measured, and what was measured."""

    key: str
    """Hash of everything that determines the result; equal trials of sweeps have equal keys."""
    role: Role
    """`trial`; `teacher`, the full model; or, not competing for the front, `source` (the teacher's
    source model), `source_continued` (that model, fine-tuned without corrections) or `baseline`
    (another model)."""
    label: str = ""
    """Name in tables and figures."""
    model: Config
    """The model, with the measured schedule."""
    folder: WorkspacePath
    """Folder of its training and its result."""
    job: TrainingJob | None = None
    """The training that makes the model; None when a checkpoint is measured without training."""
    checkpoint: WorkspacePath | None = None
    """Folder of the weights; None before they are trained."""
    suite: Suite
    """What is measured."""
    threshold_above: Threshold = None
    """Thresholds above this, up to `threshold_up_to`, give this schedule; both are None if no
    threshold gives it."""
    threshold_up_to: Threshold = None
    """Largest threshold that gives this schedule."""
    parent: str | None = None
    """Weights key of the teacher."""
    teacher_schedule: str | None = None
    """Its schedule relative to the teacher, if it leaves layers out: `0*14,x*2,0*14`. `model` has
    only the kept layers."""
    is_elastic: bool = False
    """Whether its weights also serve other schedules of the sweep."""
    seed: int | None = None
    """Seed of its training, if the sweep has several."""
    group: str | None = None
    """Label without the seed; trials of one group are seeds of one model."""
    numbers: dict[str, int | float] = Field(default_factory=dict)
    """Tracked name -> measured number; unknown and infinite numbers are left out.

    `cost/`: inference, lower is better. `evaluations` (NFE) and other counts per token,
    `relative_evaluations` and `relative_flops` as shares of the full model's,
    `decode_ms_per_token`. `quality/`: `accuracy`,
    `bits_per_byte`, `validation_loss` and `TASK/METRIC`, with standard errors as
    `NAME_stderr`. `train/`: `steps`, `tokens`, `flops`, `seconds`; `seeds` are averaged."""
    evaluation: EvaluationKeys | None = None
    """Where the results of the tasks are stored, with a value for each item."""
    run_id: str | None = None
    """MLflow run of the trial."""

    @property
    def method(self) -> str:
        """Registry key of the method (iiet, vanilla, pcformer)."""
        return self.model.method

    @property
    def schedule(self) -> tuple[int, ...] | None:
        """Corrections per layer; None if the method has none."""
        has_corrections = facts_of(self.method).has_corrections
        return tuple(self.model.corrections) if has_corrections else None

    @property
    def schedule_text(self) -> str:
        """The iteration schedule as `2,2,1,1`, or relative to the teacher `0*14,x*2,0*14`; empty if
        there is none."""
        if self.teacher_schedule:
            return self.teacher_schedule
        return "" if self.schedule is None else str(self.model.corrections)

    @property
    def opened_schedule(self) -> str | None:
        """The schedule under which its checkpoint is this model; None if that is the checkpoint's
        own."""
        if self.teacher_schedule and self.job is None:  # The checkpoint is the teacher's.
            return self.teacher_schedule
        return None if self.schedule is None else str(self.model.corrections)

    @property
    def name(self) -> str:
        """The label, else method and schedule."""
        return self.label or " ".join(part for part in (self.method, self.schedule_text) if part)

    @property
    def run_name(self) -> str:
        """Name of its MLflow run, which tells several teachers apart by their schedules."""
        is_teacher = self.role == "teacher" and self.schedule
        return f"{self.name} {self.schedule_text}" if is_teacher else self.name

    @property
    def threshold_text(self) -> str:
        """Thresholds that give this schedule: `0.003 to 0.004`, `<=0.0003` or `>0.03`."""
        above = self.threshold_above
        up_to = self.threshold_up_to
        if above is None:
            return "" if up_to is None else f"<={up_to:.2g}"
        return f">{above:.2g}" if up_to is None else f"{above:.2g} to {up_to:.2g}"

    @property
    def result_path(self) -> Path:
        """File of the measured trial; it exists when the trial is finished."""
        return Path(self.folder) / f"result-{self.key}.json"

    def result(self) -> Trial | None:
        """Return the trial with what was measured; None while it is not finished.

        Label and thresholds stay those of this sweep; another sweep may have measured the trial
        with others.
        """
        stored = Trial.read(self.result_path)
        if stored is None:
            return None
        measured = {
            "numbers": stored.numbers,
            "evaluation": stored.evaluation,
            "checkpoint": stored.checkpoint,
        }
        return self.model_copy(update=measured)

    def with_numbers(self, group: str, numbers: Mapping[str, float | None]) -> Trial:
        """Return the trial with further known numbers, tracked as `GROUP/NAME`."""
        finite_numbers = {
            f"{group}/{name}": number
            for name, number in numbers.items()
            if number is not None and math.isfinite(number)
        }
        return self.model_copy(update={"numbers": {**self.numbers, **finite_numbers}})

    def value(self, name: str) -> float | None:
        """Return a number by its tracked name; None if it was not measured."""
        if name == PERPLEXITY:
            return self.metrics().get(name)
        number = self.numbers.get(name)
        return None if number is None else float(number)

    def metrics(self) -> dict[str, float]:
        """Return every number by its tracked name, with the perplexity per token."""
        numbers = {name: float(number) for name, number in self.numbers.items()}
        if numbers.get(VALIDATION_LOSS, math.inf) <= math.log(MAX_PERPLEXITY):
            numbers.setdefault(PERPLEXITY, math.exp(numbers[VALIDATION_LOSS]))
        return numbers

    def params(self, job: TrainingJob | None = None) -> dict[str, str]:
        """Return the tracked parameters, those of its training included.

        Args:
            job: The training of its weights, if another run trained them.
        """
        trained = self.job or job
        params = {"role": self.role, **(job_parameters(trained) if trained else {})}
        # Elastic weights are trained under another schedule than the measured one.
        params |= model_parameters(self.model)
        if self.teacher_schedule:
            params["schedule"] = self.teacher_schedule
        if self.threshold_text:
            up_to = self.threshold_up_to
            params["threshold"] = "inf" if up_to is None else f"{up_to:.6g}"
            params["threshold_range"] = self.threshold_text
        if self.checkpoint:
            params["checkpoint"] = self.checkpoint
            if self.parent and not trained:
                params["teacher"] = self.checkpoint  # Pruned, not trained.
        return params | ({"group": self.group} if self.group else {})


class SweepTrials(Record):
    """All trials of a sweep, as its `plan.json` holds them."""

    key: str
    """Hash of the trials' keys: the same sweep has the same key."""
    name: str
    """Name of its folder and of its run in MLflow."""
    kind: str
    """`threshold`, `iterations` or `search`."""
    tokens_folder: WorkspacePath
    """Folder of prepared tokens."""
    teacher: WorkspacePath | None
    """Checkpoint of the teacher; None for `iterations`."""
    num_requested: int
    """Number of requested thresholds, budgets, schedules or models, before equal ones were merged;
    seeds do not count."""
    trials: tuple[Trial, ...]
    """Trials, teacher and baselines, each once."""
    num_distinct: int = 0
    """Number of distinct schedules or models, without those that a search adds."""


def teacher_or_costliest(
    models: Sequence[T], *, role: Callable[[T], str], cost: Callable[[T], float]
) -> T | None:
    """Return the model that others are compared with; None if there are no models.

    This is the teacher, else the costliest trial, else the costliest model.
    """
    for roles in ({"teacher"}, {"teacher", "trial"}, set(get_args(Role))):
        if candidates := [model for model in models if role(model) in roles]:
            return max(candidates, key=cost)
    return None


class AshaRule(Record):
    """ASHA's rule: when trials are compared, and how many continue."""

    first_rung: float
    """Share of the steps at the first rung."""
    reduction_factor: int = 2
    """One of this many trials at a rung continues."""

    @classmethod
    def of(cls, sweep: SweepSettings) -> AshaRule:
        """Return the rule of a sweep's settings."""
        return cls(first_rung=sweep.asha_first_rung, reduction_factor=sweep.asha_reduction_factor)

    @property
    def text(self) -> str:
        """One sentence for a plan."""
        rungs = []
        share = self.first_rung
        while share < 1:
            rungs.append(f"{share:.3g}")
            share *= self.reduction_factor
        return (
            f"one of {self.reduction_factor} learning rates of a model continues at "
            f"{', '.join(rungs)} of the steps (ASHA), so the cost is an upper bound"
        )


class EarlyStop(Record):
    """Why a trial was stopped."""

    rule: AshaRule
    step: int
    """Steps done."""
    num_steps: int
    """Steps of the whole training."""
    competitor: str
    """Label of the trial that was better."""
    reason: str
    """Both validation losses."""

    @property
    def share_saved(self) -> float:
        """Share of the trial's steps that were not made."""
        return 1.0 - self.step / self.num_steps

    @property
    def text(self) -> str:
        """Step and reason in one line."""
        return f"stopped early at step {self.step} of {self.num_steps}: {self.reason}"
