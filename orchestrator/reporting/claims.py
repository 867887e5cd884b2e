"""The paper's five claims, of which a sweep shows those that its models answer.

1. IIET is better than vanilla of the same layers. 2. IIET is better than PCformer. 3. A student of
IIAD keeps the accuracy at less overhead. 4. The best student at vanilla's speed is better than
vanilla. 5. IIET keeps by distillation what PCformer loses.

The paper does not compare with r = 0, an IIET that was trained without corrections. Where a sweep
has it, it stands beside vanilla in claims 1 and 4: what beats vanilla and not r = 0 does not owe it
to the corrections. Students are distilled ones; controls of the distillation are none.

A claim holds if the 95% interval of a difference lies wholly above zero, and does not hold if it
lies wholly below; `statistics` says how intervals are made. Claim 3 is about how surely a student
keeps the accuracy. The best of several students looks better than it is, so claims 3 and 4 are
corrected for the number of students. Of several IIETs, the costliest stands for the method, and all
models that it is compared with have its shape.

Source: arXiv 2509.22463, abstract.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from orchestrator.records.metrics import (
    ACCURACY,
    DECODE_MS,
    METRICS,
    NFE,
    OVERHEAD_NFE,
    OVERHEADS,
    claim_name,
    interval_end_names,
)
from orchestrator.records.trial import SOURCE, SOURCE_CONTINUED, Trial
from orchestrator.reporting.front import Front, busy_machine, plain_rivals
from orchestrator.reporting.results import ModelResult, shape_of, teachers_of
from orchestrator.reporting.sections import Column, Section, Table, TableRow
from orchestrator.reporting.statistics import (
    INTERVAL_LEVEL,
    Interval,
    Scores,
    corrected,
)
from orchestrator.reporting.tables import confidence_text
from orchestrator.settings import BASELINE_METHOD, DEFAULT_METHOD, PCFORMER
from orchestrator.terminal.render import format_count

PAPER_OVERHEAD_SHARE = 0.45
PAPER_SHARE_OF_FULL = 0.994
"""The paper's headline: E-IIET has 55% less inference overhead, and 99.4% of IIET's accuracy."""
CONFIDENCE = 0.95
"""How sure a student must be to keep `PAPER_SHARE_OF_FULL` of the teacher's accuracy, corrected for
the number of students."""
COMPARABLE = 1.1
"""A student of comparable speed costs at most this many times vanilla's cost."""
TOO_SMALL = 1.2
"""Where a model without corrections takes more than this many times vanilla's time, the models are
too small: their time is not that of the large products."""
CLAIMS_TITLE = "The paper's claims"

