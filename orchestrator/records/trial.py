"""What a trial leaves behind: one value that tables, fronts, reports and MLflow all read.

A trial is one iteration schedule distilled and measured once; the full model (`teacher`) and models
trained from scratch for comparison (`baseline`: vanilla, r = 0) have the same form, so that a
front can hold all three. Numbers lie in three flat mappings whose names are those of the tracked
metrics: `cost["evaluations"]` is the metric `cost/evaluations`. A name that a trial lacks stays
out; readers ask with `value`, which answers None.

Usual names. cost: evaluations, relative_evaluations, flops_per_token, relative_flops,
kv_bytes_per_token, weight_bytes_per_token, num_parameters, decode_ms_per_token, decode_ms_spread.
quality: accuracy, accuracy_stderr, bits_per_byte, bits_per_byte_stderr, validation_loss, perplexity
(of a token: exp of that loss), and `TASK/METRIC` for each task. train: steps, tokens, flops,
seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeVar

from orchestrator.workspace.errors import UserError

Role = Literal["trial", "teacher", "baseline"]
ROLES = ("trial", "teacher", "baseline")
T = TypeVar("T")
MAX_EXPONENT = 700.0
"""Above it `exp` leaves the numbers of a float."""


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One model, what it costs and how good it is.

    Raises:
        ValueError: If the role is none of the three.
    """

    key: str
    """Content key of all that determines the result."""
    role: Role
    """`trial`, `teacher` (the full model) or `baseline` (trained from scratch for comparison)."""
    method: str
    """Registry key of the method: iiet, vanilla, pcformer."""
    schedule: tuple[int, ...] | None = None
    """Corrections per layer; None where the method has none."""
    label: str = ""
    """What tables and pictures call it, such as `threshold 0.004` or `vanilla`."""
    threshold_above: float | None = None
    """Thresholds above this, and up to `threshold_up_to`, give this schedule; None or -infinity:
    all that are low enough."""
    threshold_up_to: float | None = None
    """Largest threshold that gives this schedule; None or infinity: all that are high enough."""
    cost: dict[str, float] = field(default_factory=dict)
    """Inference cost, lower is better."""
    quality: dict[str, float] = field(default_factory=dict)
    """Accuracy and losses, with standard errors as `NAME_stderr`."""
    train: dict[str, float] = field(default_factory=dict)
    """What making it took: steps, tokens, FLOPs, seconds."""
    checkpoint: str | None = None
    """Folder of its weights."""
    parent: str | None = None
    """Key of the model it was distilled from."""
    recipe: dict[str, str] = field(default_factory=dict)
    """How it was trained, setting by setting; empty where it was measured as it is."""
    run_id: str | None = None
    """MLflow run that holds it."""
    seed: int | None = None
    """Seed of its training, where the sweep trains every model with several."""
    group: str | None = None
    """What it is called apart from its seed; results of one group are seeds of one model."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {self.role!r}")

    def value(self, name: str) -> float | None:
        """Return a number by its tracked name (`cost/evaluations`); None if not measured."""
        group, _, key = name.partition("/")
        number = self._groups().get(group, {}).get(key)
        return None if number is None or number != number else float(number)

    @property
    def schedule_text(self) -> str:
        """The iteration schedule as it is typed: `2,2,1,1`; empty where there is none."""
        return ",".join(str(r) for r in self.schedule or ())

    @property
    def name(self) -> str:
        """What to call it where there is room for one name: the label, else method and schedule."""
        return self.label or " ".join(part for part in (self.method, self.schedule_text) if part)

    @property
    def threshold_text(self) -> str:
        """The thresholds that give this schedule, as `0.003 to 0.004`, `<=0.0003` or `>0.03`."""
        return threshold_range_text(self.threshold_above, self.threshold_up_to)

    def metrics(self) -> dict[str, float]:
        """Return every number under its tracked name: `cost/*`, `quality/*`, `train/*`."""
        return {
            f"{group}/{name}": float(number)
            for group, values in self._groups().items()
            for name, number in values.items()
            if number is not None
        }

    def params(self) -> dict[str, str]:
        """Return the tracked parameters: method, schedule, one `r_NN` a layer, threshold, where it
        came from, and its recipe as `recipe/*`.
        """
        params = {"method": self.method, "role": self.role, "label": self.name}
        if self.schedule is not None:
            params["schedule"] = self.schedule_text
            params |= {f"r_{layer:02d}": str(r) for layer, r in enumerate(self.schedule, start=1)}
        if self.threshold_text:
            up_to = finite_or_none(self.threshold_up_to)
            params["threshold"] = "inf" if up_to is None else f"{up_to:.6g}"
            params["threshold_range_text"] = self.threshold_text
        if self.checkpoint:
            params["checkpoint"] = self.checkpoint
        if self.seed is not None:
            params |= {"seed": str(self.seed), "group": self.group or ""}
        if self.parent:
            params["parent"] = self.parent
        return params | {f"recipe/{name}": text for name, text in self.recipe.items()}

    def _groups(self) -> dict[str, Mapping[str, float]]:
        """Return the numbers by group, with the perplexity, which is the loss in other words."""
        quality, loss = self.quality, finite_or_none(self.quality.get("validation_loss"))
        if loss is not None and loss < MAX_EXPONENT:
            quality = {"perplexity": math.exp(loss), **quality}
        return {"cost": self.cost, "quality": quality, "train": self.train}

    def to_dict(self) -> dict[str, Any]:
        """Return a mapping that strict JSON can hold, without numbers that are none.

        `from_dict` is its inverse.
        """
        numbers = {
            group: {n: v for n, v in values.items() if finite_or_none(v) is not None}
            for group, values in (
                ("cost", self.cost),
                ("quality", self.quality),
                ("train", self.train),
            )
        }
        return (
            asdict(self)
            | numbers
            | {
                "schedule": None if self.schedule is None else list(self.schedule),
                "threshold_above": finite_or_none(self.threshold_above),
                "threshold_up_to": finite_or_none(self.threshold_up_to),
            }
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrialResult:
        """Rebuild a result.

        Raises:
            UserError: If a name is unknown or missing, as in a file of another version or a damaged
                one.
        """
        known = {item.name for item in fields(cls)}
        required = {"key", "role", "method"}
        problems = [f"unknown: {name}" for name in values if name not in known]
        problems += [f"missing: {name}" for name in sorted(required - set(values))]
        if problems:
            raise UserError(
                f"no readable trial result ({'; '.join(problems)}); delete it and run the sweep "
                "again"
            )
        schedule = values.get("schedule")
        return cls(**{**values, "schedule": None if schedule is None else tuple(schedule)})


def teacher_or_costliest(
    models: Sequence[T], *, role: Callable[[T], str], cost: Callable[[T], float]
) -> T | None:
    """Return the model that others are compared with: the teacher, else the costliest that is no
    baseline, else the costliest; None of none.

    Args:
        models: Planned or measured ones.
        role: Of each of them, one of `ROLES`.
        cost: Of each of them.
    """
    for wanted in ({"teacher"}, {"teacher", "trial"}, set(ROLES)):
        if found := [model for model in models if role(model) in wanted]:
            return max(found, key=cost)
    return None


def threshold_range_text(above: float | None, up_to: float | None) -> str:
    """Write the thresholds that give a schedule, above one and up to another; None or infinite:
    no bound. Empty where there is neither.
    """
    above, up_to = finite_or_none(above), finite_or_none(up_to)
    if above is None:
        return "" if up_to is None else f"<={up_to:.2g}"
    return f">{above:.2g}" if up_to is None else f"{above:.2g} to {up_to:.2g}"


def finite_or_none(number: float | None) -> float | None:
    """Return a number that strict JSON can hold, or None."""
    return number if number is not None and math.isfinite(number) else None
