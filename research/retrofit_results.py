"""`python research/retrofit_results.py`: verdicts and tables of `retrofit.md`, from its JSON file.

In: the trainings that `retrofit_study.py` has stored. Out: the part of the page between its two
comments, written anew; a test compares. The rules are those of the page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from retrofit_study import (
    CONTINUED,
    DEPTH_ARMS,
    HOPS,
    RESULTS,
    RETROFITS,
    SCRATCH,
    SCRATCH_WITH_SOURCE,
    SEEDS,
    SOURCE,
    STUDENT_OF,
    STUDENT_SHARES,
    TEXT,
    TEXT_ARMS,
    Cell,
    Measured,
    Study,
    Training,
)

from orchestrator.reporting.sections import markdown_table
from orchestrator.reporting.statistics import Interval, sum_of_means
from orchestrator.workspace.files import write_text

PAGE = Path(__file__).with_name("retrofit.md")
BEGIN = "<!-- made by `python research/retrofit_results.py` -->"
END = "<!-- end -->"
LEAST_POINTS = 1.0
"""Points of accuracy that are worth a retrofit."""
LEAST_BITS = 0.005
"""The same in bits per byte."""
PAYS = "pays"
DOES_NOT_PAY = "does not pay"
NOT_DECIDED = "not decided"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How much better one arm is than another, over the seeds that both have."""

    values: Sequence[float]
    """One for each seed; positive is better."""

    @property
    def is_complete(self) -> bool:
        """Whether all seeds are there."""
        return len(self.values) == len(SEEDS)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.values)

    @property
    def interval(self) -> Interval:
        """The 95% interval over the seeds; it needs all of them."""
        assert self.is_complete
        return sum_of_means([self.values]).interval()

    def verdict(self, least: float) -> str:
        """Return whether it pays, where it must be at least `least`; empty without all seeds."""
        if not self.is_complete:
            return ""
        if self.interval.low > 0 and self.mean >= least:
            return PAYS
        return DOES_NOT_PAY if self.interval.high < least else NOT_DECIDED

    def kept(self, least: float) -> str:
        """Return whether a student keeps what its retrofit has; empty without all seeds."""
        if not self.is_complete:
            return ""
        if self.interval.low > -least:
            return "keeps"
        return "loses" if self.interval.high < -least else NOT_DECIDED

    def text(self, digits: int) -> str:
        """Return mean and interval; without all seeds the mean, and how many there are."""
        if not self.values:
            return ""
        mean = f"{self.mean:+.{digits}f}"
        if not self.is_complete:
            return f"{mean} ({len(self.values)} of {len(SEEDS)} seeds)"
        interval = self.interval
        return f"{mean} ({interval.low:+.{digits}f} to {interval.high:+.{digits}f})"


