"""Configs of a decoder (method, sizes, iteration schedule) and of distillation: frozen values.

Both check their values. That of a decoder holds all that determines the weights' shapes and the
forward pass, and nothing about training. A checkpoint folder stores it as JSON beside the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from iiet.checks import check_rules, is_integer_from, is_number_from
from iiet.extensions import ExtensionError
from iiet.model.facts import METHODS, MethodFacts, facts_of
from iiet.model.schedule import IterationSchedule, ScheduleLike

__all__ = [
    "ATTENTION_OPTIONS",
    "PRESETS",
    "DistillationConfig",
    "DivergenceKind",
    "ModelConfig",
    "RopeScaling",
    "RopeType",
    "preset",
    "schedule_problems",
]


RopeType = Literal["linear", "llama3", "yarn"]
_REQUIRED_BY_ROPE_TYPE: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("original_max_position_embeddings",),
}
"""Fields of `RopeScaling` that a type needs beside the factor."""
_OPTIONAL_OF_YARN = (
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary angles are stretched, in the words of transformers' `rope_parameters`.

    A pair of channels turns once per wavelength, in tokens. `linear` makes all wavelengths `factor`
    times as long; `llama3` and `yarn` only the long ones, with a ramp between. The formulas are in
    `iiet.model.layers`.

    Raises:
        ValueError: naming every value that is missing, out of range or not read by the type.
    """

    rope_type: RopeType
    """`linear`, `llama3` or `yarn`."""
    factor: float
    """By how much long wavelengths grow, from 1."""
    original_max_position_embeddings: int | None = None
    """Context of the earlier training, in tokens. Read by llama3 and yarn, as all below by one."""
    low_freq_factor: float | None = None
    """llama3: wavelengths above the earlier context divided by this grow by the whole factor."""
    high_freq_factor: float | None = None
    """llama3: wavelengths below the earlier context divided by this stay as they are."""
    attention_factor: float | None = None
    """yarn: multiplies cosines and sines; None: `1 + 0.1 ln(factor)`, or as `mscale` says."""
    beta_fast: float | None = None
    """yarn: pairs that turn more often than this in the earlier context stay as they are; None: 32
    turns."""
    beta_slow: float | None = None
    """yarn: pairs that turn less often than this grow by the whole factor; None: once."""
    mscale: float | None = None
    """yarn: with `mscale_all_dim`, the attention factor is `(1 + 0.1 mscale ln(factor)) /
    (1 + 0.1 mscale_all_dim ln(factor))`."""
    mscale_all_dim: float | None = None
    """yarn: see `mscale`."""
    truncate: bool = True
    """yarn: whether the ramp starts and ends at whole channels."""

    def __post_init__(self) -> None:
        required = _REQUIRED_BY_ROPE_TYPE.get(self.rope_type)
        if required is None:
            raise ValueError(
                f"rope_scaling: rope_type must be one of {', '.join(_REQUIRED_BY_ROPE_TYPE)}, got "
                f"{self.rope_type!r}"
            )
        read = (*required, *(_OPTIONAL_OF_YARN if self.rope_type == "yarn" else ()))
        problems: list[str] = []
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            name = f"{field.name} of rope_type {self.rope_type!r}"
            if field.name not in ("factor", *read):
                if value != field.default:
                    problems.append(f"{name} is not read; leave it out")
            elif field.name == "truncate":
                if type(value) is not bool:
                    problems.append(f"{name} must be true or false, got {value!r}")
            elif field.name == "original_max_position_embeddings":
                if not is_integer_from(1, value):
                    problems.append(f"{name} must be an integer from 1, got {value!r}")
            elif value is None and field.name not in ("factor", *required):
                continue
            elif not is_number_from(1 if field.name == "factor" else 0, value):
                least = "1" if field.name == "factor" else "0"
                problems.append(f"{name} must be a number from {least}, got {value!r}")
            elif value == 0 and field.name not in ("mscale", "mscale_all_dim"):
                problems.append(f"{name} must be above 0, got {value!r}")
        if problems:
            raise ValueError("rope_scaling: " + "; ".join(problems))
        if (self.low_freq_factor or 0.0) >= (self.high_freq_factor or math.inf):
            problems.append("low_freq_factor must be below high_freq_factor")
        if (self.beta_slow or 1.0) > (self.beta_fast or 32.0):
            problems.append("beta_slow must not be above beta_fast")
        if problems:
            raise ValueError("rope_scaling: " + "; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, without those at their defaults."""
        values = asdict(self)
        return {
            field.name: values[field.name]
            for field in fields(self)
            if values[field.name] != field.default
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeScaling:
        """Build one from JSON values, the inverse of `to_dict`; None stands for a default.

        Raises:
            ValueError: unknown or missing keys, or invalid values.
        """
        known = [field.name for field in fields(cls)]
        problems = [f"unknown key {key!r}" for key in values if key not in known]
        missing = [key for key in ("rope_type", "factor") if values.get(key) is None]
        problems += [f"missing key {key!r}" for key in missing]
        if problems:
            raise ValueError(f"rope_scaling: {'; '.join(problems)}; keys: {', '.join(known)}")
        return cls(**{key: value for key, value in values.items() if value is not None})


ATTENTION_OPTIONS = (
    "qkv_bias", "attention_out_bias", "head_norms", "rope_scaling", "rotary_layers",
    "sliding_windows",
)  # fmt: skip
"""Fields of `ModelConfig` that the attention of a plain Llama leaves at their defaults; so does
`head_dim` where it is `dim / num_heads`."""


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
    """Query heads per attention."""
    num_kv_heads: int = None  # type: ignore[assignment]  # Never None once the config is made.
    """Key and value heads, as many as query heads where None is given; each serves
    `num_heads / num_kv_heads` query heads."""
    head_dim: int = None  # type: ignore[assignment]  # Never None once the config is made.
    """Width of a head, `dim / num_heads` where None is given; even, for the rotary halves."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values add a bias."""
    attention_out_bias: bool = False
    """Whether attention's output projection adds a bias."""
    head_norms: bool = False
    """Whether queries and keys are normalized per head, by an RMSNorm before the rotation."""
    ffn_dim: int
    """Inner width of the feed-forward network."""
    context_length: int
    """Longest sequence in tokens, prompt and continuation together; longer ones are refused."""
    schedule: IterationSchedule | None = None
    """Corrections per layer, in any form that `IterationSchedule.parse` reads; no layer is left
    out, as a model contains the kept layers alone. Required where the method makes corrections,
    else None or zeros. Of PCformer, levels; None gives the full one."""
    method_options: Any = None
    """Options of the method, an instance of `facts_of(method).Options`; None for its defaults."""
    tie_embeddings: bool = True
    """Whether the output head is the embedding matrix."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding's wavelengths, in tokens."""
    rope_scaling: RopeScaling | None = None
    """How the rotary angles are stretched for contexts longer than those of an earlier training: a
    `RopeScaling`, or a mapping of its fields; None where they are not."""
    rotary_layers: tuple[bool, ...] | None = None
    """Whether each layer rotates queries and keys; None where all do."""
    sliding_windows: tuple[int | None, ...] | None = None
    """How many tokens a token of each layer sees, itself included, None for all earlier ones; or
    None where every layer sees all."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square inside each RMSNorm."""
    layer_norm_eps: float = 1e-5
    """Added to the variance inside each LayerNorm of the method."""
    initializer_std: float = 0.02
    """Standard deviation of freshly made linear and embedding weights."""

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise ValueError(f"invalid model config: method must be a name, got {self.method!r}")
        # The types of fields say what a config has; until the end of this, it may hold other forms.
        schedule: Any = self.schedule
        if schedule is None and self.method in METHODS:
            schedule = facts_of(self.method).full_level
        if schedule is not None and type(self.num_layers) is int and self.num_layers > 0:
            parsed = IterationSchedule.parse(schedule, num_layers=self.num_layers)
            object.__setattr__(self, "schedule", parsed)
        num_kv_heads: Any = self.num_kv_heads
        if num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        self._fill_in_attention()
        problems = [*_size_problems(self), *_layer_problems(self), *_method_problems(self)]
        if problems:
            error_type = ValueError if self.method in METHODS else ExtensionError
            raise error_type("invalid model config: " + "; ".join(problems))

    def _fill_in_attention(self) -> None:
        """Give each option of attention its one form, so that equal models have equal configs."""
        head_dim: Any = self.head_dim
        are_sizes = is_integer_from(1, self.dim) and is_integer_from(1, self.num_heads)
        # A width that is not whole stays None, and is refused with the other sizes.
        if head_dim is None and are_sizes and self.dim % self.num_heads == 0:
            object.__setattr__(self, "head_dim", self.dim // self.num_heads)
        scaling: Any = self.rope_scaling
        if isinstance(scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling.from_dict(scaling))
        for name, usual in (("rotary_layers", True), ("sliding_windows", None)):
            values = getattr(self, name)
            if isinstance(values, list | tuple):
                are_usual = all(value is usual for value in values)
                fits = len(values) == self.num_layers
                object.__setattr__(self, name, None if are_usual and fits else tuple(values))

    def rotates(self, layer: int) -> bool:
        """Return whether a layer, the first being 0, rotates queries and keys."""
        return self.rotary_layers is None or self.rotary_layers[layer]

    def window_of(self, layer: int) -> int | None:
        """Return how many tokens a token of a layer sees, itself included; None: all earlier ones.

        A window as long as the context hides nothing, so it counts as none.
        """
        window = None if self.sliding_windows is None else self.sliding_windows[layer]
        return None if window is None or window >= self.context_length else window

    @property
    def windows(self) -> tuple[int, ...]:
        """The sliding windows of all layers that have one, each once, in tokens."""
        windows = (self.window_of(layer) for layer in range(self.num_layers))
        return tuple(dict.fromkeys(window for window in windows if window is not None))

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
        method = facts_of(self.method)
        corrections = self.corrections
        return tuple(
            method.evaluations_per_layer(corrections, layer) for layer in range(self.num_layers)
        )

    def with_schedule(self, schedule: ScheduleLike) -> ModelConfig:
        """Return the config under another iteration schedule; one that does not fit is a
        ValueError."""
        changes: Any = {"schedule": schedule}
        return replace(self, **changes)

    def of_kept_layers(self, schedule: ScheduleLike) -> ModelConfig:
        """Return the config of the model that consists of the layers that a schedule keeps.

        `schedule` is relative to the layers of this config; the kept ones make as many corrections
        as it says (`iiet.iiad.left_out`).

        Raises:
            ValueError: the schedule does not fit the number of layers, or the method.
        """
        schedule = IterationSchedule.parse(schedule, num_layers=self.num_layers)
        of_kept_layers = schedule.of_kept_layers()
        changes: dict[str, Any] = {
            "num_layers": schedule.num_kept_layers, "schedule": of_kept_layers
        }  # fmt: skip
        if self.schedule is None and not of_kept_layers.num_corrections:
            changes["schedule"] = None
        for name in ("rotary_layers", "sliding_windows"):  # A value for each layer.
            values = getattr(self, name)
            if values is not None:
                changes[name] = tuple(values[layer] for layer in schedule.kept_layers)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: the schedule as a list or None, options without their defaults."""
        values = asdict(self)
        values["schedule"] = list(self.schedule) if self.schedule else None
        del values["method_options"]
        # Options of attention are left out at their defaults, so that a plain Llama's config, and
        # every key made of it, does not depend on how many options there are.
        if self.head_dim * self.num_heads == self.dim:
            del values["head_dim"]
        for name in ATTENTION_OPTIONS:
            if not values[name]:
                del values[name]
        if self.rope_scaling is not None:
            values["rope_scaling"] = self.rope_scaling.to_dict()
        for name in ("rotary_layers", "sliding_windows"):
            if name in values:
                values[name] = list(values[name])
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
        arguments = dict(values)
        method = arguments.get("method", cls.method)
        if isinstance(arguments.get("method_options"), Mapping) and method in METHODS:
            arguments["method_options"] = _parsed_options(method, arguments["method_options"])
        return cls(**arguments)


def _size_problems(config: ModelConfig) -> list[str]:
    problems: list[str] = []
    for field in fields(config):
        name = field.name
        value = getattr(config, field.name)
        if name == "head_dim" and value is None:
            continue  # It follows from sizes that are wrong themselves.
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
    is_usual_width = config.head_dim is None or config.head_dim * config.num_heads == config.dim
    if is_usual_width and config.dim % (2 * config.num_heads):
        problems.append(
            f"dim must be a multiple of twice num_heads ({2 * config.num_heads}, for the rotary "
            f"halves) where head_dim is not set, got {config.dim}"
        )
    elif config.head_dim % 2:
        problems.append(f"head_dim must be even, for the rotary halves, got {config.head_dim}")
    if config.num_heads % config.num_kv_heads:
        problems.append(
            f"num_kv_heads must divide num_heads ({config.num_heads}), got {config.num_kv_heads}"
        )
    return problems


def _layer_problems(config: ModelConfig) -> list[str]:
    """Describe what is wrong with the options that say something of the rotation or the layers."""
    problems: list[str] = []
    scaling: Any = config.rope_scaling
    if not isinstance(scaling, RopeScaling | None):
        problems.append(
            f"rope_scaling must be a mapping with a rope_type, or None, got {scaling!r}"
        )
    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "rotary_layers": ("true or false", lambda value: type(value) is bool),
        "sliding_windows": (
            "a number of tokens from 1, or None,",
            lambda value: value is None or is_integer_from(1, value),
        ),
    }
    for name, (description, is_allowed) in rules.items():
        values = getattr(config, name)
        if values is None:
            continue
        is_for_each = isinstance(values, tuple) and len(values) == config.num_layers
        if not is_for_each or not all(map(is_allowed, values)):
            problems.append(
                f"{name} must have {description} for each of {config.num_layers} layers, or be "
                f"None, got {values!r}"
            )
    return problems


def _parsed_options(method: str, values: Mapping[str, Any]) -> Any:
    options_type = facts_of(method).Options
    known = [field.name for field in fields(options_type)]
    unknown = [repr(name) for name in values if name not in known]
    if unknown:
        raise ValueError(
            f"invalid model config: method {method!r} has no option {', '.join(unknown)}; "
            f"its options: {', '.join(known) or 'none'}"
        )
    try:
        return options_type(**values)
    except ValueError as error:
        raise ValueError(f"invalid model config: method_options of {method!r}: {error}") from None


def _method_problems(config: ModelConfig) -> list[str]:
    schedule: Any = config.schedule
    if config.method not in METHODS:
        return [
            f"method must be one of {', '.join(METHODS)}, got {config.method!r}; a method of "
            "another package needs this package installed"
        ]
    method = facts_of(config.method)
    if not isinstance(config.method_options, method.Options | None):
        return [
            f"method_options must be a {method.Options.__name__} or None for method "
            f"{config.method!r}, got {config.method_options!r}"
        ]
    if not isinstance(schedule, IterationSchedule | None):
        return []  # It was not read, because the number of layers is wrong.
    return schedule_problems(config.method, method, schedule)


def schedule_problems(
    method: str, facts: MethodFacts, schedule: IterationSchedule | None
) -> list[str]:
    """Describe why a method, of which these are the facts, cannot run under a schedule."""
    if schedule is not None and schedule.left_out_layers:
        return [
            f"schedule {schedule} leaves layers out, which a model does not contain; make the "
            "smaller model with iiet.decoder_of_kept_layers, or its config with "
            "ModelConfig.of_kept_layers"
        ]
    if not facts.has_corrections:
        if schedule is None or not schedule.num_corrections:
            return []
        return [f"method {method!r} makes no corrections, got schedule {schedule}"]
    if schedule is None:
        return [
            f"schedule is required for method {method!r}; "
            "IterationSchedule.uniform(num_layers, 3) is usual"
        ]
    if facts.repeats_stack and len(set(schedule)) > 1:
        return [
            f"method {method!r} repeats the whole stack, so all layers must make the same number "
            f"of corrections, got schedule {schedule}"
        ]
    if facts.full_level is not None and max(schedule) > facts.full_level:
        return [
            f"method {method!r} has levels 0 to {facts.full_level} for each layer, got schedule "
            f"{schedule}"
        ]
    return []


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
        has_start = is_integer_from(0, self.start_step)
        first_end = self.start_step + 1 if has_start else 1
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
                "start_step must be an integer from 0": has_start,
                "end_step must be an integer above start_step, or None": (
                    self.end_step is None or is_integer_from(first_end, self.end_step)
                ),
            },
        )

    def uses_teacher(self, step: int) -> bool:
        """Whether the loss of this step, counted from 0, needs the teacher."""
        return step in self.steps_with_teacher(range(step, step + 1))

    def steps_with_teacher(self, steps: range) -> range:
        """Return those of consecutive steps whose loss needs the teacher."""
        if self.kl_weight == 0 and self.hidden_weight == 0:
            return range(0)
        end = steps.stop if self.end_step is None else min(steps.stop, self.end_step)
        return range(max(steps.start, self.start_step), end)

    def needs_hidden(self, step: int) -> bool:
        """Whether the loss of this step needs the hidden states of both models."""
        return self.uses_teacher(step) and self.hidden_weight > 0


def _sizes(
    num_layers: int, dim: int, ffn_dim: int, num_heads: int, **changed: Any
) -> dict[str, Any]:
    """Return sizes of a preset; vocabulary and context are the published ones unless changed."""
    sizes = {"num_layers": num_layers, "dim": dim, "ffn_dim": ffn_dim, "num_heads": num_heads}
    return {"vocab_size": 32000, "context_length": 2048, **sizes, **changed}


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
