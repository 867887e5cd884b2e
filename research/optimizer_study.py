"""`python research/optimizer_study.py`: which comparisons of methods survive another optimizer?

A plain Llama, an IIET without corrections and one with them are trained by AdamW and by Muon, each
at its own best rate, with equal training FLOPs. `optimizer.md` states rules and order, which were
written before the first run.

Each training is stored as soon as it is measured, and none is made twice: the same command resumes
after an interruption, which costs at most the training in progress. Another process may train
another piece into a results file of its own.

    python research/optimizer_study.py --dry-run
    python research/optimizer_study.py --piece text --seconds 3600
    python research/optimizer_study.py --page     # the tables of optimizer.md, from the JSON file
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from retrofit_results import DOES_NOT_PAY, LEAST_BITS, LEAST_POINTS, PAYS, Difference, with_part
from retrofit_study import bits_per_byte_of, evaluations_of, metrics_of
from training_loop import train_decoder

from iiet import Decoder, ModelConfig, preset
from iiet.cost import training_flops_per_token
from iiet.model.batch import Batch
from orchestrator.cli.app import exit_code_of
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import prepare
from orchestrator.data.store import PreparedData
from orchestrator.reporting.sections import markdown_table
from orchestrator.settings import TrainingSettings, read_settings
from orchestrator.workspace.files import write_text
from orchestrator.workspace.journal import ACCURACY_METRIC, VALIDATION_METRIC
from orchestrator.workspace.layout import Workspace

VANILLA = "vanilla"
MIX = "r = 0"
CORRECTED = "corrected"
CORRECTED_EQUAL_TOKENS = "corrected, equal tokens"
"""As many steps as vanilla, so with `1 + r` times its FLOPs."""
ADAMW = "adamw"
MUON = "muon"
OPTIMIZERS = (ADAMW, MUON)
FIRST_RATES = {ADAMW: (2e-3, 4e-3, 8e-3), MUON: (1e-3, 2e-3, 4e-3)}
"""Peak rates; that of Muon's matrices is a multiple of them."""
MOST_RATES = 5
SEEDS = (0, 1, 2)
HOLDS = "holds"
DOES_NOT_HOLD = "does not hold"
NOT_DECIDED = "not decided"
NOT_TRIED = "not tried"
WORDS = {PAYS: HOLDS, DOES_NOT_PAY: DOES_NOT_HOLD, "": NOT_TRIED}
"""Verdict of a difference -> the word for it here, where it is another one."""
LEAST_NATS = 0.02
"""How much better another default of Muon must be to replace the present one."""
_DEFAULTS = TrainingSettings()
RESULTS = Path(__file__).with_name("optimizer_study.json")
PAGE = Path(__file__).with_name("optimizer.md")
BEGIN = "<!-- made by `python research/optimizer_study.py --page` -->"


@dataclass(frozen=True, kw_only=True)
class Task:
    """Data, size and length of the trainings of a task."""

    sweep: str
    """The shipped sweep whose data they learn."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Where the model is not the preset `tiny`."""
    length: int
    """Tokens of a sequence."""
    num_sequences: int
    """Sequences of a step, and of a batch of held-out ones."""
    num_heldout: int
    """Held-out sequences; every fifth batch of them chooses rates, the others are measured."""
    corrections: int
    """Of each layer of the arm that is corrected."""
    vanilla_steps: int
    """Steps of vanilla, whose FLOPs the other arms get."""