class Readings:
    """What is stored of a kind of cell, each arm at the rate that counts.

    Args:
        study: The stored trainings.
        task: `phop_5`, or `text`.
        num_layers: Layers of the source.
    """

    def __init__(self, study: Study, task: str, num_layers: int) -> None:
        self.study = study
        self.task = task
        self.num_layers = num_layers
        self.is_text = task == TEXT
        self.least = LEAST_BITS if self.is_text else LEAST_POINTS
        self.digits = 4 if self.is_text else 1

    @property
    def name(self) -> str:
        """Name for display."""
        if self.is_text:
            return f"text, {self.num_layers} layers"
        return f"{self.task.removeprefix('phop_')} hops, {self.num_layers} layers"

    def of_arm(self, arm: str) -> dict[int, Measured]:
        """Return seed -> result of an arm."""
        found = {}
        for seed in SEEDS:
            cell = Cell(task=self.task, num_layers=self.num_layers, seed=seed)
            rate = cell.recipe.source_rate
            if arm != SOURCE:
                rate = self.study.chosen_rate(cell, arm)
            training = Training(**vars(cell), arm=arm, rate=rate)
            if training in self.study.measured:
                found[seed] = self.study.measured[training]
        return found

    def students(self, arm: str, share: float) -> dict[int, Measured]:
        """Return seed -> the costliest student with at most this share of the evaluations."""
        found = {}
        for seed, retrofit in self.of_arm(arm).items():
            students = [
                result
                for training, result in self.study.measured.items()
                if training.arm == STUDENT_OF + arm
                and (training.task, training.num_layers) == (self.task, self.num_layers)
                and training.seed == seed
                and result.evaluations <= share * retrofit.evaluations
            ]
            if students:
                found[seed] = max(students, key=lambda student: student.evaluations)
        return found

    def quality(self, result: Measured) -> float:
        """Return points of accuracy, or bits per byte with their sign changed: more is better."""
        if result.accuracy is not None:
            return 100 * result.accuracy
        assert result.bits_per_byte is not None
        return -result.bits_per_byte

    def shown(self, results: dict[int, Measured]) -> str:
        """Return the quality of each seed, and their mean, as text."""
        if not results:
            return "not run"
        values = [abs(self.quality(result)) for result in results.values()]
        digits = 3 if self.is_text else 1
        parts = ", ".join(f"{value:.{digits}f}" for value in values)
        return f"{parts} (**{fmean(values):.{digits}f}**)"

    def difference(self, one: dict[int, Measured], other: dict[int, Measured]) -> Difference:
        """Return how much better one is than the other, over the seeds of both."""
        return Difference(
            values=[
                self.quality(one[seed]) - self.quality(other[seed]) for seed in one if seed in other
            ]
        )


def all_readings(study: Study) -> list[Readings]:
    """Return the readings of all kinds of cells: those of depth tasks, and at last the text's."""
    depth = [Readings(study, f"phop_{hops}", layers) for layers in (2, 4) for hops in HOPS]
    return [*depth, Readings(study, TEXT, 6)]


def results_markdown(study: Study) -> str:
    """Return all tables, and what has not run."""
    if not study.measured:
        return "No training has run yet."
    *depth, text = all_readings(study)
    parts = [
        f"{len(study.measured)} trainings are stored. After the qualities by seed stands their "
        "mean.",
        "### Question 1: against the source, trained on with as many FLOPs",
        "Accuracy in percent; differences in points.",
        _compared(depth, DEPTH_ARMS),
        "Text, in bits per byte (less is better; a positive difference is a gain).",
        _compared([text], TEXT_ARMS),
        "### Questions 2 and 3: against the same IIET from random weights",
        _against_scratch(depth),
        "### Question 4: students",
        _students(depth),
        "### Which trainings are stored",
        "\n".join(f"- {line}" for line in _progress(study)),
        _overall(depth),
    ]
    return "\n\n".join(part for part in parts if part)


def _compared(readings: Sequence[Readings], arms: Sequence[str]) -> str:
    rows = []
    for reading in readings:
        if not reading.of_arm(SOURCE):
            rows.append([reading.name, "all", "", "", "", "not run", "", "nobody knows"])
        continued = reading.of_arm(CONTINUED)
        for arm in (SOURCE, *arms):
            results = reading.of_arm(arm)
            if not results:
                continue
            first = next(iter(results.values()))
            is_compared = arm in RETROFITS
            difference = reading.difference(results, continued)
            rows.append(
                [
                    reading.name,
                    f"`{arm}`",
                    str(first.evaluations),
                    f"{first.training_flops:.2e}",
                    f"{first.training.rate:g}",
                    reading.shown(results),
                    difference.text(reading.digits) if is_compared else "",
                    difference.verdict(reading.least) if is_compared else "",
                ]
            )
    heads = ["cell", "arm", "NFE", "training FLOPs", "rate", "by seed", "difference", "verdict"]
    return markdown_table(heads, rows, left_columns=(0, 1, 5, 7))


