"""The arms of the depth study, and the rules that were fixed before it ran.

An arm is a model with its training, apart from learning rate and seed. The order is that of
priority: first the arms that the rules need, for all numbers of layers; then vanilla models of
depths between; then options and other methods; last, more layers. `RULES` states how accuracies
(on validation sequences, at all positions with an answer) become verdicts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

from orchestrator import Settings, UserError
from orchestrator.models.labels import seed_label, trained_label
from orchestrator.settings import BASELINE_METHOD, DEFAULT_METHOD, ElasticSettings
from orchestrator.sweeping.models import (
    ModelVariant,
    learning_rates,
    settings_of,
)

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

    def models(self, rates: Iterable[float], seeds: Iterable[int]) -> dict[str, Settings]:
        """Return the model at each rate and under each seed, as a sweep trains it, by label."""
        models = {}
        for rate, seed in product(rates, seeds):
            changes = {"learning_rate": rate, "seed": seed}
            training = self.settings.training.model_copy(update=changes)
            label = seed_label(f"{self.name}, rate {rate:g}", seed)
            models[label] = self.settings.model_copy(update={"training": training})
        return models


def vanilla_name(num_layers: int) -> str:
    """Return the name of a vanilla model."""
    return trained_label(BASELINE_METHOD, None, num_layers)


def iiet_name(corrections: int, num_layers: int) -> str:
    """Return the name of an IIET without options."""
    return trained_label(DEFAULT_METHOD, corrections, num_layers)


def looped_name(corrections: int, num_layers: int) -> str:
    """Return the name of a model whose stack of layers is repeated."""
    return trained_label(LOOPED, corrections, num_layers)


def study_arms(settings: Settings, choices: Choices) -> list[Arm]:
    """Return all arms in the order of priority; one that several parts need comes once."""
    arms = [arm for layers in choices.layers for arm in _deciding_arms(settings, choices, layers)]
    arms += [_arm(settings, BASELINE_METHOD, layers) for layers in choices.vanilla_between]
    arms += [arm for layers in choices.layers for arm in _further_arms(settings, choices, layers)]
    for layers in choices.more_layers:
        arms += _vanilla_arms(settings, choices, layers)
        arms += [_arm(settings, LOOPED, layers, r) for r in choices.corrections]
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
        yield _arm(settings, LOOPED, layers, r)


def _further_arms(settings: Settings, choices: Choices, layers: int) -> Iterator[Arm]:
    most = choices.corrections[-1]
    for suffix, options in (
        (REINJECTED, {"reinject_prediction": True}),
        (DAMPED, {"learn_damping": "scalar"}),
    ):
        yield _iiet(
            settings,
            most,
            layers,
            suffix,
            model={"method_options": options},
            training={"gate_rate_factor": 1.0},
        )
    yield _arm(settings, PCFORMER, layers)
    # One cheaper schedule a step with the full one's weight, and without a divergence.
    drawn = ElasticSettings(num_drawn=1, weight=1.0, kl_weight=0.0)
    yield _iiet(settings, most, layers, DRAWN, training={"elastic": drawn})


def _vanilla_arms(settings: Settings, choices: Choices, layers: int) -> Iterator[Arm]:
    for evaluations in (1, *(1 + r for r in choices.corrections)):
        yield _arm(settings, BASELINE_METHOD, layers * evaluations)


def _iiet(
    settings: Settings, corrections: int, layers: int, suffix: str = "", **sections: dict[str, Any]
) -> Arm:
    """Return an IIET; `sections` are changes of the settings, by section."""
    changed = {
        name: getattr(settings, name).model_copy(update=changes)
        for name, changes in sections.items()
    }
    changed_settings = settings.model_copy(update=changed)
    return _arm(changed_settings, DEFAULT_METHOD, layers, corrections, suffix)


def _arm(
    settings: Settings, method: str, layers: int, corrections: int | None = None, suffix: str = ""
) -> Arm:
    variant = ModelVariant(method=method, corrections=corrections, num_layers=layers)
    return Arm(
        name=variant.name + suffix,
        settings=settings_of(settings, variant),
        rates=tuple(sorted(learning_rates(settings, variant))),
    )


SHALLOW_BELOW = 0.8
"""Vanilla of L layers must be worse than this, or the task does not need the depth."""
LEAST_GAIN = 0.1
"""Corrections that pay gain more than this over r = 0."""
LEAST_SHARE = 0.5
"""Corrections that pay recover at least this share of the gap."""
AS_GOOD_WITHIN = 0.01
"""Accuracies that differ by no more than this are as good; the rules that were fixed say only "as
good"."""

RULES = (
    "The gap is the accuracy of vanilla with L (1 + r) layers minus that of vanilla with L layers, "
    f"where the latter is under {SHALLOW_BELOW:.0%}.",
    f"Iteration pays if r corrections exceed r = 0 by more than {100 * LEAST_GAIN:.0f} points, and "
    f"exceed vanilla with L layers by at least {LEAST_SHARE:.0%} of the gap. For repetitions of "
    "the whole stack, r = 0 is vanilla with L layers.",
    "Corrections are internalised if the same weights, read at r = 0, are as good: at most "
    f"{100 * AS_GOOD_WITHIN:.0f} point lower.",
    "The layer is the wrong unit of iteration if repetitions of the whole stack pay, and "
    "corrections of single layers do not.",
    "All of these must hold in every seed. Without all seeds of all arms nothing is decided.",
)

Accuracies = Mapping[int, float]
"""Seed -> accuracy."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the rules need of an arm."""

    accuracies: Accuracies
    """Under the iteration schedule of the training."""
    without_corrections: Accuracies
    """Of the same weights, read at r = 0; empty for methods without corrections."""


