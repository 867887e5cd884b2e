"""What the depth study knows of an arm, how checkpoints are read, and the page of results.

A reading is loss and accuracy on validation sequences, at all positions with an answer. Each
checkpoint is read as it was trained; one whose method has corrections also without them, with one
more, and with twice as many. The page has verdicts, a picture, one row per arm, learning rates,
readings, and what a correction is worth.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import altair
from correction_worth import MeasuredModel, correction_worth, worth_cells
from depth_rules import RULES, VARIANTS, Arm, Choices, Measured, vanilla_name, verdicts
from pydantic import Field

from iiet import Decoder
from iiet.cost import inference_cost
from iiet.model.schedule import IterationSchedule
from orchestrator import Settings, Trial
from orchestrator.data.store import PreparedData
from orchestrator.records.record import Record
from orchestrator.reporting.sections import bullets, markdown_table
from orchestrator.reporting.statistics import sum_of_means
from orchestrator.terminal.render import (
    format_duration,
    format_parameters,
    format_with_error,
    join_names,
)
from orchestrator.training.objective import validation_metrics
from orchestrator.training.world import World
from orchestrator.workspace.journal import ACCURACY_METRIC, VALIDATION_METRIC

NUM_SEQUENCES = 2048
"""Validation sequences of a reading."""
BATCH_SIZE = 128
"""Sequences in one forward pass; the readings do not depend on it, except for rounding."""
RATE_STEP = 2.0
"""Factor between a learning rate and the next one beyond the tried ones."""
LOSS = "quality/validation_loss"
ACCURACY = "quality/accuracy"


class Reading(Record):
    """Loss and accuracy of a checkpoint under one iteration schedule."""

    loss: float
    """Cross-entropy in nats per answer."""
    accuracy: float


class CheckpointReadings(Record):
    """Readings of one checkpoint, as they are stored."""

    own: Reading
    """As it was trained."""
    others: dict[int, Reading]
    """Other numbers of corrections, of every layer -> reading; empty if the method has none."""


class SeedResult(Record):
    """An arm at its best rate under one seed."""

    readings: CheckpointReadings
    heldout_accuracy: float | None
    """On the items of the evaluation."""
    seconds: float
    """Of the training."""


class ArmResult(Record):
    """A finished arm."""

    name: str
    key: str
    """Of all trials that the arm may need; results of other settings have another key."""
    num_layers: int
    evaluations: float
    """Field evaluations per token (NFE)."""
    num_parameters: int
    training_flops: float
    """Of one training."""
    losses_by_rate: dict[float, float]
    """Learning rate -> validation loss at the first seed."""
    mean_losses: dict[float, float]
    """Learning rate -> validation loss, mean over all seeds; for the best rates at the first
    seed."""
    best_rate: float
    """Rate with the lowest mean loss; it counts for all seeds."""
    seeds: dict[int, SeedResult]

    @property
    def has_inner_rate(self) -> bool:
        """Whether a lower and a higher rate than the best one were tried."""
        return min(self.losses_by_rate) < self.best_rate < max(self.losses_by_rate)

    @property
    def accuracies(self) -> dict[int, float]:
        """Accuracy as it was trained, by seed."""
        return {seed: result.readings.own.accuracy for seed, result in self.seeds.items()}

    @property
    def losses(self) -> dict[int, float]:
        """Loss as it was trained, by seed."""
        return {seed: result.readings.own.loss for seed, result in self.seeds.items()}

    @property
    def accuracy(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.accuracies.values())

    @property
    def model(self) -> MeasuredModel:
        """What is needed to say what its evaluations are worth in layers."""
        return MeasuredModel(
            num_layers=self.num_layers,
            evaluations_per_layer=self.evaluations / self.num_layers,
            losses=tuple(self.losses.values()),
            accuracy=self.accuracy,
        )

    def measured(self) -> Measured:
        """Return what the rules need."""
        others = {seed: one.readings.others for seed, one in self.seeds.items()}
        none = {seed: found[0].accuracy for seed, found in others.items() if 0 in found}
        return Measured(accuracies=self.accuracies, without_corrections=none)


def arm_result(
    arm: Arm,
    key: str,
    trials: Sequence[Trial],
    losses_by_rate: Mapping[float, float],
    mean_losses: Mapping[float, float],
    readings: Mapping[str, CheckpointReadings],
) -> ArmResult:
    """Put together what was measured.

    Args:
        trials: At the best rate, one for each seed.
        mean_losses: Of the rates that were tried under all seeds.
        readings: Key of a trial -> readings of its checkpoint.
    """
    cost = inference_cost(trials[0].model)
    return ArmResult(
        name=arm.name,
        key=key,
        num_layers=trials[0].model.num_layers,
        evaluations=cost.evaluations_per_token,
        num_parameters=cost.num_parameters,
        training_flops=trials[0].numbers.get("train/flops", 0.0),
        losses_by_rate=dict(losses_by_rate),
        mean_losses=dict(mean_losses),
        best_rate=rates_by_loss(mean_losses)[0],
        seeds={
            seed_of(trial): SeedResult(
                readings=readings[trial.key],
                heldout_accuracy=trial.numbers.get(ACCURACY),
                seconds=trial.numbers.get("train/seconds", 0.0),
            )
            for trial in trials
        },
    )


def rates_by_loss(losses: Mapping[float, float]) -> list[float]:
    """Return learning rates, that of the lowest loss first."""
    return sorted(losses, key=lambda rate: losses[rate])


def rate_of(trial: Trial) -> float:
    """Return the learning rate of a trial's training."""
    assert trial.job is not None
    return trial.job.recipe.learning_rate


