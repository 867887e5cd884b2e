"""The result of a trial: one value for tables, fronts, reports and MLflow.

The full model (`teacher`) and models trained from scratch (`baseline`) have the same form, so that
a front can hold all three. Numbers are in three flat mappings, named as the tracked metrics:
`cost["evaluations"]` is the metric `cost/evaluations`. A number that was not measured is absent.

Usual names. cost: evaluations, relative_evaluations, flops_per_token, relative_flops,
kv_bytes_per_token, weight_bytes_per_token, num_parameters, decode_ms_per_token, decode_ms_spread.
quality: accuracy, accuracy_stderr, bits_per_byte, bits_per_byte_stderr, validation_loss, perplexity
(per token: exp of that loss), and `TASK/METRIC` for each task. train: steps, tokens, flops,
seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from orchestrator.workspace.errors import UserError

Role = Literal["trial", "teacher", "baseline"]
T = TypeVar("T")
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


class TrialResult(BaseModel):
    """One model with its cost and quality."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    """Content key of everything that determines the result."""
    role: Role
    """`trial`, `teacher` (the full model) or `baseline` (trained from scratch)."""
    method: str
    """Registry key of the method: iiet, vanilla, pcformer."""
    schedule: tuple[int, ...] | None = None
    """Corrections per layer; None if the method has none."""
    label: str = ""
    """Name in tables and figures, such as `threshold 0.004` or `vanilla`."""
    threshold_above: Threshold = None
    """Thresholds above this, up to `threshold_up_to`, give this schedule."""
    threshold_up_to: Threshold = None
    """Largest threshold that gives this schedule."""
    cost: Numbers = Field(default_factory=dict)
    """Inference cost, lower is better."""
    quality: Numbers = Field(default_factory=dict)
    """Accuracy and losses, with standard errors as `NAME_stderr`."""
    train: Numbers = Field(default_factory=dict)
    """Training cost: steps, tokens, FLOPs, seconds."""
    checkpoint: str | None = None
    """Folder of the weights."""
    parent: str | None = None
    """Key of the teacher."""
    recipe: dict[str, str] = Field(default_factory=dict)
    """Training settings; empty if the model was not trained."""
    run_id: str | None = None
    """MLflow run of the trial."""
    seed: int | None = None
    """Training seed, if the sweep trains every model with several."""
    group: str | None = None
    """Name without the seed; results of one group are seeds of one model."""

    def value(self, name: str) -> float | None:
        """Return a number by its tracked name (`cost/evaluations`); None if it was not measured."""
        group, _, key = name.partition("/")
        number = self._groups().get(group, {}).get(key)
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
        """Return every number by its tracked name: `cost/*`, `quality/*`, `train/*`."""
        return {
            f"{group}/{name}": float(number)
            for group, values in self._groups().items()
            for name, number in values.items()
            if number is not None
        }

    def params(self) -> dict[str, str]:
        """Return the tracked parameters; `r_NN` are a layer's corrections."""
        params = {"method": self.method, "role": self.role, "label": self.name}
        if self.schedule is not None:
            params["schedule"] = self.schedule_text
            params |= {f"r_{layer:02d}": str(r) for layer, r in enumerate(self.schedule, start=1)}
        if self.threshold_text:
            up_to = self.threshold_up_to
            params["threshold"] = "inf" if up_to is None else f"{up_to:.6g}"
            params["threshold_range"] = self.threshold_text
        if self.checkpoint:
            params["checkpoint"] = self.checkpoint
        if self.seed is not None:
            params |= {"seed": str(self.seed), "group": self.group or ""}
        if self.parent:
            params["parent"] = self.parent
        return params | {f"recipe/{name}": text for name, text in self.recipe.items()}

    def _groups(self) -> dict[str, Mapping[str, float]]:
        quality, loss = self.quality, finite_or_none(self.quality.get("validation_loss"))
        if loss is not None and loss < MAX_EXPONENT:
            quality = {"perplexity": math.exp(loss), **quality}
        return {"cost": self.cost, "quality": quality, "train": self.train}

    @classmethod
    def from_stored(cls, values: Mapping[str, Any]) -> TrialResult:
        """Rebuild a result from `model_dump(mode="json")`.

        Raises:
            UserError: If a field is unknown, missing or invalid: the file is damaged, or of another
                version.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            kinds = {"extra_forbidden": "unknown", "missing": "missing"}
            problems = [
                f"{kinds.get(found['type'], 'invalid')}: {'.'.join(map(str, found['loc']))}"
                for found in error.errors()
            ]
            raise UserError(
                f"the trial result is not readable ({'; '.join(problems)}); delete it and run the "
                "sweep again"
            ) from None


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
