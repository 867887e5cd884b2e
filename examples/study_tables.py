"""A study in Markdown: one table per phase, and how the numbers relate to the paper's two claims.

Losses are compared seed by seed: models of one seed read the same batches, and IIETs share their
first stage, so differences vary far less than the losses. Accuracies are compared directly; the
report of each sweep has paired intervals.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from iiet.methods import METHODS
from orchestrator import Trial
from orchestrator.records.evaluation import STDERR_SUFFIX
from orchestrator.settings import BASELINE_METHOD
from orchestrator.sweeping.model_plans import model_label
from orchestrator.terminal.render import format_with_error

LOSS, BITS = "quality/validation_loss", "quality/bits_per_byte"
ACCURACY = "quality/accuracy"
_ERRORS = (
    "± is one standard error: over the items for models with one seed, over the items and the "
    "seeds together for models with several. Differences of losses are taken seed by seed, and "
    "their error is over the seeds."
)
PAPER_KEPT, PAPER_SAVED = 0.994, 0.55
"""The paper's headline: share of the accuracy kept, share of the inference overhead saved."""


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Results of the models trained from scratch."""

    by_rate: Mapping[str, Mapping[float, Trial]]
    """Model -> learning rate -> result, one seed; without rates that were stopped early."""
    best: Mapping[str, Trial]
    """Model -> its result of lowest validation loss."""
    tokens: Mapping[str, Trial]
    """Model -> result at its best rate and equal tokens, mean over seeds."""
    losses: Mapping[str, Mapping[int, float]]
    """Model -> seed -> validation loss at its best rate and equal tokens."""
    flops: Mapping[str, Trial]
    """Model -> result at its best rate and equal training FLOPs; empty without that phase."""


@dataclass(frozen=True, kw_only=True)
class Ways:
    """Results of students; a way is how they were chosen and trained."""

    teacher: Trial
    """The full model that all start from."""
    results: Mapping[str, Sequence[Trial]]
    """Way -> its sweep's results; the usual way first."""
    schedule_sweeps: Sequence[str]
    """Sweeps that choose schedules differently, the usual one first."""
    training_sweeps: Sequence[str]
    """Sweeps that train the same schedules differently, the usual one first."""


def losses_by_seed(results: Sequence[Trial]) -> dict[str, dict[int, float]]:
    """Return model -> seed -> validation loss; results without a seed are left out."""
    found: dict[str, dict[int, float]] = {}
    for result in results:
        if result.seed is not None and LOSS in result.numbers:
            found.setdefault(result.group or result.label, {})[result.seed] = result.numbers[LOSS]
    return found


def study_markdown(phases: Phases, ways: Ways, pictures: Sequence[Path]) -> str:
    """Return the whole study as Markdown; `pictures` are folders of reports with several fronts."""
    parts = ["# Study", "", _ERRORS, "", *(f"- {sentence}" for sentence in _claims(phases, ways))]
    parts += ["", "## Learning rates (validation loss, one seed)", "", *_rates(phases)]
    parts += ["", "## Equal tokens, each at its best rate", "", *_models(phases.tokens)]
    if phases.flops:
        parts += ["", "## Equal training FLOPs, one seed", "", *_models(phases.flops)]
    for name, title in ((LOSS, "validation loss"), (ACCURACY, "accuracy in percent")):
        parts += ["", f"## Students: {title} by NFE", "", *_pivot(ways, name)]
    parts += ["", "## Students: iteration schedules by NFE", "", *_pivot(ways, None)]
    parts += ["", *(f"Fronts over each other: {folder / 'front.html'}" for folder in pictures)]
    return "\n".join(parts) + "\n"


def _cost(result: Trial) -> float:
    """Return the NFE of a measured model."""
    return result.numbers["cost/evaluations"]


