"""What a front shows: a headline, and the facts behind it.

A model is called better or worse only where the 95% interval of the difference excludes zero. A
student that was chosen among several is compared by the interval of so many comparisons. Without
values of single items, the errors of both models are added, which gives a longer interval, so the
facts err on the careful side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.records.metrics import (
    CONFIDENCE_ON_FRONT,
    DECODE_MS,
    QUALITIES,
)
from orchestrator.records.trial import BASELINE_ROLES, SOURCE, SOURCE_CONTINUED
from orchestrator.reporting.front import Front, PlacedModel, busy_machine, plain_rivals
from orchestrator.reporting.statistics import (
    DEMANDED_SHARE,
    INTERVAL_LEVEL,
    POWER,
    Estimate,
    Interval,
    corrected,
)
from orchestrator.reporting.tables import BUSY_MARK, confidence_text, cost_text, quality_text
from orchestrator.terminal.render import join_names

HIGH_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Fact:
    """Something that a front shows, with its name."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.name}: {self.text}."


def findings(front: Front) -> list[str]:
    """Return the headline of a front, then its facts, a line for each."""
    full = front.full
    if full is None:
        text = nothing_placed(front)
        return [f"{text[0].upper()}{text[1:]}."]
    if front.axes.cost == DECODE_MS and (problem := busy_machine(front.placed)):
        return [f"Not measured: {problem}."]
    unbeaten = unbeaten_baselines(front)
    sentences = [_headline(front, full)]
    if unbeaten:
        sentences = _no_gain(front, full, unbeaten)
    facts = _facts(front, full, unbeaten)
    return list(dict.fromkeys([*sentences, *map(str, facts)]))


def _facts(front: Front, full: PlacedModel, unbeaten: Sequence[PlacedModel]) -> list[Fact]:
    """Return what the front shows: how sure it is, what it can tell, and other models to take.

    Args:
        unbeaten: The baselines that the teacher does not beat; see `unbeaten_baselines`.
    """
    cheaper = _cheapest_keeping_it(front)
    choice = cheaper or full
    rivals = plain_rivals(front.placed, full) if unbeaten else []
    if full.role == "teacher":
        rivals += [model for model in front.placed if model.role in (SOURCE, SOURCE_CONTINUED)]
    facts = [
        _against(front, full, rival) for rival in sorted(rivals, key=lambda model: model.label)
    ]
    # What is kept of a teacher that gains nothing is no success.
    if not unbeaten:
        facts += _how_sure(front, full)
    facts += _what_can_be_told(front)
    for name, pick in (("Knee of the front", "knee"), ("Best model", "best")):
        model = front.named_picks.get(pick)
        if model is not None and model is not cheaper and model is not full:
            text = _model_text(front, model, with_share=not unbeaten)
            facts.append(Fact(f"{name}, {model.label}", text))
    for model in front.placed:
        if model.role not in BASELINE_ROLES or model is choice:
            continue
        if choice is not full or model not in rivals:  # The teacher is compared with these above.
            facts.append(_against(front, model, choice))
        if beaten := front.members_beaten_by(model):
            labels = join_names([member.label for member in beaten])
            facts.append(Fact(f"On the front, {model.label} beats", labels))
    if front.unmeasured:
        names = join_names([model.trial.name for model in front.unmeasured])
        facts.append(Fact("Not on the front, as a measurement is missing", names))
    if problem := busy_machine(front.placed):
        facts.append(Fact(f"Times with {BUSY_MARK} decide nothing", problem))
    return facts


def _cheapest_keeping_it(front: Front) -> PlacedModel | None:
    """Return the cheapest model that keeps the demanded share, if it is not the full one."""
    cheapest = front.cheapest_keeping(DEMANDED_SHARE)
    return None if cheapest is front.full else cheapest


def _headline(front: Front, full: PlacedModel) -> str:
    """Return what a reader should take from the front, in one sentence."""
    name = front.axes.quality_metric.title.lower()
    quality = name if front.axes.quality_metric.is_percent else f"quality ({name})"
    cheaper = _cheapest_keeping_it(front)
    if cheaper is None:
        return f"No cheaper model keeps {DEMANDED_SHARE:.0%} of {_possessive(full)} {quality}."
    share = _share_text(front, cheaper)
    keeps = f"{cheaper.label} keeps {share} of {_possessive(full)} {quality}"
    sentence = f"{keeps} {_at_cost(front, cheaper)}"
    confidence = front.confidence_keeps(cheaper)
    if front.basis and confidence is not None and confidence < HIGH_CONFIDENCE:
        sentence += f", as far as {front.basis.num_items:,} items can tell"
    return f"{sentence}."


def _name(full: PlacedModel) -> str:
    return f"{'the ' if full.label == 'teacher' else ''}{full.label}"