Verdict = Literal["holds", "does not hold", "not decided"]
VERDICT_NUMBERS: dict[Verdict, int] = {"holds": 1, "not decided": 0, "does not hold": -1}
"""Verdict -> its number as a metric."""
EXPLANATION = (
    f"Differences of accuracies are in points, over the same items. Their {INTERVAL_LEVEL:.0%} "
    "intervals are over seeds and items, or over the items of one seed. A claim holds if the "
    "interval lies wholly above zero. It does not hold if the interval lies wholly below. r = 0 is "
    "an IIET that was trained without corrections; the paper does not compare with it. Claim 3 is "
    "about the share of the teacher's accuracy that a student with less overhead keeps. Overhead "
    "is cost beyond vanilla of the same shape, and exact. Claim 3 holds if a student keeps "
    f"{PAPER_SHARE_OF_FULL:.1%} with a confidence of {CONFIDENCE}, however much it saves. It does "
    "not hold if each keeps less with that confidence. Confidences of several students are "
    "corrected for their number by Holm's method. The interval of a student that was chosen among "
    "several is corrected by Bonferroni's method. So at most 5% of such claims are false."
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim of the paper, and what was measured."""

    number: int
    """The paper's claim that it belongs to."""
    key: str
    """Name of its metric."""
    text: str
    """The sentence in tables that the verdict answers."""
    paper: float | None
    """The paper's number: points of accuracy, or percent of overhead; None if there is none."""
    verdict: Verdict = "not decided"
    here: float = math.nan
    """What was measured, in the paper's unit."""
    low: float | None = None
    """Lower end of its 95% interval; None for an overhead, which is exact."""
    high: float | None = None
    """Upper end."""
    kept: float | None = None
    """For claim 3: share of the teacher's accuracy that is kept, in percent."""
    kept_low: float | None = None
    """Lower end of its 95% interval."""
    kept_high: float | None = None
    """Upper end."""
    over: str = ""
    """What the interval is over, as `Interval.over` says it."""
    about: str = ""
    """The models that are compared."""

    def judged(self, difference: Interval, about: str) -> Claim:
        """Return the claim with a difference of two shares, and the verdict that follows."""
        verdict: Verdict = "not decided"
        if difference.excludes_zero:
            verdict = "holds" if difference.low > 0 else "does not hold"
        return replace(
            self,
            verdict=verdict,
            here=100 * difference.value,
            low=100 * difference.low,
            high=100 * difference.high,
            over=difference.over,
            about=about,
        )


CLAIMS = (
    Claim(number=1, key="iiet_over_vanilla", text="IIET beats vanilla", paper=2.65),
    Claim(number=1, key="iiet_over_r_0", text="IIET beats r = 0", paper=None),
    Claim(number=2, key="iiet_over_pcformer", text="IIET beats PCformer", paper=0.8),
    Claim(
        number=3,
        key="saved_overhead_nfe",
        text=f"keeps {PAPER_SHARE_OF_FULL:.1%} at less NFE",
        paper=55,
    ),
    Claim(
        number=3,
        key="saved_overhead_ms",
        text=f"keeps {PAPER_SHARE_OF_FULL:.1%} at less ms",
        paper=55,
    ),
    Claim(number=4, key="student_over_vanilla_nfe", text="beats vanilla at its NFE", paper=1.6),
    Claim(number=4, key="student_over_r_0_nfe", text="beats r = 0 at its NFE", paper=None),
    Claim(number=4, key="student_over_vanilla_ms", text="beats vanilla at its ms", paper=1.6),
    Claim(number=4, key="student_over_r_0_ms", text="beats r = 0 at its ms", paper=None),
    Claim(number=5, key="kept_over_pcformer", text="keeps more than PCformer", paper=None),
)
"""All claims, without what is measured of them; from the third on, they are of students."""


class _NotMeasured(Exception):
    """The models do not answer a claim."""


def find_claims(front: Front) -> list[Claim]:
    """Return the claims that the models of a front answer; none if their teacher has a source, as
    the claims are of models that do not.

    Args:
        front: One sweep, or several that were measured alike, from `with_confidence`.
    """
    if any(model.role in (SOURCE, SOURCE_CONTINUED) for model in front.placed):
        return []
    evidence = _Evidence(front)
    judges: dict[str, Callable[[Claim], Claim]] = {
        "iiet_over_vanilla": partial(evidence.iiet_over, evidence.vanilla),
        "iiet_over_r_0": partial(evidence.iiet_over, evidence.r_0),
        "iiet_over_pcformer": partial(evidence.iiet_over, evidence.pcformer),
        "saved_overhead_nfe": partial(evidence.saved_overhead, NFE),
        "saved_overhead_ms": partial(evidence.saved_overhead, DECODE_MS),
        "student_over_vanilla_nfe": partial(evidence.student_over, evidence.vanilla, NFE),
        "student_over_r_0_nfe": partial(evidence.student_over, evidence.r_0, NFE),
        "student_over_vanilla_ms": partial(evidence.student_over, evidence.vanilla, DECODE_MS),
        "student_over_r_0_ms": partial(evidence.student_over, evidence.r_0, DECODE_MS),
        "kept_over_pcformer": evidence.kept_over_pcformer,
    }
    answered_claims = []
    for claim in CLAIMS:
        with suppress(_NotMeasured):
            answered_claims.append(judges[claim.key](claim))
    return answered_claims


class _Evidence:
    """The models that claims compare, and their scores on the same items."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._teachers = teachers_of(front.models)
        """Key of a student -> key of its teacher."""
        self._models: Sequence[ModelResult] = front.models
        iiets = self._trained(DEFAULT_METHOD)
        shape = shape_of(iiets[-1].config) if iiets else None
        self._models = [model for model in self._models if shape_of(model.config) == shape]
        self.vanilla = self._costliest(BASELINE_METHOD, has_corrections=False)
        self.r_0 = self._costliest(DEFAULT_METHOD, has_corrections=False)
        self.iiet = self._costliest(DEFAULT_METHOD)
        self.pcformer = self._costliest(PCFORMER)

    def _trained(self, method: str, *, has_corrections: bool = True) -> list[ModelResult]:
        """Return the models of a method that were trained from scratch, the costliest last."""
        models = [
            model
            for model in self._models
            if model.trial.method == method
            and model.trial.parent is None
            and ((model.number(OVERHEAD_NFE) or 0) > 0) == has_corrections
        ]
        return sorted(models, key=lambda model: model.value(NFE))

    def _costliest(self, method: str, *, has_corrections: bool = True) -> ModelResult | None:
        models = self._trained(method, has_corrections=has_corrections)
        return models[-1] if models else None

    def _students(self, teacher: ModelResult) -> list[ModelResult]:
        """Return the students that were distilled from a teacher."""
        return [
            model
            for model in self._models
            if self._teachers.get(model.key) == teacher.key and _is_distilled(model.trial)
        ]

    def _check_times(self, cost: str) -> None:
        if cost == DECODE_MS and busy_machine(self._models):
            raise _NotMeasured

    def _scores(self, *models: ModelResult) -> tuple[Scores, list[int]]:
        """Return the accuracies of all models on the items that all answered, and which numbers
        these models have among them."""
        paired = self._front.paired
        number_of = paired.number_of if paired else {}
        scores = paired.quality(ACCURACY) if paired else None
        if scores is None or not number_of.keys() >= {model.key for model in models}:
            raise _NotMeasured
        return scores, [number_of[model.key] for model in models]

    def _check_gain(self, teacher: ModelResult) -> None:
        """Raise `_NotMeasured` if the teacher is no better than a model without corrections.

        A share of its accuracy then says nothing of what a student keeps."""
        paired = self._front.paired
        for model in plain_rivals(self._models, teacher):
            if paired is None or model.key not in paired.number_of:
                continue
            scores, (teacher_number, number) = self._scores(teacher, model)
            if scores.difference(teacher_number, number).interval().low <= 0:
                raise _NotMeasured

    def iiet_over(self, rival: ModelResult | None, claim: Claim) -> Claim:
        """Judge whether IIET is better than another model."""
        iiet = self.iiet
        if iiet is None or rival is None:
            raise _NotMeasured
        scores, (iiet_number, rival_number) = self._scores(iiet, rival)
        difference = scores.difference(iiet_number, rival_number).interval()
        return claim.judged(difference, f"{_described(iiet)} against {_described(rival)}")

    def saved_overhead(self, cost: str, claim: Claim) -> Claim:
        """Find the student that saves most of the overhead among those that keep the accuracy."""
        full = self.iiet
        overhead, overhead_share = OVERHEADS[cost]
        self._check_times(cost)
        if full is None or (full.number(overhead) or 0) <= 0:
            raise _NotMeasured
        cheaper = [model for model in self._students(full) if model.value(overhead_share) < 1]
        if not cheaper:
            raise _NotMeasured
        scores, [*numbers, number_of_full] = self._scores(*cheaper, full)
        self._check_gain(full)
        model_of = {model.key: model for model in cheaper}
        shares = {}
        confidences = {}
        for key, number in zip(model_of, numbers, strict=True):
            share = scores.share(number, number_of_full, num_comparisons=len(cheaper))
            if share is None:  # The teacher answers nothing right.
                raise _NotMeasured
            shares[key] = share
            confidences[key] = scores.confidence_keeps(number, number_of_full, PAPER_SHARE_OF_FULL)
        corrected_confidences = corrected(confidences)
        sure = [key for key in model_of if corrected_confidences[key] >= CONFIDENCE]
        verdict: Verdict = "not decided"
        if sure:
            verdict = "holds"
            shown = min(sure, key=lambda key: model_of[key].value(overhead_share))
        else:  # The likeliest is shown.
            shown = max(model_of, key=lambda key: confidences[key])
            # That none keeps it is as sure as the least sure of them is not to: no correction.
            if confidences[shown] <= 1 - CONFIDENCE:
                verdict = "does not hold"
        model = model_of[shown]
        share = shares[shown]
        return replace(
            claim,
            verdict=verdict,
            here=100 * (1 - model.value(overhead_share)),
            kept=100 * share.value,
            kept_low=100 * share.low,
            kept_high=100 * share.high,
            over=share.over,
            about=(
                f"{_described(model)} against {_described(full)}; overhead "
                f"{model.value(overhead):.3g} of {full.value(overhead):.3g} "
                f"{METRICS[overhead].unit}, {1 - model.value(overhead_share):.0%} less "
                f"(paper: {1 - PAPER_OVERHEAD_SHARE:.0%}); confidence "
                f"{confidence_text(corrected_confidences[shown])} that it keeps "
                f"{PAPER_SHARE_OF_FULL:.1%}, corrected for {format_count(len(cheaper), 'student')}"
            ),
        )

    def student_over(self, rival: ModelResult | None, cost: str, claim: Claim) -> Claim:
        """Judge whether the best student at the rival's cost is better than the rival."""
        self._check_times(cost)
        rival_cost = rival.number(cost) if rival else None
        if self.iiet is None or rival is None or rival_cost is None:
            raise _NotMeasured
        if cost == DECODE_MS:
            vanilla_time = self.vanilla and self.vanilla.number(DECODE_MS)
            plain_times = [
                model.number(DECODE_MS) or 0.0
                for model in self._models
                if model.trial.method == DEFAULT_METHOD and model.number(OVERHEAD_NFE) == 0
            ]
            if not vanilla_time or max(plain_times, default=0.0) > TOO_SMALL * vanilla_time:
                raise _NotMeasured
        students = [
            student
            for teacher in self._trained(DEFAULT_METHOD)
            for student in self._students(teacher)
            if student.value(cost) <= COMPARABLE * rival_cost
        ]
        if not students:
            raise _NotMeasured

        scores, [*numbers, rival_number] = self._scores(*students, rival)
        best = int(np.argmax(scores.observed[numbers]))
        difference = scores.difference(numbers[best], rival_number)
        time = students[best].number(DECODE_MS)
        rival_time = rival.number(DECODE_MS)
        ratio = f"; {time / rival_time:.2f} times its time" if time and rival_time else ""
        return claim.judged(
            difference.interval(num_comparisons=len(students)),
            f"{_described(students[best])} against {_described(rival)}{ratio}; the best of "
            f"{format_count(len(students), 'student')}, interval corrected for their number",
        )

    def kept_over_pcformer(self, claim: Claim) -> Claim:
        """Judge whether IIET's students keep more than PCformer's students that cost as much."""
        if self.iiet is None or self.pcformer is None:
            raise _NotMeasured
        pcformers = self._students_by_nfe_share(self.pcformer)
        # The IIET that can be compared most often; of equal ones the costliest.
        families = [
            self._students_by_nfe_share(teacher) for teacher in self._trained(DEFAULT_METHOD)
        ]
        iiets = max(families[::-1], key=lambda students: len(students.keys() & pcformers.keys()))
        nfe_shares = sorted(iiets.keys() & pcformers.keys(), reverse=True)
        if not nfe_shares:
            raise _NotMeasured
        iiet_pairs = [iiets[share] for share in nfe_shares]
        pcformer_pairs = [pcformers[share] for share in nfe_shares]
        recipes = {_recipe_of(student.trial) for student, _ in iiet_pairs + pcformer_pairs}
        if len(recipes) > 1:
            raise _NotMeasured
        scores, _ = self._scores(*(model for pair in iiet_pairs + pcformer_pairs for model in pair))
        iiet_share = self._mean_share(iiet_pairs)
        pcformer_share = self._mean_share(pcformer_pairs)
        # By the delta method: what a student's accuracy and its teacher's do to the mean share.
        weights: dict[int, float] = {}
        for sign, pairs in ((1, iiet_pairs), (-1, pcformer_pairs)):
            for student, teacher in pairs:
                _, (student_number, teacher_number) = self._scores(student, teacher)
                weight = sign / len(pairs) / scores.observed[teacher_number]
                share = scores.observed[student_number] / scores.observed[teacher_number]
                weights[student_number] = weights.get(student_number, 0.0) + weight
                weights[teacher_number] = weights.get(teacher_number, 0.0) - weight * share
        difference = replace(scores.weighted(weights), value=iiet_share - pcformer_share)
        percents = ", ".join(f"{share:.0%}" for share in nfe_shares)
        return claim.judged(
            difference.interval(),
            f"students of {iiet_pairs[0][1].label} keep {iiet_share:.1%}, of "
            f"{pcformer_pairs[0][1].label} {pcformer_share:.1%}, at {percents} of their "
            "teachers' NFE",
        )

    def _mean_share(self, pairs: Sequence[tuple[ModelResult, ModelResult]]) -> float:
        """Return the mean share that students keep of their teachers' accuracies."""
        shares = []
        for student, teacher in pairs:
            scores, (student_number, teacher_number) = self._scores(student, teacher)
            if not scores.observed[teacher_number]:
                raise _NotMeasured
            shares.append(scores.observed[student_number] / scores.observed[teacher_number])
        return float(np.mean(shares))

    def _students_by_nfe_share(
        self, teacher: ModelResult
    ) -> dict[float, tuple[ModelResult, ModelResult]]:
        """Return share of the teacher's evaluations -> the first student that costs it, and the
        teacher."""
        pairs: dict[float, tuple[ModelResult, ModelResult]] = {}
        for student in self._students(teacher):
            share = student.value(NFE) / teacher.value(NFE)
            if share < 1:
                pairs.setdefault(round(share, 9), (student, teacher))
        return pairs


def _is_distilled(trial: Trial) -> bool:
    """Whether a student learned from its teacher; a control of the distillation did not."""
    return trial.is_elastic or (trial.job is not None and trial.job.objective == "distill")


def _recipe_of(trial: Trial) -> str:
    """Return how a student was distilled, without its seed and its family of schedules."""
    if trial.job is None:  # Its weights are another trial's.
        return "elastic"
    recipe = trial.job.recipe.model_copy(update={"seed": 0, "elastic": None})
    return repr((trial.is_elastic, trial.job.objective, recipe, trial.job.distillation))


def _described(model: ModelResult) -> str:
    return f"{model.label} ({model.value(ACCURACY):.1%}, {model.value(NFE):g} NFE)"


# What reports show


def claims_section(claims: Sequence[Claim], title: str = "") -> Section:
    """Return the section on claims; `title` is the table's title on a terminal."""
    columns = (
        Column("claim (3 to 5: students)", is_text=True),
        Column("verdict", is_text=True),
        Column("paper"),
        Column("here"),
        Column(f"{INTERVAL_LEVEL:.0%} interval", is_text=True),
    )
    rows = [TableRow((f"{c.number} {c.text}", c.verdict, *_cells(c))) for c in claims]
    return Section(
        title=CLAIMS_TITLE,
        explanations=[EXPLANATION],
        tables=[Table(columns, rows, title)],
        notes=[f"{c.number} {c.text}: {c.about}." for c in claims],
        data={"claims": [asdict(c) for c in claims]},
    )


def _cells(claim: Claim) -> tuple[str, str, str]:
    """Return the paper's number, the number here, and its interval: of claim 3, what is kept."""
    if claim.kept is not None:
        interval = f"{claim.kept_low:.1f} to {claim.kept_high:.1f}%"
        return f"{PAPER_SHARE_OF_FULL:.1%}", f"{claim.kept:.1f}%", interval
    paper = "" if claim.paper is None else f"{claim.paper:+g}"
    return paper, f"{claim.here:+.1f}", f"{claim.low:+.1f} to {claim.high:+.1f}"


def claim_metrics(claims: Iterable[Claim]) -> dict[str, float]:
    """Return the metrics of a sweep's run: numbers, ends of intervals, and verdicts: 1 holds, 0 is
    not decided, -1 does not hold."""
    metrics: dict[str, float] = {}
    for claim in claims:
        name = claim_name(claim.key)
        metrics[name] = claim.here
        metrics[f"{name}_verdict"] = VERDICT_NUMBERS[claim.verdict]
        low_name, high_name = interval_end_names(name if claim.kept is None else f"{name}_kept")
        if claim.kept is None:
            ends = (claim.low, claim.high)
        else:
            metrics[f"{name}_kept"] = claim.kept
            ends = (claim.kept_low, claim.kept_high)
        for end_name, end in zip((low_name, high_name), ends, strict=True):
            if end is not None:
                metrics[end_name] = end
    return metrics