def rate_beyond(losses: Mapping[float, float]) -> float | None:
    """Return a rate beyond the tried ones, on the side of the best; None if that is inside."""
    best = rates_by_loss(losses)[0]
    if len(losses) == 1 or min(losses) < best < max(losses):
        return None
    return best / RATE_STEP if best == min(losses) else best * RATE_STEP


def seed_of(trial: Trial) -> int:
    """Return the seed of a trial's training."""
    assert trial.job is not None
    return trial.job.recipe.seed


def other_corrections(corrections: int) -> list[int]:
    """Return the other numbers of corrections at which a model is read."""
    return sorted({0, corrections + 1, 2 * corrections} - {corrections})


def read_checkpoint(
    folder: Path, data: PreparedData, *, num_sequences: int = NUM_SEQUENCES
) -> CheckpointReadings:
    """Read a checkpoint under its own and, if its method has corrections, under other schedules."""
    decoder = Decoder.from_pretrained(folder)
    length = decoder.config.context_length
    layers = decoder.config.num_layers
    batches = [
        *data.validation_batches(
            context_length=length, num_tokens=num_sequences * length, batch_size=BATCH_SIZE
        )
    ]

    def reading(schedule: IterationSchedule) -> Reading:
        found = validation_metrics(decoder, batches, schedule, precision="fp32", world=World())
        return Reading(loss=found[VALIDATION_METRIC], accuracy=found[ACCURACY_METRIC])

    has_counts = decoder.method.facts.has_corrections and decoder.method.facts.full_level is None
    counts = other_corrections(max(decoder.schedule)) if has_counts else []
    others = {count: reading(IterationSchedule.uniform(layers, count)) for count in counts}
    return CheckpointReadings(own=reading(decoder.schedule), others=others)


def copying_accuracy(data: PreparedData, context_length: int) -> float:
    """Return how often the answer is the symbol at its own position, which needs no depth."""
    hits = total = 0
    for batch in data.validation_batches(
        context_length=context_length,
        num_tokens=NUM_SEQUENCES * context_length,
        batch_size=NUM_SEQUENCES,
    ):
        counted = batch.counted
        hits += int((batch.targets == batch.input_ids)[counted].sum())
        total += int(counted.sum())
    return hits / total


class StudyResults(Record):
    """The whole study, as `results.json` keeps it."""

    arms: dict[str, ArmResult] = Field(default_factory=dict)
    """Finished arms by name."""
    not_run: dict[str, str] = Field(default_factory=dict)
    """Other arms -> why they are not finished."""


def study_markdown(
    results: StudyResults, choices: Choices, settings: Settings, *, copied: float
) -> str:
    """Return the whole study as Markdown.

    Args:
        results: All that is known.
        choices: Which arms there are.
        settings: Of the study.
        copied: Accuracy of the symbol at the position itself as the answer.
    """
    arms = [*results.arms.values()]
    seeds = settings.sweep.seeds
    recipe = settings.training
    model = settings.model
    data = settings.data
    judged = verdicts(
        {name: arm.measured() for name, arm in results.arms.items()},
        layers=choices.layers,
        corrections=choices.corrections,
        seeds=seeds,
        variants=VARIANTS,
    )
    heads = (
        "arm", "layers", "NFE", "parameters", "rate", "accuracy %", "by seed", "loss",
        "held-out items %", "FLOPs of a training", "its time",
    )  # fmt: skip
    missing = [f"{name}: {reason}" for name, reason in results.not_run.items()]
    parts = [
        "# Depth study",
        f"Tasks: {', '.join(data.depth.tasks) or data.source}. Width {model.dim}, "
        f"{recipe.num_steps:,} steps of {recipe.num_tokens_per_step:,} tokens, seeds "
        f"{join_names([*map(str, seeds)])}. Accuracies and losses are those of all positions with "
        f"an answer in {NUM_SEQUENCES:,} validation sequences. There, the symbol at the position "
        f"itself is the answer in {copied:.1%}, which no depth is needed for.",
        "![Accuracy against NFE](accuracy.png)",
        "## Rules, fixed before the study ran",
        bullets(RULES),
        "## Verdicts",
        bullets(verdict.text for verdict in judged),
        "## Arms at their best learning rates",
        "± is the standard error over the seeds. Held-out items are those of the evaluation.",
        markdown_table(heads, map(_arm_cells, arms)),
        "## Learning rates: validation loss at the first seed",
        f"In brackets: the mean over all seeds, for the {choices.num_rates} best; the lowest of "
        "these decides.",
        _rate_table(arms),
        "## The same weights under other iteration schedules",
        "Accuracy in percent and loss, mean over the seeds; r is the number of corrections of "
        "every layer, or of repetitions.",
        _reading_table(arms),
        "## What a correction is worth",
        *_worth(arms),
        "## Arms that did not run",
        bullets(missing) if missing else "None.",
    ]
    return "\n\n".join(parts) + "\n"