def _possessive(full: PlacedModel) -> str:
    return f"{_name(full)}'s"


def _share_text(front: Front, model: PlacedModel) -> str:
    """Return how much of the full model's quality a model keeps, as the table of models says it."""
    return f"{front.share_of_full(model) or 0.0:.1%}".replace("100.0%", "100%")


def _at_cost(front: Front, model: PlacedModel) -> str:
    """Return a cost with the full model's: `at half of its cost (4 of 8 NFE)`."""
    assert front.full is not None
    metric = front.axes.cost_metric
    cost_share = model.cost / front.full.cost if front.full.cost else math.nan
    share = "half" if f"{cost_share:.0%}" == "50%" else f"{cost_share:.0%}"
    return f"at {share} of its {metric.noun or metric.title} ({_costs_text(front, model)})"


def _costs_text(front: Front, model: PlacedModel) -> str:
    """Return the costs of a model and of the full model: `4 of 8 NFE`."""
    assert front.full is not None
    costs = f"{cost_text(model.cost)} of {cost_text(front.full.cost)}"
    return f"{costs} {front.axes.cost_metric.unit}".rstrip()


def _how_sure(front: Front, full: PlacedModel) -> list[Fact]:
    """Return how sure it is that a model keeps the demanded share, and which model surely does; if
    none keeps it, which comes nearest."""
    cheaper_than_full = [
        model for model in front.placed if model.is_candidate and model.cost < full.cost
    ]
    model = _cheapest_keeping_it(front)
    if model is None:
        if not cheaper_than_full:
            return []
        nearest = max(cheaper_than_full, key=lambda model: front.share_of_full(model) or 0.0)
        share = f"{_share_text(front, nearest)} {_at_cost(front, nearest)}"
        return [Fact(f"Nearest, {nearest.label}", share)]

    confidence = front.confidence_keeps(model)
    if confidence is None:
        return []
    text = f"{confidence_text(confidence)} that it keeps {DEMANDED_SHARE:.0%}"
    if (on_front := model.number(CONFIDENCE_ON_FRONT)) is not None:
        text += f", {confidence_text(on_front)} that it is on the front"
    facts = [Fact(f"Confidence of {model.label}", text)]
    if confidence < HIGH_CONFIDENCE:
        confident = [
            model
            for model in cheaper_than_full
            if (front.confidence_keeps(model) or 0.0) >= HIGH_CONFIDENCE
        ]
        surest = "none is cheaper than the full model"
        if confident:
            surest = describe_model(front, min(confident, key=lambda model: model.cost))
        name = f"Cheapest that keeps {DEMANDED_SHARE:.0%} with a confidence of {HIGH_CONFIDENCE}"
        facts.append(Fact(f"{name} or more", surest))
    return facts


def describe_model(front: Front, model: PlacedModel, *, with_share: bool = True) -> str:
    """Return a model's name, quality, cost and confidence.

    Args:
        with_share: Say which share of the full model's quality it keeps, and how surely.
    """
    return f"{model.label} with {_model_text(front, model, with_share=with_share)}"


def _model_text(front: Front, model: PlacedModel, *, with_share: bool) -> str:
    full = front.full
    share = front.share_of_full(model)
    parts = [_quality(front, model)]
    if with_share and full is not None and share is not None and full.cost:
        interval = "" if model is full else _share_interval_text(front, model)
        parts.append(f"{share:.1%} of {_possessive(full)}{interval}")
    parts.append(_costs_text(front, model))
    confidence = front.confidence_keeps(model)
    if with_share and model is not full and confidence is not None:
        demanded = f"{100 * front.demanded_share:.4g}%"
        parts.append(f"confidence {confidence_text(confidence)} that it keeps {demanded}")
    return "; ".join(parts)


def _share_interval_text(front: Front, model: PlacedModel) -> str:
    """Return the interval of the share of the full model's quality, in parentheses; empty if it is
    not known."""
    pair = _numbers(front, model, front.full) if front.full else None
    if front.scores is None or pair is None:
        return ""
    # Of a loss, the full model's is the part, as in `Front.share_of_full`.
    part, whole = pair if front.axes.higher_is_better else pair[::-1]
    share = front.scores.share(part, whole, num_comparisons=_num_choices(front, model))
    if share is None:
        return ""
    # The share itself is over all items of the model, which then are others.
    left_out = " that all answered" if front.basis and front.basis.num_left_out else ""
    return (
        f" ({INTERVAL_LEVEL:.0%} interval {100 * share.low:.1f} to {100 * share.high:.1f}%, "
        f"{share.over}{left_out})"
    )


def _numbers(front: Front, model: PlacedModel, other: PlacedModel) -> tuple[int, int] | None:
    """Return the numbers of two models among the scores by item; None if one has none."""
    number_of = front.paired.number_of if front.paired else {}
    if model.key not in number_of or other.key not in number_of:
        return None
    return number_of[model.key], number_of[other.key]