def _against_scratch(readings: Sequence[Readings]) -> str:
    rows = []
    for reading in readings:
        for arm in ("mean", "identity"):
            for other in (SCRATCH, SCRATCH_WITH_SOURCE):
                difference = reading.difference(reading.of_arm(arm), reading.of_arm(other))
                if difference.values:
                    rows.append(
                        [
                            reading.name,
                            f"`{arm}`",
                            f"`{other}`",
                            difference.text(reading.digits),
                            difference.verdict(reading.least),
                        ]
                    )
    heads = ["cell", "retrofit", "against", "difference", "verdict"]
    return markdown_table(heads, rows, left_columns=(0, 1, 2, 4)) if rows else "Not run."


def _students(readings: Sequence[Readings]) -> str:
    rows = []
    for reading in readings:
        continued = reading.of_arm(CONTINUED)
        for arm in RETROFITS:
            for share in STUDENT_SHARES:
                results = reading.students(arm, share)
                if not results:
                    continue
                of_retrofit = reading.difference(results, reading.of_arm(arm))
                of_continued = reading.difference(results, continued)
                schedules = (result.training.schedule for result in results.values())
                rows.append(
                    [
                        reading.name,
                        f"`{arm}`",
                        f"{100 * share:g} %",
                        "; ".join(schedules),
                        reading.shown(results),
                        of_retrofit.text(reading.digits),
                        of_retrofit.kept(reading.least),
                        of_continued.text(reading.digits),
                        of_continued.verdict(reading.least),
                    ]
                )
    heads = [
        "cell", "student of", "NFE at most", "schedules", "by seed", "minus retrofit", "verdict",
        "minus source continued", "verdict",
    ]  # fmt: skip
    return markdown_table(heads, rows, left_columns=(0, 1, 3, 4, 6, 8)) if rows else "Not run."


def _progress(study: Study) -> Iterator[str]:
    for layers in (2, 4):
        for kind, is_student in (("arms", False), ("students", True)):
            counts = []
            for hops in HOPS:
                stored = [
                    training
                    for training in study.measured
                    if (training.task, training.num_layers) == (f"phop_{hops}", layers)
                    and training.arm.startswith(STUDENT_OF) == is_student
                ]
                seeds = sorted({training.seed for training in stored})
                of_seeds = f" (seeds {', '.join(map(str, seeds))})" if seeds else ""
                counts.append(f"{hops} hops {len(stored)}{of_seeds}")
            yield f"{layers} layers, {kind}: {', '.join(counts)}"
    yield f"text: {sum(training.task == TEXT for training in study.measured)}"


def _overall(readings: Sequence[Readings]) -> str:
    """Return the sentence about all depth cells, once all have their verdicts."""
    lines = []
    for arm in RETROFITS:
        found = [
            reading.difference(reading.of_arm(arm), reading.of_arm(CONTINUED)).verdict(
                reading.least
            )
            for reading in readings
        ]
        if all(found):
            counts = ", ".join(
                f"{verdict} in {found.count(verdict)}"
                for verdict in (PAYS, DOES_NOT_PAY, NOT_DECIDED)
            )
            lines.append(f"Of the {len(readings)} depth cells, `{arm}` {counts}.")
    return " ".join(lines)


def filled(page: str, study: Study) -> str:
    """Return the page with its tables written anew."""
    return with_part(page, BEGIN, results_markdown(study))


def with_part(page: str, begin: str, part: str) -> str:
    """Return the page with another text between a comment that begins a part and the next end."""
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n\n{part}\n\n{END}{after}"


if __name__ == "__main__":
    results_file = Path(sys.argv[1]) if sys.argv[1:] else RESULTS
    if not results_file.is_file():
        sys.exit(f"there is no results file {results_file}")
    stored = Study(Path("unused"), results_file)
    write_text(PAGE, filled(PAGE.read_text("utf-8"), stored))