def _claims(phases: Phases, ways: Ways) -> Iterator[str]:
    against = [(name, BASELINE_METHOD) for name in phases.tokens]
    against += [
        (name, model_label(result.method, 0))
        for name, result in phases.tokens.items()
        if METHODS[result.method].has_corrections
    ]
    for name, other in against:
        if other in phases.tokens and name != other:
            yield f"{name} against {other} at equal tokens: {_difference(phases, name, other)}"
    usual = next(iter(ways.results))
    students = [r for r in ways.results[usual] if r.role == "trial"]
    teacher = next(r for r in ways.results[usual] if r.role == "teacher")
    least = len(teacher.schedule or ())
    overhead = _cost(teacher) - least
    within = [r for r in students if _cost(r) - least <= (1 - PAPER_SAVED) * overhead + 1e-9]
    if within and overhead and teacher.numbers[ACCURACY]:
        # By loss: the best of several accuracies on the same items would be biased upwards.
        best = min(within, key=lambda r: r.numbers[LOSS])
        share = best.numbers[ACCURACY] / teacher.numbers[ACCURACY]
        saved = 1 - (_cost(best) - least) / overhead
        yield (
            f"students with {PAPER_SAVED:.0%} less overhead: the one with the lowest loss, "
            f"{best.name}, saves {saved:.0%} of the corrections and keeps {share:.1%} of its "
            f"teacher's accuracy (the paper: {PAPER_KEPT:.1%}); loss {best.numbers[LOSS]:.3f} "
            f"against {teacher.numbers[LOSS]:.3f}"
        )


def _difference(phases: Phases, name: str, other: str) -> str:
    mine, theirs = phases.tokens[name], phases.tokens[other]
    loss = f"{mine.numbers[LOSS] - theirs.numbers[LOSS]:+.3f}"
    own, others = (phases.losses.get(each, {}) for each in (name, other))
    by_seed = [own[seed] - others[seed] for seed in own if seed in others]
    if len(by_seed) > 1:
        error = statistics.stdev(by_seed) / math.sqrt(len(by_seed))
        loss = f"{statistics.mean(by_seed):+.3f} ± {error:.3f}"
    accuracy = f"{100 * (mine.numbers[ACCURACY] - theirs.numbers[ACCURACY]):+.2f}"
    errors = [each.numbers.get(ACCURACY + STDERR_SUFFIX) for each in (mine, theirs)]
    known = [error for error in errors if error is not None]
    if len(known) == len(errors):  # Assumed independent.
        accuracy += f" ± {100 * math.hypot(*known):.2f}"
    return f"loss {loss}, accuracy {accuracy} points"


def _rates(phases: Phases) -> list[str]:
    rates = sorted({rate for own in phases.by_rate.values() for rate in own})
    rows = [["model", *(f"{rate:g}" for rate in rates)]]
    for name, own in phases.by_rate.items():
        least = min(result.numbers[LOSS] for result in own.values())
        cells = [f"{own[r].numbers[LOSS]:.3f}" if r in own else "" for r in rates]
        rows.append([name, *(f"**{c}**" if c == f"{least:.3f}" else c for c in cells)])
    return _table(rows)


def _models(models: Mapping[str, Trial]) -> list[str]:
    rows = [[
        "model", "NFE", "training FLOPs", "tokens", "validation loss", "bits per byte",
        "accuracy %", "seeds",
    ]]  # fmt: skip
    for name, result in models.items():
        rows.append(
            [
                name,
                f"{_cost(result):.0f}",
                f"{result.numbers['train/flops']:.2e}",
                f"{result.numbers['train/tokens']:,.0f}",
                _number(result, LOSS),
                _number(result, BITS),
                _number(result, ACCURACY),
                f"{result.numbers.get('train/seeds', 1):.0f}",
            ]
        )
    return _table(rows)


def _pivot(ways: Ways, name: str | None) -> list[str]:
    """Return one row per cost and one column per way: a number, or the schedule."""
    students = {
        way: {_cost(r): r for r in results if r.role == "trial"}
        for way, results in ways.results.items()
    }
    costs = sorted({cost for own in students.values() for cost in own}, reverse=True)
    rows = [["NFE", *students]]
    for cost in costs:
        cells = [_cell(own.get(cost), name) for own in students.values()]
        rows.append([f"{cost:.0f}", *cells])
    if name:
        teacher = next(r for r in next(iter(ways.results.values())) if r.role == "teacher")
        rows.append(["the teacher", _number(teacher, name), *[""] * (len(students) - 1)])
    return _table(rows)


def _cell(result: Trial | None, name: str | None) -> str:
    if result is None:
        return ""
    return result.schedule_text if name is None else _number(result, name, with_errors=False)


def _number(result: Trial, name: str, *, with_errors: bool = True) -> str:
    if name not in result.numbers:
        return ""
    error = result.numbers.get(name + STDERR_SUFFIX) if with_errors else None
    return format_with_error(result.numbers[name], error, is_percent=name == ACCURACY)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    lines = [f"| {' | '.join(head)} |", f"| --- {'| ---: ' * (len(head) - 1)}|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in body)]