Arms = Mapping[str, Measured]
"""Name of an arm -> what was measured; arms that did not run are missing."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to one question; None if it cannot be decided."""

    question: str
    answer: bool | None
    reason: str

    @property
    def text(self) -> str:
        """Question, answer and reason as one sentence."""
        word = {True: "yes", False: "no", None: "cannot be decided"}[self.answer]
        return f"{self.question}: {word}; {self.reason}"


def verdicts(
    arms: Arms,
    *,
    layers: Sequence[int],
    corrections: Sequence[int],
    seeds: Sequence[int],
    variants: Sequence[str] = (),
) -> list[Verdict]:
    """Judge all questions.

    Args:
        arms: Results by the names of `study_arms`.
        layers: Numbers of layers that are judged.
        corrections: Numbers of corrections; the last one is that of the variants.
        seeds: All of these are needed.
        variants: What the names of IIETs with another training or option have after the name of the
            plain one; those that ran take the same test.
    """
    found: list[Verdict] = []
    for number in layers:
        most = corrections[-1]
        for r in corrections:
            found += _of_unit(arms, number, r, seeds)
        found.append(_internalised(arms, iiet_name(most, number), seeds))
        without = iiet_name(0, number)
        names = [iiet_name(most, number) + variant for variant in variants]
        for name in filter(arms.__contains__, names):
            found.append(_pays(arms, name, without, number, most, seeds))
    return found


def _of_unit(arms: Arms, layers: int, r: int, seeds: Sequence[int]) -> Iterator[Verdict]:
    """Yield whether corrections pay, whether repetitions pay, and whether the unit is wrong."""
    single = _pays(arms, iiet_name(r, layers), iiet_name(0, layers), layers, r, seeds)
    whole = _pays(arms, looped_name(r, layers), vanilla_name(layers), layers, r, seeds)
    yield single
    yield whole
    question = f"is the layer the wrong unit of iteration, {_at(layers, r)}"
    if single.answer or whole.answer is False:
        answer: bool | None = False
        reason = "corrections of single layers pay" if single.answer else "repetitions do not pay"
    elif single.answer is False and whole.answer:
        answer = True
        reason = "repetitions of the whole stack pay, and corrections of single layers do not"
    else:
        answer, reason = None, "the questions above are open"
    yield Verdict(question=question, answer=answer, reason=reason)


def _pays(
    arms: Arms, name: str, without: str, layers: int, r: int, seeds: Sequence[int]
) -> Verdict:
    """Return whether a model's corrections or repetitions pay.

    Args:
        name: The model with r corrections.
        without: The same with r = 0.
    """
    question = f"does iteration pay in {name!r}"
    shallow, deep = vanilla_name(layers), vanilla_name(layers * (1 + r))
    if missing := _missing(arms, (name, without, shallow, deep), seeds):
        return Verdict(question=question, answer=None, reason=missing)
    own, base, low, high = (arms[one].accuracies for one in (name, without, shallow, deep))
    if easy := [seed for seed in seeds if low[seed] >= SHALLOW_BELOW]:
        accuracies = ", ".join(f"{low[seed]:.1%} with seed {seed}" for seed in easy)
        reason = f"{shallow!r} is not under {SHALLOW_BELOW:.0%}: {accuracies}"
        return Verdict(question=question, answer=None, reason=reason)
    if flat := [seed for seed in seeds if high[seed] <= low[seed]]:
        reason = f"{deep!r} is no better than {shallow!r} with seeds {flat}, so there is no gap"
        return Verdict(question=question, answer=None, reason=reason)
    passed, parts = 0, []
    for seed in seeds:
        gain = own[seed] - base[seed]
        share = (own[seed] - low[seed]) / (high[seed] - low[seed])
        passed += gain > LEAST_GAIN and share >= LEAST_SHARE
        parts.append(
            f"seed {seed}: {own[seed]:.1%}, {100 * gain:+.1f} points over {without!r}, "
            f"{share:.0%} of the gap from {low[seed]:.1%} to {high[seed]:.1%}"
        )
    reason = f"in {passed} of {len(seeds)} seeds ({'; '.join(parts)})"
    return Verdict(question=question, answer=passed == len(seeds), reason=reason)


def _internalised(arms: Arms, name: str, seeds: Sequence[int]) -> Verdict:
    question = f"are the corrections of {name!r} internalised"
    if missing := _missing(arms, (name,), seeds):
        return Verdict(question=question, answer=None, reason=missing)
    full, none = arms[name].accuracies, arms[name].without_corrections
    if unread := [seed for seed in seeds if seed not in none]:
        reason = f"it was not read at r = 0 with seeds {unread}"
        return Verdict(question=question, answer=None, reason=reason)
    passed = [seed for seed in seeds if none[seed] >= full[seed] - AS_GOOD_WITHIN]
    parts = (f"seed {seed}: {none[seed]:.1%} instead of {full[seed]:.1%}" for seed in seeds)
    reason = (
        f"read at r = 0 it is as good in {len(passed)} of {len(seeds)} seeds ({'; '.join(parts)})"
    )
    return Verdict(question=question, answer=len(passed) == len(seeds), reason=reason)


def _missing(arms: Arms, names: Sequence[str], seeds: Sequence[int]) -> str:
    """Say which results are missing; empty if none is."""
    parts = []
    for name in dict.fromkeys(names):
        absent = [seed for seed in seeds if name not in arms or seed not in arms[name].accuracies]
        if len(absent) == len(seeds):
            parts.append(f"{name!r} is missing")
        elif absent:
            parts.append(f"{name!r} lacks seeds {absent}")
    return "; ".join(parts)


def _at(layers: int, r: int) -> str:
    return f"L = {layers}, r = {r}"
