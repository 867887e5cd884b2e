"""`python research/retrofit_study.py`: does a retrofit pay, at equal training FLOPs?

A plain Llama is trained, the source. From its weights IIETs, a looped model and a PCformer are
trained, and beside them the source itself and IIETs from random weights, all for as many FLOPs.
Students of the retrofits follow. `retrofit.md` states questions, rules and the order of the pieces,
which were written before the first run; `retrofit_results.py` makes its tables.

Each training is stored as soon as it is measured, and none is made twice: the same command resumes
after an interruption, which costs at most the training in progress. All pieces take about eleven
hours of one core; another process may train another piece, or tasks of other hops, into a results
file of its own.

    python research/retrofit_study.py --dry-run
    python research/retrofit_study.py --piece depth-2 --seconds 3600
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from training_loop import train_decoder

from iiet import Decoder, ModelConfig, influence_table, preset, schedule_family
from iiet.cost import inference_cost, training_flops_per_token
from iiet.iiad.distillation import frozen_teacher
from iiet.model.batch import Batch
from iiet.model.facts import ImplicitEulerOptions
from iiet.model.schedule import IterationSchedule
from orchestrator.cli.app import exit_code_of
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import prepare
from orchestrator.data.store import PreparedData, TokenStore
from orchestrator.settings import DataSettings, TrainingSettings, read_settings
from orchestrator.settings.data import DepthSettings, parse_task_name
from orchestrator.training.objective import validation_metrics
from orchestrator.training.world import World
from orchestrator.workspace.files import write_text
from orchestrator.workspace.journal import ACCURACY_METRIC, VALIDATION_METRIC
from orchestrator.workspace.layout import Workspace

SOURCE = "source"
CONTINUED = "source continued"
SCRATCH = "random weights"
SCRATCH_WITH_SOURCE = "random weights, source's FLOPs too"
RETROFITS = ("mean", "identity", "looped", "pcformer")
"""IIET of both starts, the whole stack repeated, and PCformer; all from the source's weights."""
DEPTH_ARMS = (CONTINUED, *RETROFITS, SCRATCH, SCRATCH_WITH_SOURCE)
"""Arms beside the source, in their order."""
TEXT_ARMS = (CONTINUED, "mean", "identity")
STUDENT_OF = "student of "
HOPS = (5, 6, 4)
SEEDS = (0, 1, 2)
TEXT = "text"
TEXT_LENGTH = 128
SYMBOLS_PER_HOP = 8
"""Length of a sequence over its hops: twice what the hops take on average, over four symbols."""
PIECES = (
    "depth-2", "text", "depth-4", "students-2", "students-4", "rates-2", "rates-text",
)  # fmt: skip
"""In the order of `retrofit.md`."""
STUDENT_SHARES = (0.75, 0.625, 0.5)
"""Largest share of its retrofit's evaluations that a student makes."""
STUDENT_STEPS = 200
STUDENT_RATE = 1e-3
NUM_CALIBRATION_SEQUENCES = 256
_SOURCE_DATA_SEED = 1000
"""Added to the seed of a source, so that trainings from it see other sequences than it did."""
_CALIBRATION_SEED = 2000
RESULTS = Path(__file__).with_name("retrofit_study.json")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the trainings of a kind of task have in common."""

    num_sequences: int
    """Sequences of a step, and of a batch of held-out ones."""
    num_heldout: int
    """Held-out sequences; every fifth batch of them chooses rates, the others are measured."""
    corrections: int
    source_steps: int
    source_rate: float
    retrofit_steps: int
    """Steps of the retrofit `mean`, whose FLOPs all other arms get."""
    rates: tuple[float, float]
    """Peak learning rates that each arm tries."""


DEPTH_RECIPE = Recipe(
    num_sequences=64, num_heldout=2560, corrections=3,
    source_steps=2000, source_rate=2e-3, retrofit_steps=500, rates=(2e-3, 4e-3),
)  # fmt: skip
TEXT_RECIPE = Recipe(
    num_sequences=8, num_heldout=144, corrections=2,
    source_steps=500, source_rate=4e-3, retrofit_steps=250, rates=(1e-3, 2e-3),
)  # fmt: skip
"""Data, sizes and the source's training are those of the shipped sweep `toy`."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A source, and with it all arms that are compared."""

    task: str
    """`phop_5`, or `text`."""
    num_layers: int
    seed: int

    @property
    def recipe(self) -> Recipe:
        """What its trainings have in common."""
        return TEXT_RECIPE if self.task == TEXT else DEPTH_RECIPE

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return length_of(self.task)

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms beside the source."""
        return TEXT_ARMS if self.task == TEXT else DEPTH_ARMS


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, by all that tells it from the others."""

    task: str
    num_layers: int
    seed: int
    arm: str
    rate: float
    schedule: str = ""
    """Of a student; other arms have one schedule."""

    @property
    def cell(self) -> Cell:
        """The cell that it belongs to."""
        return Cell(task=self.task, num_layers=self.num_layers, seed=self.seed)

    @property
    def name(self) -> str:
        """A name for messages and folders."""
        parts = (self.task, f"{self.num_layers} layers", f"seed {self.seed}", self.arm)
        schedule = (f"schedule {self.schedule}",) if self.schedule else ()
        return ", ".join([*parts, f"rate {self.rate:g}", *schedule])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A finished training."""

    training: Training
    num_steps: int
    training_flops: float
    evaluations: int
    """Field evaluations per token (NFE)."""
    selection_loss: float
    """Nats per target on the held-out sequences that choose rates."""
    loss: float
    """Nats per target on the held-out sequences that are measured."""
    accuracy: float | None
    """Share of right answers on them, from 0 to 1; None for text."""
    bits_per_byte: float | None
    """Of text."""
    seconds: float
    """Of the training, on a shared processor."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**vars(self.training), **{k: v for k, v in vars(self).items() if k != "training"}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measured:
        """Build it from JSON values."""
        names = Training.__dataclass_fields__
        training = Training(**{name: values[name] for name in names})
        others = {name: value for name, value in values.items() if name not in names}
        return cls(training=training, **others)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or what is left of it; return the exit code as `iiet-orch` does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--piece", choices=PIECES, nargs="+", default=PIECES, help="only these (default: all)"
    )
    parser.add_argument(
        "--hops", type=int, choices=HOPS, nargs="+", default=HOPS,
        help="only depth tasks of so many hops (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, default=Path("retrofit-study"), help="for data and models"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, metavar="N",
        help="begin no training after this many seconds",
    )  # fmt: skip
    parser.add_argument(
        "--steps-factor", type=float, default=1.0, metavar="X",
        help="trainings have this many times the steps; for tries, with another --results",
    )  # fmt: skip
    parser.add_argument(
        "--add", type=Path, nargs="+", default=[], metavar="FILE",
        help="take over the trainings of these results files, and make none",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="say what is stored, and what is next"
    )
    options = parser.parse_args(arguments)
    try:
        study = Study(options.folder, options.results, options.steps_factor)
        if options.add:
            for file in options.add:
                study.add(file)
        elif options.dry_run:
            for piece in options.piece:
                print(f"{piece}: {study.progress_of(piece, options.hops)}")
        else:
            study.run(options.piece, options.seconds, options.hops)
    except BaseException as error:
        return exit_code_of(error)
    return 0