def _num_choices(front: Front, *models: PlacedModel) -> int:
    """Return how many models those of a comparison were chosen from: all students if one of them is
    a student, else 1, as a teacher and its baselines are named before anything is measured."""
    full_key = front.full.key if front.full else ""
    students = {model.key for model in front.placed if model.is_candidate} - {full_key}
    return len(students) if any(model.key in students for model in models) else 1


def confidence_note(front: Front) -> list[str]:
    """Return the sentences on what intervals and confidences mean; none without any."""
    basis = front.basis
    if basis is None or not basis.num_items:
        return []
    over = "the items of one seed"
    covered = "They say nothing of other trainings."
    if basis.num_seeds > 1:
        over = "the seeds and items; for a model of one seed, over its items"
        covered = "They say nothing of other seeds of a model that has one."
    notes = [
        f"Intervals hold the truth in {INTERVAL_LEVEL:.0%} of such sweeps. They are over {over}.",
        f"All models answered {basis.num_items:,} items.",
    ]
    if basis.num_left_out:
        notes.append(f"{basis.num_left_out:,} items that only some answered are left out.")
    notes += [
        "A confidence is that of the one-sided interval that just says so.",
        f"Confidences of {basis.num_models} models are corrected for their number by Holm's "
        f"method. {covered}",
    ]
    return [" ".join(notes)]


def _what_can_be_told(front: Front) -> list[Fact]:
    """Return which differences a sweep can show, and the models that it does not tell from the full
    one; nothing without values of single items."""
    basis = front.basis
    if front.full is None or basis is None or basis.resolvable is None:
        return []
    full = _name(front.full)
    seeds = f" under {basis.num_seeds} seeds" if basis.num_seeds > 1 else ""
    size = _size_text(front, basis.resolvable)
    facts = [
        Fact(
            "Smallest difference that this sweep can show",
            f"{size} ({POWER:.0%} power, {INTERVAL_LEVEL:.0%} confidence)",
        ),
        Fact(
            "Items that all models answered",
            f"{basis.num_items:,}{seeds}; {full} and another model differ on "
            f"{basis.share_differing:.1%}",
        ),
    ]
    if tied := tied_with_full(front):
        names = join_names([model.label for model in tied])
        comparisons = f"{basis.num_models} comparisons, corrected by Holm's method"
        facts.append(Fact(f"Tied with {full}", f"{names} ({comparisons})"))
    return facts


def tied_with_full(front: Front) -> list[PlacedModel]:
    """Return the models that the items and seeds do not tell from the full one, corrected for the
    number of comparisons."""
    confidences = {}
    for model in front.placed:
        pair = _numbers(front, model, front.full) if front.full else None
        if front.scores is not None and pair is not None and model is not front.full:
            above = front.scores.difference(*pair).confidence_above()
            confidences[model.key] = 1 - 2 * min(above, 1 - above)
    differ = {key for key, sure in corrected(confidences).items() if sure >= INTERVAL_LEVEL}
    return [model for model in front.placed if model.key in confidences.keys() - differ]


def unbeaten_baselines(front: Front) -> list[PlacedModel]:
    """Return the baselines without corrections that the teacher does not beat by more than the
    noise; none without a teacher. They have its shape, and no longer training.

    Without values of single items, the noise of a difference is not known, and a baseline counts
    only if it was measured to be as good as the teacher.
    """
    teacher = front.full
    if teacher is None or teacher.role != "teacher":
        return []
    sign = 1 if front.axes.higher_is_better else -1
    unbeaten = []
    for model in plain_rivals(front.placed, teacher):
        interval = _difference(front, teacher, model)
        is_within_noise = front.paired is not None and not interval.excludes_zero
        if sign * interval.value <= 0 or is_within_noise:
            unbeaten.append(model)
    return unbeaten


def plain_choice(front: Front) -> PlacedModel | None:
    """Return the model without corrections to take, because the teacher gains nothing over it; None
    if it does. This is r = 0, else vanilla, which is another architecture."""
    unbeaten = unbeaten_baselines(front)
    same_method = [model for model in unbeaten if model.trial.schedule is not None]
    return max(same_method or unbeaten, key=lambda model: model.signed_quality, default=None)


def _no_gain(front: Front, teacher: PlacedModel, unbeaten: Sequence[PlacedModel]) -> list[str]:
    """Say that a teacher is not shown to be better than models without corrections, and what that
    means."""
    names = join_names([model.label for model in unbeaten])
    choice = plain_choice(front)
    assert choice is not None, "one is unbeaten"
    sentences = [
        f"No gain of {_name(teacher)} over {names} is shown: take {choice.label} "
        f"({_costs_text(front, choice)}).",
        f"A share of {_possessive(teacher)} quality says nothing of what a student keeps.",
    ]
    passing = [
        model.trial
        for model in front.placed
        if model.is_candidate and model.signed_quality > teacher.signed_quality
    ]
    if any(trial.job is not None and trial.job.initial_folder for trial in passing):
        sentences.append("Students that are better than the teacher had more training.")
    return [*sentences, "A longer training (training.num_steps) may change that."]