TASKS = {
    "text": Task(
        sweep="toy", length=128, num_sequences=8, num_heldout=144, corrections=2, vanilla_steps=300
    ),
    "depth": Task(
        sweep="demo", sizes={"dim": 64, "num_heads": 4, "ffn_dim": 176, "num_layers": 2},
        length=32, num_sequences=64, num_heldout=2560, corrections=3, vanilla_steps=2400,
    ),
}  # fmt: skip
COMPARED = {
    "text": ("text", (VANILLA, MIX)),
    "text-corrected": ("text", (CORRECTED,)),
    "depth": ("depth", (VANILLA, CORRECTED)),
    "depth-mix": ("depth", (MIX,)),
    "tokens": ("text", (CORRECTED_EQUAL_TOKENS,)),
}
"""Name of a piece that compares arms -> its task and its arms."""
PIECES = ("text", "text-corrected", "depth", "defaults", "depth-mix", "tokens")
"""In the order of `optimizer.md`."""
CLAIMS = (
    (MIX, VANILLA),
    (CORRECTED, VANILLA),
    (CORRECTED, MIX),
    (CORRECTED_EQUAL_TOKENS, VANILLA),
    (CORRECTED_EQUAL_TOKENS, MIX),
)
"""Which arm is said to beat which."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training, by all that tells it from the others."""

    task: str
    arm: str
    optimizer: str
    rate: float
    seed: int
    muon_rate_factor: float = _DEFAULTS.muon_rate_factor
    muon_momentum: float = _DEFAULTS.muon_momentum

    @property
    def name(self) -> str:
        """A name for messages."""
        parts = [self.task, self.arm, self.optimizer, f"rate {self.rate:g}", f"seed {self.seed}"]
        if self.muon_rate_factor != _DEFAULTS.muon_rate_factor:
            parts.append(f"factor {self.muon_rate_factor:g}")
        if self.muon_momentum != _DEFAULTS.muon_momentum:
            parts.append(f"momentum {self.muon_momentum:g}")
        return ", ".join(parts)


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
    cpu_seconds: float
    """Of the training, on one thread."""

    @property
    def quality(self) -> float:
        """Points of accuracy, or bits per byte with their sign changed: more is better."""
        if self.accuracy is not None:
            return 100 * self.accuracy
        assert self.bits_per_byte is not None
        return -self.bits_per_byte

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
        "--optimizer", choices=OPTIMIZERS, nargs="+", default=OPTIMIZERS,
        help="only these, where a piece compares arms (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--folder", type=Path, default=Path("optimizer-study"), help="for the prepared data"
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
    parser.add_argument("--page", action="store_true", help="write the tables, and train nothing")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what is stored, and what is next"
    )
    options = parser.parse_args(arguments)
    try:
        study = Study(options.folder, options.results, options.steps_factor)
        if options.add:
            for file in options.add:
                study.add(file)
        elif options.page:
            write_text(PAGE, filled(PAGE.read_text("utf-8"), study))
        elif options.dry_run:
            for piece in options.piece:
                print(f"{piece}: {study.progress_of(piece, options.optimizer)}")
        else:
            study.run(options.piece, options.seconds, options.optimizer)
    except BaseException as error:
        return exit_code_of(error)
    return 0


