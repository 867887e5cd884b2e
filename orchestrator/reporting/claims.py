"""The paper's five claims, of which a sweep shows those that its models answer.

1. IIET is better than vanilla of the same layers. 2. IIET is better than PCformer. 3. A student of
IIAD keeps the accuracy at less overhead. 4. The best student at vanilla's speed is better than
vanilla. 5. IIET keeps by distillation what PCformer loses.

The paper does not compare with r = 0, an IIET that was trained without corrections. Where a sweep
has it, it stands beside vanilla in claims 1 and 4: what beats vanilla and not r = 0 does not owe it
to the corrections. Students are distilled ones; controls of the distillation are none.

A claim holds if the 95% interval of a difference lies wholly above zero, and does not hold if it
lies wholly below; `statistics` draws the items, and the seeds of models that have several. Claim 3
is about how surely a student keeps the accuracy. Claim 4 chooses a student by one half of the items
and judges it by the other: the best of several looks better than it is. Of several IIETs, the
costliest stands for the method, and all models that it is compared with have its shape.

Source: arXiv 2509.22463, abstract.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Literal
from zlib import crc32

import numpy as np

from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.records.trial import SOURCE, SOURCE_CONTINUED, Trial
from orchestrator.reporting.front import Front, Row, busy_machine, known, plain_rivals
from orchestrator.reporting.results import shape_of, teachers_of
from orchestrator.reporting.sections import Column, Section, Table, TableRow
from orchestrator.reporting.statistics import (
    Floats,
    Interval,
    PairedScores,
    Scores,
    interval_of,
    pair_scores,
)
from orchestrator.reporting.tables import difference_text
from orchestrator.settings import BASELINE_METHOD, DEFAULT_METHOD, PCFORMER
from orchestrator.terminal.metrics import (
    ACCURACY,
    DECODE_MS,
    METRICS,
    NFE,
    OVERHEAD_NFE,
    OVERHEADS,
    claim_name,
    interval_end_names,
)

PAPER_OVERHEAD_SHARE = 0.45
PAPER_SHARE_OF_FULL = 0.994
"""The paper's headline: E-IIET has 55% less inference overhead, and 99.4% of IIET's accuracy."""
CONFIDENCE = 0.95
"""How sure a student must be to keep `PAPER_SHARE_OF_FULL` of the teacher's accuracy."""
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
    "Differences of accuracies are in points, with their 95% intervals over the same items, and "
    "over seeds where models have several. A claim holds if the interval lies wholly above zero, "
    "and does not hold if it lies wholly below. r = 0 is an IIET that was trained without "
    "corrections, with which the paper does not compare. Overhead is cost beyond vanilla of the "
    "same shape; beside what is saved of it stands the interval of the share of the teacher's "
    f"accuracy that is kept; the claim holds if a student keeps {PAPER_SHARE_OF_FULL:.1%} with "
    f"a confidence of {CONFIDENCE}, however much it saves."
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
    low: float = math.nan
    """Lower end of the 95% interval; for claim 3, of the interval of the kept share, in percent."""
    high: float = math.nan
    """Upper end."""
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
    if any(row["role"] in (SOURCE, SOURCE_CONTINUED) for row in front.rows):
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
        self._teachers = teachers_of(front.table)
        """Key of a student -> key of its teacher."""
        self._rows: list[Row] = [*front.rows, *front.unmeasured]
        iiets = self._trained(DEFAULT_METHOD)
        shape = shape_of(iiets[-1]["trial"].model) if iiets else None
        self._rows = [row for row in self._rows if shape_of(row["trial"].model) == shape]
        self.vanilla = self._costliest(BASELINE_METHOD, has_corrections=False)
        self.r_0 = self._costliest(DEFAULT_METHOD, has_corrections=False)
        self.iiet = self._costliest(DEFAULT_METHOD)
        self.pcformer = self._costliest(PCFORMER)

    def _trained(self, method: str, *, has_corrections: bool = True) -> list[Row]:
        """Return the models of a method that were trained from scratch, the costliest last."""
        models = [
            row
            for row in self._rows
            if row["method"] == method
            and row["trial"].parent is None
            and ((known(row, OVERHEAD_NFE) or 0) > 0) == has_corrections
        ]
        return sorted(models, key=lambda row: row[NFE])

    def _costliest(self, method: str, *, has_corrections: bool = True) -> Row | None:
        models = self._trained(method, has_corrections=has_corrections)
        return models[-1] if models else None

    def _students(self, teacher: Row) -> list[Row]:
        """Return the students that were distilled from a teacher."""
        return [
            row
            for row in self._rows
            if self._teachers.get(row["key"]) == teacher["key"] and _is_distilled(row["trial"])
        ]

    def _check_times(self, cost: str) -> None:
        if cost == DECODE_MS and busy_machine(self._rows):
            raise _NotMeasured

    def _scores(self, *rows: Row, half: int | None = None) -> tuple[Scores, list[int]]:
        """Return the accuracies of all models on the items that all answered, and which numbers
        these models have among them.

        Args:
            half: 0 or 1 counts only one half of the items.
        """
        paired = self._front.paired if half is None else self._halves[half]
        number_of = paired.number_of if paired else {}
        scores = paired.quality(ACCURACY) if paired else None
        if scores is None or not number_of.keys() >= {row["key"] for row in rows}:
            raise _NotMeasured
        return scores, [number_of[row["key"]] for row in rows]

    @cached_property
    def _halves(self) -> list[PairedScores | None]:
        """The scores on those items whose hash is even, and on those whose hash is odd."""
        keys = {row["key"] for row in self._rows}
        paired = self._front.paired
        basis = self._front.basis
        if paired is None or basis is None:
            return [None, None]
        halves = []
        for half in (0, 1):
            evaluations = {
                key: [_half_of(run, half) for run in runs]
                for key, runs in paired.evaluations.items()
                if key in keys
            }
            halves.append(pair_scores(evaluations, num_resamples=basis.num_resamples))
        return halves

    def _shares_of_teacher(self, pairs: Sequence[tuple[Row, Row]]) -> list[tuple[Interval, Floats]]:
        """Return the share that each student keeps of its teacher's accuracy, and its draws.

        Args:
            pairs: Student and teacher.
        """
        paired = self._front.paired
        num_items = paired.num_items(ACCURACY) if paired else 0
        shares = []
        for student, teacher in pairs:
            scores, (student_number, teacher_number) = self._scores(student, teacher)
            share = scores.cautious_ratio(student_number, teacher_number, num_items=num_items)
            if share is None:  # In some draws of the items, the teacher answers none right.
                raise _NotMeasured
            shares.append(share)
        return shares

    def _check_gain(self, teacher: Row) -> None:
        """Raise `_NotMeasured` if the teacher is no better than a model without corrections.

        A share of its accuracy then says nothing of what a student keeps."""
        paired = self._front.paired
        for row in plain_rivals(self._rows, teacher):
            if paired is None or row["key"] not in paired.number_of:
                continue
            scores, (teacher_number, number) = self._scores(teacher, row)
            if scores.difference(teacher_number, number).low <= 0:
                raise _NotMeasured

    def iiet_over(self, rival: Row | None, claim: Claim) -> Claim:
        """Judge whether IIET is better than another model."""
        iiet = self.iiet
        if iiet is None or rival is None:
            raise _NotMeasured
        scores, (iiet_number, rival_number) = self._scores(iiet, rival)
        difference = scores.difference(iiet_number, rival_number)
        return claim.judged(difference, f"{_described(iiet)}; {_described(rival)}")

    def saved_overhead(self, cost: str, claim: Claim) -> Claim:
        """Find the student that saves most of the overhead among those that keep the accuracy."""
        full = self.iiet
        overhead, overhead_share = OVERHEADS[cost]
        self._check_times(cost)
        if full is None or (known(full, overhead) or 0) <= 0:
            raise _NotMeasured
        cheaper = [row for row in self._students(full) if row.get(overhead_share, math.nan) < 1]
        if not cheaper:
            raise _NotMeasured
        shares = self._shares_of_teacher([(row, full) for row in cheaper])
        self._check_gain(full)
        candidates = [
            (row, interval, float((draws >= PAPER_SHARE_OF_FULL).mean()))
            for row, (interval, draws) in zip(cheaper, shares, strict=True)
        ]
        sure = [candidate for candidate in candidates if candidate[2] >= CONFIDENCE]
        if sure:
            row, interval, confidence = min(
                sure, key=lambda candidate: candidate[0][overhead_share]
            )
        else:  # The likeliest is shown.
            row, interval, confidence = max(candidates, key=lambda candidate: candidate[2])
        verdict: Verdict = "not decided"
        if sure:
            verdict = "holds"
        elif confidence <= 1 - CONFIDENCE:
            verdict = "does not hold"
        return replace(
            claim,
            verdict=verdict,
            here=100 * (1 - row[overhead_share]),
            low=100 * interval.low,
            high=100 * interval.high,
            about=(
                f"{_described(row)} has {row[overhead]:.3g} of {full[overhead]:.3g} "
                f"{METRICS[overhead].unit} beyond vanilla; it keeps {PAPER_SHARE_OF_FULL:.1%} of "
                f"the accuracy of {_described(full)} in {confidence:.1%} of the draws"
            ),
        )

    def student_over(self, rival: Row | None, cost: str, claim: Claim) -> Claim:
        """Choose the best student at the rival's cost by one half of the items, and judge it by the
        other."""
        self._check_times(cost)
        rival_cost = known(rival, cost) if rival else None
        if self.iiet is None or rival is None or rival_cost is None:
            raise _NotMeasured
        if cost == DECODE_MS:
            vanilla_time = self.vanilla and known(self.vanilla, DECODE_MS)
            plain_times = [
                known(row, DECODE_MS) or 0.0
                for row in self._rows
                if row["method"] == DEFAULT_METHOD and known(row, OVERHEAD_NFE) == 0
            ]
            if not vanilla_time or max(plain_times, default=0.0) > TOO_SMALL * vanilla_time:
                raise _NotMeasured
        students = [
            student
            for teacher in self._trained(DEFAULT_METHOD)
            for student in self._students(teacher)
            if student[cost] <= COMPARABLE * rival_cost
        ]
        if not students:
            raise _NotMeasured

        # The rival's number is the last one. Both halves number the models alike.
        choosing_scores, numbers = self._scores(*students, rival, half=0)
        judging_scores, _ = self._scores(*students, rival, half=1)
        best = int(np.argmax(choosing_scores.observed[numbers[:-1]]))
        num_items = [half.num_items(ACCURACY) if half else 0 for half in self._halves]
        time = known(students[best], DECODE_MS)
        rival_time = known(rival, DECODE_MS)
        ratio = f" takes {time / rival_time:.2f} times its time" if time and rival_time else ""
        return claim.judged(
            judging_scores.difference(numbers[best], numbers[-1]),
            f"{_described(students[best])} beside {_described(rival)}{ratio}; it was chosen of "
            f"{len(students)} on {num_items[0]:,} items, and judged on {num_items[1]:,} others",
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
        recipes = {_recipe_of(student["trial"]) for student, _ in iiet_pairs + pcformer_pairs}
        if len(recipes) > 1:
            raise _NotMeasured
        iiet_share, iiet_draws = _mean_share(self._shares_of_teacher(iiet_pairs))
        pcformer_share, pcformer_draws = _mean_share(self._shares_of_teacher(pcformer_pairs))
        percents = ", ".join(f"{share:.0%}" for share in nfe_shares)
        return claim.judged(
            interval_of(iiet_share - pcformer_share, iiet_draws - pcformer_draws),
            f"students of {iiet_pairs[0][1]['label']} keep {iiet_share:.1%}, of "
            f"{pcformer_pairs[0][1]['label']} {pcformer_share:.1%}, at {percents} of their "
            "teachers' NFE",
        )

    def _students_by_nfe_share(self, teacher: Row) -> dict[float, tuple[Row, Row]]:
        """Return share of the teacher's evaluations -> the first student that costs it, and the
        teacher."""
        pairs: dict[float, tuple[Row, Row]] = {}
        for student in self._students(teacher):
            if student[NFE] < teacher[NFE]:
                pairs.setdefault(round(student[NFE] / teacher[NFE], 9), (student, teacher))
        return pairs


def _mean_share(shares: Sequence[tuple[Interval, Floats]]) -> tuple[float, Floats]:
    """Return the mean of shares of teachers' accuracies, as measured and in each draw."""
    observed = sum(interval.value for interval, _ in shares) / len(shares)
    drawn = sum(draws for _, draws in shares) / len(shares)
    return observed, np.asarray(drawn)


def _half_of(evaluation: EvaluationResult, half: int) -> EvaluationResult:
    """Return an evaluation with those items whose hash is even (0) or odd (1)."""

    def part(result: TaskResult) -> TaskResult:
        places = [n for n, item in enumerate(result.items) if crc32(item.encode()) % 2 == half]
        items = [result.items[n] for n in places]
        values = {name: [of_items[n] for n in places] for name, of_items in result.values.items()}
        return result.model_copy(update={"items": items, "values": values})

    results = {name: part(result) for name, result in evaluation.results.items()}
    return evaluation.model_copy(update={"results": results})


def _is_distilled(trial: Trial) -> bool:
    """Whether a student learned from its teacher; a control of the distillation did not."""
    return trial.is_elastic or (trial.job is not None and trial.job.objective == "distill")


def _recipe_of(trial: Trial) -> str:
    """Return how a student was distilled, without its seed and its family of schedules."""
    if trial.job is None:  # Its weights are another trial's.
        return "elastic"
    recipe = trial.job.recipe.model_copy(update={"seed": 0, "elastic": None})
    return repr((trial.is_elastic, trial.job.objective, recipe, trial.job.distillation))


def _described(row: Row) -> str:
    return f"{row['label']} ({row[ACCURACY]:.1%}, {row[NFE]:g} NFE)"


# What reports show


def claims_section(claims: Sequence[Claim], title: str = "") -> Section:
    """Return the section on claims; `title` is the table's title on a terminal."""
    columns = (
        Column("claim (3 to 5: students)", is_text=True),
        Column("verdict", is_text=True),
        Column("paper"),
        Column("here", is_text=True),
    )
    rows = [TableRow((f"{c.number} {c.text}", c.verdict, *_cells(c))) for c in claims]
    return Section(
        title=CLAIMS_TITLE,
        explanations=[EXPLANATION],
        tables=[Table(columns, rows, title)],
        notes=[f"{c.number} {c.text}: {c.about}." for c in claims],
        data={"claims": [asdict(c) for c in claims]},
    )


def _cells(claim: Claim) -> tuple[str, str]:
    """Return the paper's number, and the number here with its interval."""
    is_overhead = claim.number == 3
    if claim.paper is None:
        paper = ""
    else:
        paper = f"-{claim.paper:g}%" if is_overhead else f"{claim.paper:+g}"
    if is_overhead:
        return paper, f"{-claim.here:.0f}% ({claim.low:.1f} to {claim.high:.1f}% kept)"
    interval = Interval(claim.here / 100, claim.low / 100, claim.high / 100)
    return paper, difference_text(interval, is_percent=True)


def claim_metrics(claims: Iterable[Claim]) -> dict[str, float]:
    """Return the metrics of a sweep's run: numbers, ends of intervals, and verdicts: 1 holds, 0 is
    not decided, -1 does not hold."""
    metrics: dict[str, float] = {}
    for claim in claims:
        name = claim_name(claim.key)
        low_name, high_name = interval_end_names(name)
        metrics[name] = claim.here
        metrics[low_name] = claim.low
        metrics[high_name] = claim.high
        metrics[f"{name}_verdict"] = VERDICT_NUMBERS[claim.verdict]
    return metrics
