"""What the depth study knows of an arm, and how checkpoints are read under other schedules.

A reading is loss and accuracy on validation sequences, at all positions with an answer. Each
checkpoint is read as it was trained; one whose method has corrections also without them, with one
more, and with twice as many.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from correction_worth import MeasuredModel
from depth_arms import Arm
from depth_rules import Measured
from pydantic import Field

from iiet import Decoder
from iiet.cost import inference_cost
from iiet.schedule import IterationSchedule
from orchestrator import Trial
from orchestrator.data.prepared import PreparedData
from orchestrator.records.record import Record
from orchestrator.training.distributed import World
from orchestrator.training.validation import validation_metrics
from orchestrator.workspace.journal import ACCURACY_METRIC, VALIDATION_METRIC

NUM_SEQUENCES = 2048
"""Validation sequences of a reading."""
BATCH_SIZE = 128
"""Sequences in one forward pass; the readings do not depend on it, except for rounding."""
RATE_STEP = 2.0
"""Factor between a learning rate and the next one beyond the tried ones."""
LOSS, ACCURACY = "quality/validation_loss", "quality/accuracy"


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
    decoder = Decoder.load(folder)
    length, layers = decoder.config.context_length, decoder.config.num_layers
    batches = [
        *data.validation_batches(
            context_length=length, num_tokens=num_sequences * length, batch_size=BATCH_SIZE
        )
    ]

    def reading(schedule: IterationSchedule) -> Reading:
        found = validation_metrics(decoder, batches, schedule, precision="fp32", world=World())
        return Reading(loss=found[VALIDATION_METRIC], accuracy=found[ACCURACY_METRIC])

    counts = other_corrections(max(decoder.schedule)) if decoder.method.has_corrections else []
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
    flops: float = 0.0
    """Training FLOPs of the sweeps that have ended."""
    seconds: float = 0.0
    """What these sweeps took, evaluation included."""