class Study:
    """The trainings of the study, and what is stored of them.

    Args:
        folder: Holds the prepared data.
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

    def progress_of(self, piece: str, optimizers: Sequence[str] = OPTIMIZERS) -> str:
        """Return how many trainings of a piece are stored, and which is next."""
        if piece == "defaults" and not self.tried("text", MIX, MUON):
            return "0 stored, after `text`"
        num_stored = 0
        for training in self.trainings(piece, optimizers):
            if training not in self.measured:
                return f"{num_stored} stored, next: {training.name}"
            num_stored += 1
        return f"{num_stored} stored, complete"

    def run(
        self, pieces: Sequence[str], seconds: float, optimizers: Sequence[str] = OPTIMIZERS
    ) -> None:
        """Make the trainings of some pieces that are not stored, until the time is over.

        Args:
            pieces: Some of `PIECES`.
            seconds: No training begins after so many.
            optimizers: Whose trainings of arms are made.
        """
        torch.set_num_threads(1)
        ends_at = time.monotonic() + seconds
        for piece in pieces:
            for training in self.trainings(piece, optimizers):
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
        quality = f"{abs(result.quality):.4g}"
        print(f"{result.training.name}: {quality}, {result.cpu_seconds:.0f} s", flush=True)

    def _write(self) -> None:
        trainings = [stored.to_dict() for stored in self.measured.values()]
        write_text(self.results_file, json.dumps({"trainings": trainings}, indent=1) + "\n")

    # Which trainings there are

    def trainings(self, piece: str, optimizers: Sequence[str] = OPTIMIZERS) -> Iterator[Training]:
        """Yield the trainings of a piece in their order.

        Some depend on the results of those before, so each one must be stored before the next one
        is asked for.
        """
        if piece == "defaults":
            yield from self._other_defaults()
            return
        task, arms = COMPARED[piece]
        for arm in arms:
            for optimizer in optimizers:
                yield from self._rates(task, arm, optimizer)
        for seed in SEEDS[1:]:
            for arm in arms:
                for optimizer in optimizers:
                    yield replace(self.best(task, arm, optimizer), seed=seed)

    def _rates(self, task: str, arm: str, optimizer: str) -> Iterator[Training]:
        """Yield the first seed's trainings at three rates, and at others beyond a best one at the
        edge."""
        rates = [*FIRST_RATES[optimizer]]
        for rate in rates:
            yield self._training(task, arm, optimizer, rate)
        while len(rates) < MOST_RATES:
            best = self.best(task, arm, optimizer).rate
            if best == min(rates):
                rate = best / 2
            elif best == max(rates):
                rate = best * 2
            else:
                return
            rates.append(rate)
            yield self._training(task, arm, optimizer, rate)

    def _training(self, task: str, arm: str, optimizer: str, rate: float) -> Training:
        return Training(task=task, arm=arm, optimizer=optimizer, rate=rate, seed=SEEDS[0])

    def tried(self, task: str, arm: str, optimizer: str) -> list[Measured]:
        """Return the first seed's results at Muon's default settings, by rate."""
        results = [
            result
            for training, result in self.measured.items()
            if training == self._training(task, arm, optimizer, training.rate)
        ]
        return sorted(results, key=lambda result: result.training.rate)

    def best(self, task: str, arm: str, optimizer: str) -> Training:
        """Return the first seed's training with the lowest loss that chooses."""
        results = self.tried(task, arm, optimizer)
        return min(results, key=lambda result: result.selection_loss).training

    def _other_defaults(self) -> Iterator[Training]:
        """Yield trainings with other factors, at the same rate of Muon, and other momenta."""
        for change in DEFAULT_CHANGES.values():
            for arm in (VANILLA, MIX):
                yield change(self.best("text", arm, MUON))

    # How they are made

    def make(self, training: Training) -> Measured:
        """Train a model, and measure it."""
        task = TASKS[training.task]
        config = self.config(training.task, training.arm)
        num_steps = self.num_steps(training.task, training.arm)
        recipe = TrainingSettings(
            num_steps=num_steps,
            warmup_steps=max(1, num_steps // 10),
            learning_rate=training.rate,
            seed=training.seed,
            optimizer=training.optimizer,
            muon_rate_factor=training.muon_rate_factor,
            muon_momentum=training.muon_momentum,
        )
        data = self.data(training.task)
        choosing, measured = self.heldout(training.task)
        torch.manual_seed(training.seed)
        decoder = Decoder(config)
        started = time.process_time()
        train_decoder(
            decoder.train(),
            data,
            recipe,
            context_length=task.length,
            num_sequences=task.num_sequences,
            data_seed=training.seed,
        )
        cpu_seconds = time.process_time() - started
        metrics = metrics_of(decoder, measured)
        tokens = num_steps * task.num_sequences * task.length
        return Measured(
            training=training,
            num_steps=num_steps,
            training_flops=tokens * training_flops_per_token(config),
            evaluations=evaluations_of(config),
            selection_loss=metrics_of(decoder, choosing)[VALIDATION_METRIC],
            loss=metrics[VALIDATION_METRIC],
            accuracy=metrics.get(ACCURACY_METRIC),
            bits_per_byte=bits_per_byte_of(metrics[VALIDATION_METRIC], data),
            cpu_seconds=cpu_seconds,
        )

    def config(self, task: str, arm: str) -> ModelConfig:
        """Return the model's configuration."""
        corrections = {VANILLA: None, MIX: 0}.get(arm, TASKS[task].corrections)
        return preset(
            "tiny",
            method="vanilla" if arm == VANILLA else "iiet",
            schedule=corrections,
            vocab_size=self.data(task).vocab_size,
            context_length=TASKS[task].length,
            **TASKS[task].sizes,
        )

    def num_steps(self, task: str, arm: str) -> int:
        """Return the steps that vanilla's FLOPs, or its tokens, allow an arm."""
        steps = self.steps_factor * TASKS[task].vanilla_steps
        if arm != CORRECTED_EQUAL_TOKENS:
            of_vanilla = training_flops_per_token(self.config(task, VANILLA))
            steps *= of_vanilla / training_flops_per_token(self.config(task, arm))
        return max(1, round(steps))

    @cache  # noqa: B019 - one study per process
    def data(self, task: str) -> PreparedData:
        """Return the data of a task."""
        settings = read_settings(TASKS[task].sweep).data
        return open_data(prepare(settings, Workspace(self.folder / "workspace")))

    @cache  # noqa: B019 - one study per process
    def heldout(self, task: str) -> tuple[list[Batch], list[Batch]]:
        """Return the batches that choose rates, and those that are measured."""
        of_task = TASKS[task]
        batches = [
            *self.data(task).validation_batches(
                context_length=of_task.length,
                num_tokens=of_task.num_heldout * of_task.length,
                batch_size=of_task.num_sequences,
            )
        ]
        measured = [batch for number, batch in enumerate(batches) if number % 5]
        return batches[::5], measured

    # What they say

    def by_seed(self, task: str, arm: str, optimizer: str) -> dict[int, Measured]:
        """Return seed -> result of an arm at its best rate."""
        if not self.tried(task, arm, optimizer):
            return {}
        best = self.best(task, arm, optimizer)
        of_seeds = {seed: replace(best, seed=seed) for seed in SEEDS}
        return {
            seed: self.measured[training]
            for seed, training in of_seeds.items()
            if training in self.measured
        }

    def difference(self, task: str, arm: str, other: str, optimizer: str) -> Difference:
        """Return how much better an arm is than another with the same optimizer, by seed."""
        return _difference(self.by_seed(task, arm, optimizer), self.by_seed(task, other, optimizer))

    def verdict(self, task: str, arm: str, other: str, optimizer: str) -> str:
        """Return whether the arm beats the other one with this optimizer."""
        verdict = self.difference(task, arm, other, optimizer).verdict(least_of(task))
        return WORDS.get(verdict, verdict)


def _same_muon_rate(factor: float) -> Callable[[Training], Training]:
    """Return the change to another factor that leaves the rate of the matrices as it is."""

    def change(training: Training) -> Training:
        rate = training.rate * training.muon_rate_factor / factor
        return replace(training, muon_rate_factor=factor, rate=rate)

    return change


DEFAULT_CHANGES: dict[str, Callable[[Training], Training]] = {
    "`muon_rate_factor` 2, at Muon's rate": _same_muon_rate(2.0),
    "`muon_rate_factor` 8, at Muon's rate": _same_muon_rate(8.0),
    "`muon_momentum` 0.9": lambda training: replace(training, muon_momentum=0.9),
    "`muon_momentum` 0.98": lambda training: replace(training, muon_momentum=0.98),
}
"""What the piece `defaults` tries -> the change of a training."""


def _difference(one: Mapping[int, Measured], other: Mapping[int, Measured]) -> Difference:
    return Difference(
        values=[one[seed].quality - other[seed].quality for seed in one if seed in other]
    )


def read_results(file: Path) -> dict[Training, Measured]:
    """Return what a results file holds."""
    return results_in(json.loads(file.read_text(encoding="utf-8")))


def results_in(stored: Mapping[str, Any]) -> dict[Training, Measured]:
    """Return what the object of a results file holds."""
    results = [Measured.from_dict(values) for values in stored["trainings"]]
    return {result.training: result for result in results}


def least_of(task: str) -> float:
    """Return the least difference that counts, in the task's unit."""
    return LEAST_BITS if task == "text" else LEAST_POINTS


def which_optimizers(verdicts: Mapping[str, str]) -> str:
    """Return for which optimizers a claim holds, by the verdict of each."""
    with_adamw = verdicts[ADAMW]
    with_muon = verdicts[MUON]
    if NOT_TRIED in (with_adamw, with_muon):
        return NOT_TRIED
    if with_adamw == with_muon:
        return {HOLDS: "both", DOES_NOT_HOLD: "neither"}.get(with_adamw, NOT_DECIDED)
    if with_adamw == HOLDS:
        return "AdamW only" if with_muon == DOES_NOT_HOLD else f"AdamW; Muon {NOT_DECIDED}"
    if with_muon == HOLDS:
        return "Muon only" if with_adamw == DOES_NOT_HOLD else f"Muon; AdamW {NOT_DECIDED}"
    return NOT_DECIDED


# The page


def filled(page: str, study: Study) -> str:
    """Return the page with its tables written anew."""
    return with_part(page, BEGIN, results_markdown(study))


def results_markdown(study: Study) -> str:
    """Return all tables, and what has not run."""
    if not study.measured:
        return "No training has run yet."
    progress = "\n".join(f"- `{piece}`: {study.progress_of(piece)}" for piece in PIECES)
    return "\n\n".join(
        [
            "### Claims",
            "How much better the first is than the second, in bits per byte (text) or points "
            "(depth), with the 95 % interval over seeds.",
            _claims_table(study),
            "### Muon against AdamW",
            _optimizers_table(study),
            "### Arms",
            "At the best rate, by seed, and their mean.",
            _arms_table(study),
            "### Muon's defaults",
            _defaults_table(study),
            "### What is stored",
            progress,
        ]
    )


def _claims_table(study: Study) -> str:
    rows = []
    for task in TASKS:
        for arm, other in CLAIMS:
            differences = {o: study.difference(task, arm, other, o) for o in OPTIMIZERS}
            if not any(difference.values for difference in differences.values()):
                continue
            verdicts = {o: study.verdict(task, arm, other, o) for o in OPTIMIZERS}
            row = [task, f"{_shown(task, arm)} beats {_shown(task, other)}"]
            for optimizer in OPTIMIZERS:
                row += [differences[optimizer].text(_digits(task)), verdicts[optimizer]]
            rows.append([*row, which_optimizers(verdicts)])
    heads = ["task", "claim", "with AdamW", "verdict", "with Muon", "verdict", "holds for"]
    return markdown_table(heads, rows, left_columns=(0, 1, 3, 5, 6)) if rows else "Not run."


def _optimizers_table(study: Study) -> str:
    rows = []
    for task in TASKS:
        for arm in (VANILLA, MIX, CORRECTED, CORRECTED_EQUAL_TOKENS):
            of = {optimizer: study.by_seed(task, arm, optimizer) for optimizer in OPTIMIZERS}
            difference = _difference(of[MUON], of[ADAMW])
            if not difference.values:
                continue
            verdict = difference.verdict(least_of(task))
            seconds = {
                optimizer: sum(one.cpu_seconds / one.num_steps for one in results.values())
                / len(results)
                for optimizer, results in of.items()
            }
            rows.append(
                [
                    task,
                    _shown(task, arm),
                    difference.text(_digits(task)),
                    WORDS.get(verdict, verdict),
                    f"{1000 * seconds[ADAMW]:.0f}",
                    f"{1000 * seconds[MUON]:.0f}",
                ]
            )
    heads = [
        "task", "arm", "Muon better by", "Muon beats AdamW", "ms of CPU per step, AdamW", "Muon",
    ]  # fmt: skip
    return markdown_table(heads, rows, left_columns=(0, 1, 3)) if rows else "Not run."


def _arms_table(study: Study) -> str:
    rows = []
    for task in TASKS:
        for arm in (VANILLA, MIX, CORRECTED, CORRECTED_EQUAL_TOKENS):
            for optimizer in OPTIMIZERS:
                results = study.by_seed(task, arm, optimizer)
                if not results:
                    continue
                first = results[SEEDS[0]]
                values = [abs(result.quality) for result in results.values()]
                digits = _digits(task)
                by_seed = ", ".join(f"{value:.{digits}f}" for value in values)
                tried = study.tried(task, arm, optimizer)
                rows.append(
                    [
                        task,
                        _shown(task, arm),
                        optimizer,
                        str(first.evaluations),
                        str(first.num_steps),
                        f"{first.training_flops:.2e}",
                        "; ".join(
                            f"{one.training.rate:g}: {one.selection_loss:.3f}" for one in tried
                        ),
                        f"{first.training.rate:g}",
                        f"{by_seed} (**{sum(values) / len(values):.{digits}f}**)",
                    ]
                )
    heads = [
        "task", "arm", "optimizer", "NFE", "steps", "training FLOPs",
        "loss that chooses, by rate", "best of them", "by seed",
    ]  # fmt: skip
    return markdown_table(heads, rows, left_columns=(0, 1, 2, 6, 8)) if rows else "Not run."


def _defaults_table(study: Study) -> str:
    rows = []
    for name, change in {"as they are": lambda training: training, **DEFAULT_CHANGES}.items():
        losses = []
        for arm in (VANILLA, MIX):
            if not study.tried("text", arm, MUON):
                continue
            result = study.measured.get(change(study.best("text", arm, MUON)))
            if result:
                losses.append(result.selection_loss)
        if len(losses) == 2:
            rows.append([name, *(f"{loss:.4f}" for loss in losses), f"{sum(losses) / 2:.4f}"])
    if len(rows) < 2:
        return "Not run."
    return markdown_table(
        ["Muon's settings", f"{VANILLA}, loss that chooses", MIX, "mean"], rows, left_columns=(0,)
    )


def _shown(task: str, arm: str) -> str:
    return arm.replace(CORRECTED, f"r = {TASKS[task].corrections}")


def _digits(task: str) -> int:
    return 3 if task == "text" else 1


if __name__ == "__main__":
    sys.exit(main())
