"""The rules of the depth study, fixed before it ran: from accuracies to verdicts.

`RULES` states them. Accuracies are those on validation sequences, at all positions with an answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from depth_arms import iiet_name, looped_name, vanilla_name

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
        arms: Results by the names that `depth_arms` gives.
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
