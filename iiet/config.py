"""Configs of a decoder (method, sizes, iteration schedule) and of distillation: frozen values.

Both check their values. That of a decoder holds all that determines the weights' shapes and the
forward pass, and nothing about training. A checkpoint folder stores it as JSON beside the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from iiet.checks import check_rules, is_integer_from, is_number_from
from iiet.extensions import ExtensionError
from iiet.facts import METHODS, facts_of
from iiet.schedule import IterationSchedule, ScheduleLike

__all__ = ["PRESETS", "DistillationConfig", "DivergenceKind", "ModelConfig", "preset"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that determines a decoder's parameters and its forward pass.

    Raises:
        ValueError: one error for all problems, each with the value received and what is allowed.
        ExtensionError: likewise, if the method is unknown or its package is broken.
    """

    method: str = "iiet"
    """How a layer advances the hidden state; a key of `iiet.methods.METHODS`."""
    vocab_size: int
    """Number of distinct tokens."""
    dim: int
    """Width of the hidden state."""
    num_layers: int
    """Number of layers L, each with its own field."""
    num_heads: int
    """Query heads per attention; the width of a head is `dim / num_heads`."""
    num_kv_heads: int = None  # type: ignore[assignment]  # Never None once the config is made.
    """Key and value heads, as many as query heads where None is given; each serves
    `num_heads / num_kv_heads` query heads."""
    ffn_dim: int
    """Inner width of the feed-forward network."""
    context_length: int
    """Longest sequence in tokens, prompt and continuation together; longer ones are refused."""
    schedule: IterationSchedule | None = None
    """Corrections per layer, in any form that `IterationSchedule.parse` reads. Required where the
    method makes corrections, else None or zeros. Of PCformer, levels; None gives the full one."""
    method_options: Any = None
    """Options of the method, an instance of `facts_of(method).Options`; None for its defaults."""
    tie_embeddings: bool = True
    """Whether the output head is the embedding matrix."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths, in tokens."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside each RMSNorm."""
    layer_norm_eps: float = 1e-5
    """Added to the variance inside each LayerNorm of the method."""
    initializer_std: float = 0.02
    """Standard deviation of freshly made linear and embedding weights."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise ValueError(f"invalid model config: method must be a name, got {self.method!r}")
        given: Any = self.schedule
        if given is None and self.method in METHODS:
            given = facts_of(self.method).full_level
        if given is not None and type(self.num_layers) is int and self.num_layers > 0:
            parsed = IterationSchedule.parse(given, num_layers=self.num_layers)
            object.__setattr__(self, "schedule", parsed)
        num_kv_heads: Any = self.num_kv_heads
        if num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        problems = [*_size_problems(self), *_method_problems(self)]
        if problems:
            kind = ValueError if self.method in METHODS else ExtensionError
            raise kind("invalid model config: " + "; ".join(problems))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads

    @property
    def corrections(self) -> IterationSchedule:
        """The iteration schedule, all zeros where a method makes no corrections."""
        return self.schedule or IterationSchedule.none(self.num_layers)

    @property
    def options(self) -> Any:
        """The options of the method; its defaults if `method_options` is None."""
        default = facts_of(self.method).Options()
        return default if self.method_options is None else self.method_options

    def evaluations_per_layer(self, schedule: ScheduleLike | None = None) -> tuple[int, ...]:
        """Count the field evaluations of each layer under a schedule (default: the config's own).

        Raises:
            ValueError: the schedule does not fit the method or the number of layers.
        """
        if schedule is not None and schedule != self.corrections:
            return self.with_schedule(schedule).evaluations_per_layer()
        method, corrections = facts_of(self.method), self.corrections
        return tuple(
            method.evaluations_per_layer(corrections, layer) for layer in range(self.num_layers)
        )

    def with_schedule(self, schedule: ScheduleLike) -> ModelConfig:
        """Return the config under another iteration schedule; one that does not fit is a
        ValueError."""
        changes: Any = {"schedule": schedule}
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: the schedule as a list or None, options without their defaults."""
        values = asdict(self)
        values["schedule"] = list(self.schedule) if self.schedule else None
        del values["method_options"]
        default = facts_of(self.method).Options()
        chosen = {
            field.name: getattr(self.options, field.name)
            for field in fields(default)
            if getattr(self.options, field.name) != getattr(default, field.name)
        }
        # Left out where all are defaults: a config says what was chosen.
        return values | ({"method_options": chosen} if chosen else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Build a config from JSON values; the inverse of `to_dict`.

        Raises:
            ValueError: unknown or missing keys, or invalid values, all named at once.
        """
        known = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        problems = [f"unknown key {key!r}" for key in values if key not in known]
        problems += [f"missing key {key!r}" for key in sorted(required - set(values))]
        if problems:
            raise ValueError(
                f"invalid model config: {'; '.join(problems)}; "
                f"known keys: {', '.join(sorted(known))}"
            )
        given = dict(values)
        method = given.get("method", cls.method)
        if isinstance(given.get("method_options"), Mapping) and method in METHODS:
            given["method_options"] = _parsed_options(method, given["method_options"])
        return cls(**given)


def _size_problems(config: ModelConfig) -> list[str]:
    problems: list[str] = []
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        if field.type == "int" and (type(value) is not int or value < 1):
            problems.append(f"{name} must be a positive integer, got {value!r}")
        elif field.type == "float" and not (
            type(value) in (int, float) and math.isfinite(value) and value > 0
        ):
            problems.append(f"{name} must be a positive number, got {value!r}")
        elif field.type == "bool" and type(value) is not bool:
            problems.append(f"{name} must be true or false, got {value!r}")
    if problems:
        return problems
    if config.dim % (2 * config.num_heads):
        problems.append(
            f"dim must be a multiple of twice num_heads ({2 * config.num_heads}, for the rotary "
            f"halves), got {config.dim}"
        )
    if config.num_heads % config.num_kv_heads:
        problems.append(
            f"num_kv_heads must divide num_heads ({config.num_heads}), got {config.num_kv_heads}"
        )
    return problems


def _parsed_options(method: str, values: Mapping[str, Any]) -> Any:
    kind = facts_of(method).Options
    known = [field.name for field in fields(kind)]
    unknown = [repr(name) for name in values if name not in known]
    if unknown:
        raise ValueError(
            f"invalid model config: method {method!r} has no option {', '.join(unknown)}; "
            f"its options: {', '.join(known) or 'none'}"
        )
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"invalid model config: method_options of {method!r}: {error}") from None


def _method_problems(config: ModelConfig) -> list[str]:
    schedule = config.schedule
    if config.method not in METHODS:
        return [
            f"method must be one of {', '.join(METHODS)}, got {config.method!r}; a method of "
            "another package needs this package installed"
        ]
    kind = facts_of(config.method).Options
    if not isinstance(config.method_options, kind | None):
        return [
            f"method_options must be a {kind.__name__} or None for method {config.method!r}, "
            f"got {config.method_options!r}"
        ]
    problems: list[str] = []
    if facts_of(config.method).has_corrections:
        if schedule is None:
            problems.append(
                f"schedule is required for method {config.method!r}; "
                "IterationSchedule.uniform(num_layers, 3) is usual"
            )
        elif facts_of(config.method).repeats_stack and len(set(schedule)) > 1:
            problems.append(
                f"method {config.method!r} repeats the whole stack, so all layers must make the "
                f"same number of corrections, got schedule {schedule}"
            )
        elif (most := facts_of(config.method).full_level) is not None and max(schedule) > most:
            problems.append(
                f"method {config.method!r} has levels 0 to {most} for each layer, got schedule "
                f"{schedule}"
            )
    elif schedule is not None and schedule.num_corrections:
        problems.append(f"method {config.method!r} makes no corrections, got schedule {schedule}")
    return problems


DivergenceKind = Literal["forward", "reverse"]


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """What the student learns from its teacher.

    Raises:
        ValueError: naming every value that is out of range.
    """

    kl_weight: float = 1.0
    """Weight of the divergence from the teacher; 0 turns it off. The cross-entropy has weight 1."""
    temperature: float = 1.0
    """Softens both distributions of the divergence; from 0.001 to 1000."""
    divergence: DivergenceKind = "forward"
    """`forward`, KL(teacher || student), is mean-seeking; `reverse` is mode-seeking."""
    hidden_weight: float = 0.0
    """Weight of the relative error of the hidden states after each layer; 0 turns it off."""
    start_step: int = 0
    """First step with a teacher."""
    end_step: int | None = None
    """First step after those with a teacher; None: all later steps have one."""

    def __post_init__(self) -> None:
        starts = is_integer_from(0, self.start_step)
        first_end = self.start_step + 1 if starts else 1
        check_rules(
            "distillation config",
            self,
            {
                "kl_weight must be a number from 0": is_number_from(0, self.kl_weight),
                "temperature must be a number from 0.001 to 1000": is_number_from(
                    1e-3, self.temperature, 1e3
                ),
                f"divergence must be one of {get_args(DivergenceKind)}": (
                    self.divergence in get_args(DivergenceKind)
                ),
                "hidden_weight must be a number from 0": is_number_from(0, self.hidden_weight),
                "start_step must be an integer from 0": starts,
                "end_step must be an integer above start_step, or None": (
                    self.end_step is None or is_integer_from(first_end, self.end_step)
                ),
            },
        )

    def uses_teacher(self, step: int) -> bool:
        """Whether the loss of this step, counted from 0, needs the teacher."""
        inside = self.start_step <= step and (self.end_step is None or step < self.end_step)
        return inside and (self.kl_weight > 0 or self.hidden_weight > 0)

    def needs_hidden(self, step: int) -> bool:
        """Whether the loss of this step needs the hidden states of both models."""
        return self.uses_teacher(step) and self.hidden_weight > 0


def _sizes(
    num_layers: int, dim: int, ffn_dim: int, num_heads: int, **others: Any
) -> dict[str, Any]:
    sizes = {"num_layers": num_layers, "dim": dim, "ffn_dim": ffn_dim, "num_heads": num_heads}
    return {"vocab_size": 32000, "context_length": 2048, **sizes, **others}


PRESETS: Mapping[str, Mapping[str, Any]] = {
    # This project's toy: trains on one CPU core in minutes.
    "tiny": _sizes(6, 128, 352, 4, vocab_size=2048, context_length=128),
    # The published configurations.
    "55m": _sizes(12, 512, 1408, 4),
    "340m": _sizes(24, 1024, 2816, 8),
    # This project's own size between them; no published configuration was at hand.
    "740m": _sizes(24, 1536, 4096, 12),
    "1.3b": _sizes(24, 2048, 5432, 16, tie_embeddings=False),
}
"""Named sizes: the fields of a `ModelConfig` without method and schedule."""
_USUAL_CORRECTIONS = 3  # The paper's number.


def preset(name: str, **overrides: Any) -> ModelConfig:
    """Build the config of a named size, a key of `PRESETS`, with any fields replaced.

    By default there are three corrections per layer (PCformer: the full level) where the method
    makes any. `overrides` take the forms that `ModelConfig.from_dict` reads.

    Raises:
        ValueError: unknown preset, or fields that do not fit together.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    values: dict[str, Any] = {"method": "iiet", **PRESETS[name], **overrides}
    if "schedule" not in values and values["method"] in METHODS:
        method = facts_of(values["method"])
        if method.has_corrections:
            values["schedule"] = method.full_level or _USUAL_CORRECTIONS
    return ModelConfig.from_dict(values)
