"""The models that a sweep trains from scratch: their settings, and the plan of an iterations sweep.

A threshold sweep and a search train a teacher, vanilla and the model without corrections. An
iterations sweep trains methods and iteration counts, with learning rates and seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from iiet.config import PRESETS
from iiet.methods import METHODS
from orchestrator.settings import BASELINE_METHOD, DEFAULT_METHOD, ModelSettings, Settings
from orchestrator.terminal.render import format_count

TEACHER = "teacher"
T = TypeVar("T")


def model_label(method: str, corrections: object, num_layers: int | None = None) -> str:
    """Return the name of a model in tables.

    `vanilla` for a method without corrections, `r = 3` for the default method, else `other, r = 3`;
    with a number of layers `vanilla, 8 layers`.
    """
    parts = [method] if method != DEFAULT_METHOD else []
    if METHODS[method].has_corrections:
        parts.append(f"r = {corrections}")
    if num_layers is not None:
        parts.append(format_count(num_layers, "layer"))
    return ", ".join(parts)


def values_of_model(
    setting: Mapping[str, T | tuple[T, ...]], names: Iterable[str], *, default: T
) -> tuple[T, ...]:
    """Return what a setting by model holds for one: under the first of its names that is a key.

    Args:
        names: The model's label first, its method last.
    """
    found = next((setting[name] for name in names if name in setting), default)
    return found if isinstance(found, tuple) else (found,)


@dataclass(frozen=True, kw_only=True)
class ModelVariant:
    """What distinguishes a model from the others that a sweep trains from scratch."""

    method: str
    corrections: int | str | tuple[int, ...] | None = None
    """As in the settings; None for a method without corrections."""
    num_layers: int | None = None
    """Number of layers if it is not the settings' own."""
    learning_rate: float | None = None
    """One of several rates of the model; None if it has only one."""
    seed: int | None = None
    """One of several seeds of the sweep; None if it has none."""

    @property
    def name(self) -> str:
        """Name of the model: `vanilla`, `r = 3`, `vanilla, 8 layers`."""
        return model_label(self.method, self.corrections, self.num_layers)

    @property
    def keys(self) -> tuple[str, ...]:
        """Its names in the settings, the most specific one first."""
        return self.name, model_label(self.method, self.corrections), self.method

    @property
    def group(self) -> str:
        """Name with the learning rate; variants of one group are seeds of one model."""
        return self.name + (f", rate {self.learning_rate:g}" if self.learning_rate else "")

    @property
    def label(self) -> str:
        """Name with learning rate and seed, in tables and figures."""
        return self.group + ("" if self.seed is None else f", seed {self.seed}")


def swept_models(settings: Settings) -> Iterator[ModelVariant]:
    """Yield the methods, iteration counts and numbers of layers that a sweep trains."""
    for method in settings.sweep.methods:
        counts = settings.sweep.iterations if METHODS[method].has_corrections else (None,)
        for count in counts:
            yield from _at_each_depth(settings, ModelVariant(method=method, corrections=count))


def _at_each_depth(settings: Settings, model: ModelVariant) -> Iterator[ModelVariant]:
    shape = settings.model  # An unknown preset is refused where the model is built.
    own = shape.num_layers or PRESETS.get(shape.preset, {}).get("num_layers")
    for number in values_of_model(settings.sweep.num_layers, model.keys, default=own):
        yield replace(model, num_layers=None if number == own else number)


def swept_variants(settings: Settings) -> Iterator[ModelVariant]:
    """Yield the models that a sweep trains at each of their learning rates, under each seed."""
    for model in swept_models(settings):
        rates = learning_rates(settings, model)
        for rate in rates if len(rates) > 1 else (None,):
            for seed in settings.sweep.seeds or (None,):
                yield replace(model, learning_rate=rate, seed=seed)


def learning_rates(settings: Settings, model: ModelVariant) -> tuple[float, ...]:
    """Return the learning rates of a model: its own, its method's, else those of all."""
    usual = settings.training.learning_rate
    return values_of_model(settings.sweep.learning_rates, model.keys, default=usual)


def settings_of(settings: Settings, variant: ModelVariant) -> Settings:
    """Return the settings of a variant, at its learning rate, or else its model's first one."""
    changes: dict[str, Any] = {"method": variant.method}
    if variant.corrections is not None:
        changes["corrections"] = variant.corrections
    if variant.num_layers is not None:
        changes["num_layers"] = variant.num_layers
    if variant.method != settings.model.method:
        changes["method_options"] = {}
    model = ModelSettings.model_validate({**settings.model.model_dump(), **changes})
    rate = variant.learning_rate or learning_rates(settings, variant)[0]
    recipe: dict[str, Any] = {"learning_rate": rate}
    if variant.corrections in (None, 0, "0"):  # There is no cheaper schedule.
        recipe["elastic"] = None
    if variant.seed is not None:
        recipe["seed"] = variant.seed
    training = settings.training.model_copy(update=recipe)
    return settings.model_copy(update={"model": model, "training": training})


def teacher_and_baselines(settings: Settings) -> dict[str, Settings]:
    """Return the settings of the teacher and the baselines that a sweep trains."""
    model = settings.model
    teacher = ModelVariant(method=model.method, corrections=model.corrections)
    baselines = baseline_models(settings)
    named = {TEACHER: teacher, **{baseline.name: baseline for baseline in baselines}}
    return {name: settings_of(settings, variant) for name, variant in named.items()}


def baseline_models(settings: Settings) -> list[ModelVariant]:
    """Return the baselines of the settings' teacher, each at its numbers of layers."""
    usual = ModelVariant(method=BASELINE_METHOD)
    none = ModelVariant(method=settings.model.method, corrections=0)
    return [model for one in (usual, none) for model in _at_each_depth(settings, one)]