def _against(front: Front, model: PlacedModel, other: PlacedModel) -> Fact:
    """Compare two models over the same items, else by their separate errors."""
    interval = _difference(front, model, other)
    verdict = "no difference shown"
    if interval.excludes_zero:
        is_better = (interval.value > 0) == front.axes.higher_is_better
        verdict = "better" if is_better else "worse"
    name = f"{_name(model)} against {_name(other)}"
    if name.startswith("the "):
        name = name.capitalize()
    return Fact(name, f"{verdict}, {_difference_text(front, interval)}")


def _difference(front: Front, model: PlacedModel, other: PlacedModel) -> Interval:
    """Return a model's quality minus another's, over the same items if both have their values, else
    by their separate errors.

    Of a student, which was chosen for its quality, the interval is that of so many comparisons as
    there are students.
    """
    pair = _numbers(front, model, other)
    if front.scores is not None and pair is not None:
        difference = front.scores.difference(*pair)
    else:
        variance = (model.error or 0.0) ** 2 + (other.error or 0.0) ** 2
        num_seeds = min(len(model.seeds), len(other.seeds))
        difference = Estimate(
            model.quality - other.quality,
            seeds_variance=variance if num_seeds > 1 else 0.0,
            seeds_freedom=num_seeds - 1,
            items_variance=0.0 if num_seeds > 1 else variance,
            items_freedom=math.inf,
        )
    return difference.interval(num_comparisons=_num_choices(front, model, other))


def _size_text(front: Front, size: float) -> str:
    """Return the size of a difference of the front's quality: `2.6 points`."""
    if front.axes.quality_metric.is_percent:
        return f"{100 * size:.1f} points"
    return f"{size:.3f} {_unit_of_quality(front)}"


def _unit_of_quality(front: Front) -> str:
    return front.axes.quality_metric.title.lower()


def _difference_text(front: Front, interval: Interval) -> str:
    """Return a difference with its sign and its interval."""
    is_percent = front.axes.quality_metric.is_percent
    scale, unit, digits = (100, "points", 1) if is_percent else (1, _unit_of_quality(front), 3)
    return (
        f"{scale * interval.value:+.{digits}f} {unit} ({INTERVAL_LEVEL:.0%} interval "
        f"{scale * interval.low:.{digits}f} to {scale * interval.high:.{digits}f}, "
        f"{interval.over})"
    )


def better_baselines(front: Front, picked: PlacedModel) -> list[str]:
    """Return a clause on each baseline that is better than a model and costs no more."""
    clauses = []
    for model in front.placed:
        if model.role not in BASELINE_ROLES or model.cost > picked.cost:
            continue
        interval = _difference(front, model, picked)
        is_better = (interval.value > 0) == front.axes.higher_is_better
        has_noise = interval.low < interval.high  # Known, and so worth comparing with.
        if is_better and has_noise and interval.excludes_zero:
            clauses.append(
                f"{model.label} ({_quality(front, model)}) costs no more and is better, "
                f"{_difference_text(front, interval)}"
            )
    return clauses


def describe_pick(front: Front, picked: PlacedModel) -> str:
    """Return what a person should know of a picked model: its clause, the baselines that are better
    for as little, and which model to take if its teacher gains nothing."""
    unbeaten = unbeaten_baselines(front)
    clauses = [
        describe_model(front, picked, with_share=not unbeaten),
        *better_baselines(front, picked),
    ]
    if unbeaten:
        names = join_names([model.label for model in unbeaten])
        choice = plain_choice(front)
        advice = "" if choice is None or choice is picked else f": take {choice.label}"
        clauses.append(
            f"no gain of the teacher over {names} is shown, so a share of the teacher's quality "
            f"would say nothing{advice}"
        )
    return "; ".join(clauses)


def _quality(front: Front, model: PlacedModel) -> str:
    metric = front.axes.quality_metric
    return f"{metric.title.lower()} {quality_text(front, model)}{'%' if metric.is_percent else ''}"


def nothing_placed(front: Front) -> str:
    """Say what is measured of the models where none has both metrics."""
    qualities = [
        option
        for option, name in QUALITIES.items()
        if any(model.number(name) is not None for model in front.unmeasured)
    ]
    measured = "nothing of it is measured yet"
    if qualities:
        measured = f"it has {join_names(qualities)}"
    return f"no trial of this sweep has {front.axes.in_words}; {measured}"
