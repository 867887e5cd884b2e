"""The depth study in Markdown: verdicts, one row per arm, readings, what a correction is worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Sequence

from correction_worth import WORTH_TITLE, WorthRow, WorthSection, correction_worth
from depth_arms import VARIANTS, Choices, vanilla_name
from depth_results import NUM_SEQUENCES, ArmResult, Reading, StudyResults
from depth_rules import RULES, verdicts

from orchestrator import Settings
from orchestrator.reporting.markdown import bullets, markdown_table
from orchestrator.terminal.render import (
    format_count,
    format_duration,
    format_parameters,
    format_with_error,
    join_names,
)


def study_markdown(
    results: StudyResults,
    choices: Choices,
    settings: Settings,
    *,
    copied: float,
) -> str:
    """Return the whole study as Markdown.

    Args:
        copied: Accuracy of the symbol at the position itself as the answer.
    """
    arms = [*results.arms.values()]
    worth = _worth(arms)
    missing = [f"{name}: {reason}" for name, reason in results.not_run.items()]
    parts = [
        "# Depth study",
        _introduction(settings, copied),
        "![Accuracy against NFE](accuracy.png)",
        "Models of the same NFE stand side by side.",
        "## Rules, fixed before the study ran",
        bullets(RULES),
        "## Verdicts",
        bullets(_verdicts(results, choices, settings.sweep.seeds)),
        "## Arms at their best learning rates",
        "± is the standard error over the seeds. Held-out items are those of the evaluation.",
        _arm_table(arms),
        "## Learning rates: validation loss at the first seed",
        f"In brackets: the mean over all seeds, for the {choices.num_rates} best; the lowest of "
        "these decides.",
        _rate_table(arms),
        "## The same weights under other iteration schedules",
        "Accuracy in percent and loss, mean over the seeds; r is the number of corrections of "
        "every layer, or of repetitions.",
        _reading_table(arms),
        f"## {WORTH_TITLE}",
        worth.to_markdown() if worth else "Not known yet: it needs vanilla models of two depths.",
        "## Arms that did not run",
        bullets(missing) if missing else "None.",
    ]
    return "\n\n".join(parts) + "\n"


def arm_line(arm: ArmResult) -> str:
    """Return the result of an arm in one line."""
    seconds = sum(one.seconds for one in arm.seeds.values())
    return (
        f"{arm.name}: accuracy {_percent(arm.accuracies.values())} %, rate {arm.best_rate:g}, "
        f"{arm.evaluations:g} NFE, {format_duration(seconds)} for "
        f"{format_count(len(arm.seeds), 'seed')}"
    )


def _introduction(settings: Settings, copied: float) -> str:
    recipe, model, data = settings.training, settings.model, settings.data
    return (
        f"Tasks: {', '.join(data.depth.tasks) or data.source}. Width {model.dim}, "
        f"{recipe.num_steps:,} steps of {recipe.num_tokens_per_step:,} tokens, seeds "
        f"{join_names([*map(str, settings.sweep.seeds)])}. Accuracies and losses are those of all "
        f"positions with an answer in {NUM_SEQUENCES:,} validation sequences. There, the symbol at "
        f"the position itself is the answer in {copied:.1%}, which no depth is needed for."
    )


def _verdicts(results: StudyResults, choices: Choices, seeds: Sequence[int]) -> list[str]:
    found = verdicts(
        {name: arm.measured() for name, arm in results.arms.items()},
        layers=choices.layers,
        corrections=choices.corrections,
        seeds=seeds,
        variants=VARIANTS,
    )
    return [verdict.text for verdict in found]


def _arm_table(arms: Sequence[ArmResult]) -> str:
    heads = (
        "arm", "layers", "NFE", "parameters", "rate", "accuracy %", "by seed", "loss",
        "held-out items %", "FLOPs of a training", "its time",
    )  # fmt: skip
    return markdown_table(heads, map(_arm_cells, arms))


def _arm_cells(arm: ArmResult) -> Sequence[str]:
    by_seed = ", ".join(f"{100 * accuracy:.1f}" for accuracy in arm.accuracies.values())
    items = [one.heldout_accuracy for one in arm.seeds.values() if one.heldout_accuracy is not None]
    seconds = statistics.fmean(one.seconds for one in arm.seeds.values())
    return (
        arm.name,
        str(arm.num_layers),
        f"{arm.evaluations:g}",
        format_parameters(arm.num_parameters),
        f"{arm.best_rate:g}",
        _percent(arm.accuracies.values()),
        by_seed,
        _loss(arm.losses.values()),
        _percent(items) if items else "",
        f"{arm.training_flops:.1e}",
        format_duration(seconds),
    )


def _rate_table(arms: Sequence[ArmResult]) -> str:
    rates = sorted({rate for arm in arms for rate in arm.losses_by_rate})
    rows = [[arm.name, *_rate_cells(arm, rates)] for arm in arms]
    note = bullets(
        f"{arm.name}: the best rate is the lowest or the highest that was tried"
        for arm in arms
        if not arm.has_inner_rate
    )
    table = markdown_table(["arm", *(f"{rate:g}" for rate in rates)], rows)
    return f"{table}\n\n{note}" if note else table


def _rate_cells(arm: ArmResult, rates: Sequence[float]) -> Iterator[str]:
    for rate in rates:
        loss = arm.losses_by_rate.get(rate)
        text = "" if loss is None else f"{loss:.4g}"
        if rate in arm.mean_losses:
            text += f" ({arm.mean_losses[rate]:.3g})"
        yield f"**{text}**" if rate == arm.best_rate else text


def _reading_table(arms: Sequence[ArmResult]) -> str:
    heads = ("arm", "r", "accuracy %", "loss", "as trained: accuracy %", "loss")
    rows = []
    for arm in arms:
        seeds = [one.readings for one in arm.seeds.values()]
        own = _reading_cells([readings.own for readings in seeds])
        for count in seeds[0].others:
            other = _reading_cells([readings.others[count] for readings in seeds])
            rows.append([arm.name, str(count), *other, *own])
    return markdown_table(heads, rows) if rows else "No arm has corrections."


def _reading_cells(readings: Sequence[Reading]) -> tuple[str, str]:
    return (
        _percent([reading.accuracy for reading in readings]),
        _loss([reading.loss for reading in readings]),
    )


def _worth(arms: Sequence[ArmResult]) -> WorthSection | None:
    """Return what evaluations are worth in layers; None without vanilla models of two depths."""
    vanilla = {
        arm.num_layers: arm.model for arm in arms if arm.name == vanilla_name(arm.num_layers)
    }
    others = [arm for arm in arms if arm.name != vanilla_name(arm.num_layers)]
    if len(vanilla) < 2:
        return None
    rows = (
        WorthRow(
            name=arm.name,
            model=arm.model,
            worth=correction_worth(arm.model, [*vanilla.values()]),
        )
        for arm in others
    )
    return WorthSection(rows=tuple(rows), vanilla=(vanilla,))


def _percent(values: Collection[float]) -> str:
    return format_with_error(statistics.fmean(values), _error(values), is_percent=True)


def _loss(values: Collection[float]) -> str:
    """Return the mean with three digits, however small, and its error with one."""
    error = _error(values)
    return f"{statistics.fmean(values):.3g}" + (f" ± {error:.1g}" if error else "")


def _error(values: Collection[float]) -> float | None:
    """Return the standard error over the seeds; None for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