def _arm_cells(arm: ArmResult) -> Sequence[str]:
    items = [one.heldout_accuracy for one in arm.seeds.values() if one.heldout_accuracy is not None]
    seconds = statistics.fmean(one.seconds for one in arm.seeds.values())
    return (
        arm.name,
        str(arm.num_layers),
        f"{arm.evaluations:g}",
        format_parameters(arm.num_parameters),
        f"{arm.best_rate:g}",
        _percent(arm.accuracies.values()),
        ", ".join(f"{100 * accuracy:.1f}" for accuracy in arm.accuracies.values()),
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
        own = [readings.own for readings in seeds]
        for count in seeds[0].others:
            cells = [arm.name, str(count)]
            for readings in ([each.others[count] for each in seeds], own):
                cells.append(_percent([reading.accuracy for reading in readings]))
                cells.append(_loss([reading.loss for reading in readings]))
            rows.append(cells)
    return markdown_table(heads, rows) if rows else "No arm has corrections."


def _worth(arms: Sequence[ArmResult]) -> Iterator[str]:
    """Say what evaluations are worth in layers; it needs vanilla models of two depths."""
    vanilla = [arm.model for arm in arms if arm.name == vanilla_name(arm.num_layers)]
    if len(vanilla) < 2:
        yield "Not known yet: it needs vanilla models of two depths."
        return
    yield (
        "phi = log(L'/L) / log(e), for a model of L layers with e evaluations per layer: 1 if an "
        "evaluation is worth a layer, 0 if more evaluations are worth nothing. L' is the smallest "
        "depth at which vanilla reaches the model's validation loss, interpolated linearly in the "
        "logarithm of depth. In brackets, the 95% interval over the seeds; a bound marked "
        "< or > lies beyond the vanilla depths. Published for loops over a stack: 0.46 (arXiv "
        "2604.21106)."
    )
    others = [arm for arm in arms if arm.name != vanilla_name(arm.num_layers)]
    worths = {arm.name: correction_worth(arm.model, vanilla) for arm in others}
    heads = ("model", "layers", "NFE/layer", "loss", "as vanilla of", "phi")
    rows = [worth_cells(arm.name, arm.model, worths[arm.name]) for arm in others]
    yield markdown_table(heads, rows)
    losses = ", ".join(f"{one.num_layers} layers {one.loss:.4g}" for one in vanilla)
    refused = [f"{name} has no phi: {w.refusal}." for name, w in worths.items() if w.refusal]
    yield bullets([f"Validation loss of vanilla: {losses}.", *refused])


def _percent(values: Collection[float]) -> str:
    return format_with_error(statistics.fmean(values), _error(values), is_percent=True)


def _loss(values: Collection[float]) -> str:
    """Return the mean with three digits, however small, and its error with one."""
    error = _error(values)
    return f"{statistics.fmean(values):.3g}" + (f" ± {error:.1g}" if error else "")


def _error(values: Collection[float]) -> float | None:
    """Return the standard error over the seeds; None for a single one."""
    return sum_of_means([list(values)]).error if len(values) > 1 else None


def accuracy_chart(arms: Sequence[ArmResult]) -> Any:
    """Return accuracy against NFE: one panel for each number of layers below the vanilla curve.

    Bars reach from the worst to the best seed.
    """
    others = [arm for arm in arms if arm.name != vanilla_name(arm.num_layers)]
    points = []
    for layers in sorted({arm.num_layers for arm in others}) or [arms[0].num_layers]:
        for arm in arms:
            is_vanilla = arm.name == vanilla_name(arm.num_layers)
            if arm.num_layers == layers or (is_vanilla and arm.num_layers > layers):
                name = arm.name.partition(f", {layers} layer")
                points.append(
                    {
                        "layers": layers,
                        "model": "vanilla, more layers"
                        if is_vanilla
                        else name[0] + name[2].strip("s"),
                        "NFE per token": arm.evaluations,
                        "accuracy %": 100 * arm.accuracy,
                        "low": 100 * min(arm.accuracies.values()),
                        "high": 100 * max(arm.accuracies.values()),
                    }
                )
    base = altair.Chart(altair.InlineData(values=points))
    costs = sorted({arm.evaluations for arm in arms})
    scale = altair.Scale(type="log", base=2, nice=False, padding=20)
    x = altair.X("NFE per token:Q", scale=scale, axis=altair.Axis(values=costs))
    y = altair.Y("accuracy %:Q", scale=altair.Scale(zero=False))
    bars = base.mark_rule().encode(
        x=x, y=altair.Y("low:Q", title="accuracy %"), y2="high:Q", color="model:N"
    )
    marks = base.mark_point(filled=True, size=60)
    marks = marks.encode(x=x, y=y, color="model:N", shape="model:N")
    layered = altair.layer(bars, marks)
    return layered.facet(column=altair.Column("layers:O", title="layers"))
