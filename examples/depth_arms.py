"""The arms of the depth study: what is trained, in which order, at which learning rates.

An arm is a model with its training, apart from learning rate and seed. The order is that of
priority: first the arms that the rules need, for all numbers of layers; then vanilla models of
depths between; then options and other methods; last, more layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from orchestrator import Settings, SweepModel, UserError
from orchestrator.settings import BASELINE_METHOD, DEFAULT_METHOD, ElasticSettings
from orchestrator.sweeping.model_plans import ModelVariant, learning_rates, model_label, settings_of

LOOPED, PCFORMER = "looped", "pcformer"
TWO_STAGES, REINJECTED = ", two stages", ", prediction reinjected"
DAMPED, DRAWN = ", learned damping", ", schedules drawn"
VARIANTS = (TWO_STAGES, REINJECTED, DAMPED, DRAWN)
"""What the names of IIETs with another training or option have after that of the plain one."""


@dataclass(frozen=True, kw_only=True)
class Choices:
    """What is compared, beside the settings."""

    layers: tuple[int, ...] = (2, 1)
    """Numbers of layers with all arms."""
    more_layers: tuple[int, ...] = (4,)
    """Numbers of layers with vanilla and looped models only."""
    corrections: tuple[int, ...] = (1, 3)
    """Numbers of corrections; the last one is that of the variants."""
    vanilla_between: tuple[int, ...] = (3,)
    """Further depths of vanilla models, which place the others more exactly."""
    num_rates: int = 2
    """Best learning rates of the first seed that are tried under all seeds. With one, a rate that
    happens to suit the first seed decides an arm."""
    two_stages_from: float = 0.5
    """Share of the steps without corrections in the arm with two stages."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model with its training, apart from learning rate and seed."""

    name: str
    settings: Settings
    rates: tuple[float, ...]
    """Learning rates to try at the first seed, ascending."""

    @property
    def slug(self) -> str:
        """The name as a part of file names: `r-3-2-layers`."""
        kept = (c if c.isalnum() else " " for c in self.name)
        return "-".join("".join(kept).split())

    def model(self, *, rate: float, seed: int) -> SweepModel:
        """Return the model as a sweep trains it."""
        changes = {"learning_rate": rate, "seed": seed}
        training = self.settings.training.model_copy(update=changes)
        return SweepModel(
            label=f"{self.name}, rate {rate:g}, seed {seed}",
            settings=self.settings.model_copy(update={"training": training}),
            group=f"{self.name}, rate {rate:g}",
        )


def vanilla_name(num_layers: int) -> str:
    """Return the name of a vanilla model."""
    return model_label(BASELINE_METHOD, None, num_layers)


def iiet_name(corrections: int, num_layers: int) -> str:
    """Return the name of an IIET without options."""
    return model_label(DEFAULT_METHOD, corrections, num_layers)


def looped_name(corrections: int, num_layers: int) -> str:
    """Return the name of a model whose stack of layers is repeated."""
    return model_label(LOOPED, corrections, num_layers)


def pcformer_name(num_layers: int) -> str:
    """Return the name of a PCformer."""
    return model_label(PCFORMER, None, num_layers)


def study_arms(settings: Settings, choices: Choices) -> list[Arm]:
    """Return all arms in the order of priority; one that several parts need comes once."""
    arms = [arm for layers in choices.layers for arm in _deciding_arms(settings, choices, layers)]
    arms += [_vanilla(settings, layers) for layers in choices.vanilla_between]
    arms += [arm for layers in choices.layers for arm in _further_arms(settings, choices, layers)]
    for layers in choices.more_layers:
        arms += _vanilla_arms(settings, choices, layers)
        arms += [_looped(settings, r, layers) for r in choices.corrections]
    return list({arm.name: arm for arm in arms}.values())


def select_arms(arms: Sequence[Arm], patterns: Sequence[str]) -> list[Arm]:
    """Return the arms whose names match one of some patterns, all without patterns.

    Raises:
        UserError: If a pattern matches none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(arm.name, pattern) for arm in arms):
            names = "; ".join(arm.name for arm in arms)
            raise UserError(f"--arms: no arm has a name like {pattern!r}; there are: {names}")
    if not patterns:
        return list(arms)
    return [arm for arm in arms if any(fnmatchcase(arm.name, p) for p in patterns)]


def _deciding_arms(settings: Settings, choices: Choices, layers: int) -> Iterator[Arm]:
    yield from _vanilla_arms(settings, choices, layers)
    for r in (0, *choices.corrections):
        yield _iiet(settings, r, layers)
    stages = {"iterate_from_fraction": choices.two_stages_from}
    yield _iiet(settings, choices.corrections[-1], layers, TWO_STAGES, training=stages)
    for r in choices.corrections:
        yield _looped(settings, r, layers)


def _further_arms(settings: Settings, choices: Choices, layers: int) -> Iterator[Arm]:
    most = choices.corrections[-1]
    for suffix, options in (
        (REINJECTED, {"reinject_prediction": True}),
        (DAMPED, {"learn_damping": True}),
    ):
        yield _iiet(settings, most, layers, suffix, model={"method_options": options})
    yield _arm(settings, ModelVariant(method=PCFORMER, num_layers=layers))
    # One cheaper schedule a step with the full one's weight, and without a divergence.
    drawn = ElasticSettings(num_drawn=1, weight=1.0, kl_weight=0.0)
    yield _iiet(settings, most, layers, DRAWN, training={"elastic": drawn})


def _vanilla_arms(settings: Settings, choices: Choices, layers: int) -> Iterator[Arm]:
    for evaluations in (1, *(1 + r for r in choices.corrections)):
        yield _vanilla(settings, layers * evaluations)


def _vanilla(settings: Settings, layers: int) -> Arm:
    return _arm(settings, ModelVariant(method=BASELINE_METHOD, num_layers=layers))


def _looped(settings: Settings, corrections: int, layers: int) -> Arm:
    variant = ModelVariant(method=LOOPED, corrections=corrections, num_layers=layers)
    return _arm(settings, variant)


def _iiet(
    settings: Settings, corrections: int, layers: int, suffix: str = "", **sections: dict[str, Any]
) -> Arm:
    """Return an IIET; `sections` are changes of the settings, by section."""
    changed = {
        name: getattr(settings, name).model_copy(update=changes)
        for name, changes in sections.items()
    }
    variant = ModelVariant(method=DEFAULT_METHOD, corrections=corrections, num_layers=layers)
    return _arm(settings.model_copy(update=changed), variant, suffix)


def _arm(settings: Settings, variant: ModelVariant, suffix: str = "") -> Arm:
    return Arm(
        name=variant.name + suffix,
        settings=settings_of(settings, variant),
        rates=tuple(sorted(learning_rates(settings, variant))),
    )