class Study:
    """The trainings of the study, and what is stored of them.

    Args:
        folder: Holds data and models; the models that others start from are read from it.
        results_file: The JSON file; one that exists is continued.
        steps_factor: Multiple of all numbers of steps.
    """

    def __init__(self, folder: Path, results_file: Path, steps_factor: float = 1.0) -> None:
        self.folder = folder
        self.results_file = results_file
        self.steps_factor = steps_factor
        self.measured: dict[Training, Measured] = {}
        if results_file.is_file():
            self.measured = read_results(results_file)

    def add(self, file: Path) -> None:
        """Take over the trainings of another results file that this one lacks."""
        self.measured = read_results(file) | self.measured
        self._write()

    def progress_of(self, piece: str, hops: Sequence[int] = HOPS) -> str:
        """Return how many trainings of a piece are stored, and which is next."""
        if piece.startswith("students"):
            # Which these are is known once influence is measured on their retrofits.
            layers = int(piece.partition("-")[2])
            tasks = [f"phop_{count}" for count in hops]
            students = [
                training
                for training in self.measured
                if training.arm.startswith(STUDENT_OF)
                and training.num_layers == layers
                and training.task in tasks
            ]
            return f"{len(students)} stored"
        num_stored = 0
        for training in self.trainings(piece, hops):
            if training not in self.measured:
                return f"{num_stored} stored, next: {training.name}"
            num_stored += 1
        return f"{num_stored} stored, complete"

    def run(self, pieces: Sequence[str], seconds: float, hops: Sequence[int] = HOPS) -> None:
        """Make the trainings of some pieces that are not stored, until the time is over.

        Args:
            pieces: Some of `PIECES`.
            seconds: No training begins after so many.
            hops: Of the depth tasks; cells of others are left out.
        """
        torch.set_num_threads(1)
        ends_at = time.monotonic() + seconds
        for piece in pieces:
            for training in self.trainings(piece, hops):
                if training in self.measured:
                    continue
                if time.monotonic() >= ends_at:
                    print(f"the time is over, before: {training.name}", flush=True)
                    return
                self.store(self.make(training))

    def store(self, result: Measured) -> None:
        """Write a finished training to the results file."""
        self.measured[result.training] = result
        self._write()
        quality = f"loss {result.loss:.4f}"
        if result.accuracy is not None:
            quality = f"accuracy {result.accuracy:.1%}, {quality}"
        print(f"{result.training.name}: {quality}, {result.seconds:.0f} s", flush=True)

    def _write(self) -> None:
        trainings = [stored.to_dict() for stored in self.measured.values()]
        write_text(self.results_file, json.dumps({"trainings": trainings}, indent=1) + "\n")

    # Which trainings there are

    def trainings(self, piece: str, hops: Sequence[int] = HOPS) -> Iterator[Training]:
        """Yield the trainings of a piece in their order.

        Some depend on the results of those before, so each one must be stored before the next one
        is asked for.
        """
        kind, _, layers = piece.partition("-")
        if TEXT in piece:
            cells = [Cell(task=TEXT, num_layers=6, seed=seed) for seed in SEEDS]
        else:
            cells = [
                Cell(task=f"phop_{count}", num_layers=int(layers), seed=seed)
                for count in hops
                for seed in SEEDS
            ]
        for cell in cells:
            if kind == "students":
                yield from self._students(cell)
            elif kind == "rates":
                yield from self._other_rates(cell)
            else:
                yield from self._compared(cell)

    def _compared(self, cell: Cell) -> Iterator[Training]:
        """Yield the source and all arms: at both rates under the first seed, then at the better."""
        yield source_of(cell)
        for arm in cell.arms:
            is_first = cell.seed == SEEDS[0]
            rates = cell.recipe.rates if is_first else (self.chosen_rate(cell, arm),)
            for rate in rates:
                yield Training(**vars(cell), arm=arm, rate=rate)

    def _other_rates(self, cell: Cell) -> Iterator[Training]:
        """Yield each arm at both rates; those of the better one are stored already."""
        yield source_of(cell)
        for arm in cell.arms:
            for rate in cell.recipe.rates:
                yield Training(**vars(cell), arm=arm, rate=rate)

    def _students(self, cell: Cell) -> Iterator[Training]:
        """Yield the students of each retrofit, costliest first."""
        for arm in RETROFITS:
            of_retrofit = Training(**vars(cell), arm=arm, rate=self.chosen_rate(cell, arm))
            if of_retrofit not in self.measured:
                continue  # The piece with the retrofits comes first.
            for schedule in self.student_schedules(of_retrofit):
                yield Training(
                    **vars(cell), arm=STUDENT_OF + arm, rate=STUDENT_RATE, schedule=str(schedule)
                )

    def chosen_rate(self, cell: Cell, arm: str) -> float:
        """Return the rate of an arm: the lower mean loss, over the seeds that have both rates."""
        losses: dict[float, list[float]] = {rate: [] for rate in cell.recipe.rates}
        for seed in SEEDS:
            of_seed = {
                rate: Training(**{**vars(cell), "seed": seed}, arm=arm, rate=rate)
                for rate in cell.recipe.rates
            }
            if all(training in self.measured for training in of_seed.values()):
                for rate, training in of_seed.items():
                    losses[rate].append(self.measured[training].selection_loss)
        if not all(losses.values()):
            return cell.recipe.rates[0]
        return min(losses, key=lambda rate: mean(losses[rate]))

    # How they are made

    def make(self, training: Training) -> Measured:
        """Train a model, save it, and measure it."""
        started = time.perf_counter()
        decoder, recipe, teacher = self.prepared(training)
        data = self.data(training.task)
        train_decoder(
            decoder.train(),
            data,
            recipe,
            context_length=training.cell.length,
            num_sequences=training.cell.recipe.num_sequences,
            data_seed=data_seed(training),
            teacher=teacher,
        )
        decoder.save_pretrained(self.folder_of(training))
        return self.measure(training, decoder, recipe, time.perf_counter() - started)

    def model(self, training: Training) -> Decoder:
        """Return the model of a training; one whose folder is gone is trained again."""
        if not (self.folder_of(training) / "config.json").is_file():
            result = self.make(training)
            if training not in self.measured:  # What is stored stays as it was measured.
                self.store(result)
        return Decoder.from_pretrained(self.folder_of(training))

    def folder_of(self, training: Training) -> Path:
        """Return the folder of a training's model."""
        return self.folder / "models" / training.name.replace(", ", "_").replace(" ", "-")

    def prepared(self, training: Training) -> tuple[Decoder, TrainingSettings, Decoder | None]:
        """Return the model of a training before its first step, its recipe, and its teacher."""
        cell = training.cell
        recipe = cell.recipe
        plain = self.config(cell)
        steps = self.num_steps(training)
        if training.arm.startswith(STUDENT_OF):
            arm = training.arm.removeprefix(STUDENT_OF)
            rate = self.chosen_rate(cell, arm)
            teacher = self.model(Training(**vars(cell), arm=arm, rate=rate))
            config = teacher.config.with_schedule(training.schedule)
            decoder = with_weights(config, teacher, training.seed)
            settings = TrainingSettings(
                num_steps=steps, learning_rate=training.rate, seed=training.seed,
                warmup_steps=10, weight_decay=0.0,
            )  # fmt: skip
            return decoder, settings, frozen_teacher(teacher)
        settings = TrainingSettings(
            num_steps=steps, learning_rate=training.rate, seed=training.seed, warmup_steps=50
        )
        config = config_of(training.arm, plain, recipe.corrections)
        if training.arm in (SOURCE, SCRATCH, SCRATCH_WITH_SOURCE):
            torch.manual_seed(training.seed)
            return Decoder(config), settings, None
        return with_weights(config, self.model(source_of(cell)), training.seed), settings, None

    def config(self, cell: Cell) -> ModelConfig:
        """Return the source's configuration."""
        data = self.data(cell.task)
        if cell.task == TEXT:
            sizes: dict[str, Any] = {}
        else:
            sizes = {"dim": 64, "num_heads": 4, "ffn_dim": 176}
        return preset(
            "tiny", method="vanilla", schedule=None, vocab_size=data.vocab_size,
            num_layers=cell.num_layers, context_length=cell.length, **sizes,
        )  # fmt: skip

    def num_steps(self, training: Training) -> int:
        """Return the steps of a training: by its arm, or those that an arm's FLOPs allow."""
        recipe = training.cell.recipe
        if training.arm.startswith(STUDENT_OF):
            return self._scaled(STUDENT_STEPS)
        if training.arm == SOURCE:
            return self._scaled(recipe.source_steps)
        plain = self.config(training.cell)
        retrofit = config_of("mean", plain, recipe.corrections)
        retrofit_steps = self._scaled(recipe.retrofit_steps)
        flops = retrofit_steps * training_flops_per_token(retrofit)
        if training.arm == SCRATCH_WITH_SOURCE:
            flops += self._scaled(recipe.source_steps) * training_flops_per_token(plain)
        config = config_of(training.arm, plain, recipe.corrections)
        return max(1, round(flops / training_flops_per_token(config)))

    def _scaled(self, num_steps: int) -> int:
        return max(1, round(self.steps_factor * num_steps))

    def student_schedules(self, retrofit: Training) -> list[IterationSchedule]:
        """Return the schedules of a retrofit's students: by influence, or of a loop fewer runs."""
        decoder = self.model(retrofit)
        full = decoder.schedule
        if decoder.config.method == "looped":
            fewer = reversed(range(1, full.max_corrections))
            return [IterationSchedule.uniform(len(full), count) for count in fewer]
        recipe = retrofit.cell.recipe
        batches = [
            self.data(retrofit.task).batch(
                number, context_length=retrofit.cell.length, seed=_CALIBRATION_SEED + retrofit.seed,
                global_batch=recipe.num_sequences,
            )
            for number in range(NUM_CALIBRATION_SEQUENCES // recipe.num_sequences)
        ]  # fmt: skip
        decoder.eval()
        family = schedule_family(influence_table(decoder, batches))
        most = evaluations_of(decoder.config)
        schedules: dict[IterationSchedule, None] = {}
        for share in STUDENT_SHARES:
            schedules[family.within(nfe=share * most)] = None
        return list(schedules)

    @cache  # noqa: B019 - one study per process
    def data(self, task: str) -> PreparedData:
        """Return the data of a task."""
        if task == TEXT:
            settings = read_settings("toy").data
        else:
            depth = DepthSettings(tasks=(task,), length=length_of(task))
            settings = DataSettings(source="depth", depth=depth)
        return open_data(prepare(settings, Workspace(self.folder / "workspace")))

    @cache  # noqa: B019 - one study per process
    def heldout(self, task: str) -> tuple[list[Batch], list[Batch]]:
        """Return the batches that choose rates, and those that are measured."""
        recipe = TEXT_RECIPE if task == TEXT else DEPTH_RECIPE
        batches = [
            *self.data(task).validation_batches(
                context_length=length_of(task),
                num_tokens=recipe.num_heldout * length_of(task),
                batch_size=recipe.num_sequences,
            )
        ]
        choosing = batches[::5]
        measured = [batch for number, batch in enumerate(batches) if number % 5]
        return choosing, measured

    def measure(
        self, training: Training, decoder: Decoder, recipe: TrainingSettings, seconds: float
    ) -> Measured:
        """Measure a trained model on held-out sequences."""
        choosing, measured = self.heldout(training.task)
        selection = metrics_of(decoder, choosing)
        metrics = metrics_of(decoder, measured)
        loss = metrics[VALIDATION_METRIC]
        of_cell = training.cell.recipe
        tokens = recipe.num_steps * of_cell.num_sequences * training.cell.length
        flops = tokens * training_flops_per_token(decoder.config)
        if training.arm.startswith(STUDENT_OF):
            arm = training.arm.removeprefix(STUDENT_OF)
            teacher = config_of(arm, self.config(training.cell), of_cell.corrections)
            flops += tokens * inference_cost(teacher).forward_flops_per_token
        return Measured(
            training=training,
            num_steps=recipe.num_steps,
            training_flops=flops,
            evaluations=evaluations_of(decoder.config),
            selection_loss=selection[VALIDATION_METRIC],
            loss=loss,
            accuracy=metrics.get(ACCURACY_METRIC),
            bits_per_byte=bits_per_byte_of(loss, self.data(training.task)),
            seconds=seconds,
        )


def read_results(file: Path) -> dict[Training, Measured]:
    """Return what a results file holds."""
    return results_in(json.loads(file.read_text(encoding="utf-8")))


def results_in(stored: Mapping[str, Any]) -> dict[Training, Measured]:
    """Return what the object of a results file holds."""
    results = [Measured.from_dict(values) for values in stored["trainings"]]
    return {result.training: result for result in results}


def length_of(task: str) -> int:
    """Return the tokens of a sequence of a task."""
    if task == TEXT:
        return TEXT_LENGTH
    _, hops = parse_task_name(task)
    return SYMBOLS_PER_HOP * hops


def source_of(cell: Cell) -> Training:
    """Return the training of a cell's source."""
    return Training(**vars(cell), arm=SOURCE, rate=cell.recipe.source_rate)


def data_seed(training: Training) -> int:
    """Return the seed of the order of the data."""
    return training.seed + (_SOURCE_DATA_SEED if training.arm == SOURCE else 0)


def config_of(arm: str, plain: ModelConfig, corrections: int) -> ModelConfig:
    """Return the configuration of an arm."""
    if arm in (SOURCE, CONTINUED):
        return plain
    method, schedule = {"looped": ("looped", corrections), "pcformer": ("pcformer", 2)}.get(
        arm, ("iiet", corrections)
    )
    options = ImplicitEulerOptions(start="identity") if arm == "identity" else None
    changes: dict[str, Any] = {
        "method": method, "schedule": schedule, "method_options": options,
    }  # fmt: skip
    return replace(plain, **changes)


def evaluations_of(config: ModelConfig) -> int:
    """Count the field evaluations per token."""
    return sum(config.evaluations_per_layer())


def with_weights(config: ModelConfig, other: Decoder, seed: int) -> Decoder:
    """Return a model with the weights of another one; what only it has is initialized."""
    torch.manual_seed(seed)
    decoder = Decoder(config)
    missing = decoder.load_state_dict(other.state_dict(), strict=False)
    assert not missing.unexpected_keys
    return decoder


def bits_per_byte_of(loss: float, data: PreparedData) -> float | None:
    """Return bits per byte of held-out text from nats per token; None for data that are no text."""
    if not isinstance(data, TokenStore):
        return None
    held_out = data.manifest.validation
    return loss / math.log(2) * held_out.tokens / held_out.bytes


def metrics_of(decoder: Decoder, batches: Sequence[Batch]) -> dict[str, float]:
    """Return loss and accuracy on batches."""
    return validation_metrics(decoder, batches, decoder.schedule, precision="fp32", world=World())


if __name__ == "__main__":
    sys.exit(main())
