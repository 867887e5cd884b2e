"""`python research/cheaper_recovery.py`: what does SmolLM2-135M lose with fewer layers, and what
does a short training give back?

Students of 27, 24, 21 and 18 layers start with the weights of the layers that stay, and learn from
the whole model. Beside them stand the same models without any training, and the whole model,
trained further with as many FLOPs. `cheaper.md` states the rules, which were written before the
first run; `cheaper_results.py` makes its tables.

Trainings are those of the program, so one that is interrupted (Ctrl-C) resumes from its checkpoint,
and none is made twice. `--dry-run` says what is left.

    python research/cheaper_choice.py --gguf FILE            # first: it chooses the layers
    python research/cheaper_recovery.py --piece short        # two hours of one core
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cheaper_choice
import torch
from cheaper_choice import (
    CHOOSES_RATES,
    LOSS,
    NUM_ROUNDS_OF_ROLES,
    PASSAGE_CHARACTERS,
    REPORTS_STUDENTS,
    SEQUENCE_LENGTH,
    SMOLLM2,
    best_way,
    bits_per_nat,
    read_choices,
    sequences_of,
    settings_of_documentation,
    smollm2,
    without_layers,
)
from torch import Tensor
from torch.nn import functional

from iiet import Decoder, ModelConfig
from iiet.cost import inference_cost, num_parameters, training_flops_per_token
from iiet.model.batch import Batch
from orchestrator import Settings, distill, evaluate, pretrain, read_settings
from orchestrator.cli.app import exit_code_of
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import prepare
from orchestrator.data.store import TokenStore
from orchestrator.models.load import load_model
from orchestrator.settings import DataSettings
from orchestrator.workspace.files import write_text
from orchestrator.workspace.layout import Workspace

STUDENTS = (27, 24, 21, 18)
"""Layers of the students."""
NUM_LAYERS = 30
PRUNED = "pruned"
CROSS_ENTROPY = "cross-entropy"
BOTH = "cross-entropy and KL"
KL = "KL alone"
CONTINUED = "trained further"
ARMS = (PRUNED, CROSS_ENTROPY, BOTH, KL, CONTINUED)
RATES = (1e-4, 3e-4)
"""Peak learning rates, in the order in which they are tried."""
PIECES = ("short", "long")
NUM_STEPS = {"short": 40, "long": 600}
"""Piece -> steps of a student's training."""
COMPARED = 24
"""Layers of the student that is trained in all arms of the short piece."""
KL_ALONE = 1000.0
"""Weight of KL beside the cross-entropy's, which is 1: so large that nothing else counts. The
bound on the gradient's norm is as many times larger."""
TEXTS = ("documentation", "help topics")
"""Held-out text of the kind that is trained on, and of a kind that no arm has read."""
NUM_HELP_SEQUENCES = 12
NUM_TIMED_TOKENS = 32
NUM_TIMINGS = 5
SETTINGS = Path(__file__).with_name("cheaper_study.yaml")
RESULTS = Path(__file__).with_name("cheaper_recovery.json")


@dataclass(frozen=True, kw_only=True)
class Training:
    """A model of the study, by all that tells it from the others."""

    num_layers: int
    arm: str
    rate: float = 0.0
    """Peak learning rate; 0 of a model that is not trained."""
    num_steps: int = 0

    @property
    def name(self) -> str:
        """Name of its run."""
        words = [f"{self.num_layers} layers", self.arm]
        if self.num_steps:
            words.append(f"{self.num_steps} steps, rate {self.rate:g}")
        return re.sub(r"[^\w.-]+", "-", "-".join(words))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model that was measured."""

    training: Training
    training_flops: float
    selection_nats: float
    """Nats per token of the documentation that chooses rates."""
    nats: dict[str, list[float]]
    """Name of a text -> nats per token of each sequence that is measured."""
    agreement: dict[str, float]
    """Name of a text -> share of positions with the whole model's likeliest token."""
    is_right: list[bool]
    """Whether each question of `facts` is answered rightly."""
    cpu_seconds: float
    """Of the training, on one thread."""

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
    parser.add_argument("--piece", choices=PIECES, nargs="+", default=PIECES)
    parser.add_argument(
        "--folder", type=Path, default=Path("cheaper-study"), help="that of cheaper_choice.py"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--choice", type=Path, default=cheaper_choice.RESULTS, help="JSON file")
    parser.add_argument("--time", action="store_true", help="only measure times per token")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what is stored, and what is next"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        study = RecoveryStudy(options.folder, options.results, options.choice)
        if options.dry_run:
            for piece in options.piece:
                print(f"{piece}: {study.progress_of(piece)}")
        elif options.time:
            study.time()
        else:
            study.run(options.piece)
    except BaseException as error:
        return exit_code_of(error)
    return 0


def trainings_of(piece: str, config: ModelConfig) -> Iterator[Training]:
    """Yield the models of a piece in their order; `config` is that of the whole model.

    An early end leaves something complete: what layers are worth without training, then each
    student at one rate beside its control, then other arms and rates.
    """
    for num_layers in (NUM_LAYERS, *STUDENTS):
        yield Training(num_layers=num_layers, arm=PRUNED)
    steps = NUM_STEPS[piece]

    def student(num_layers: int, arm: str, rate: float) -> Training:
        return Training(num_layers=num_layers, arm=arm, rate=rate, num_steps=steps)

    def control(num_layers: int, rate: float) -> Training:
        num_steps = control_steps(config, num_layers, steps)
        return Training(num_layers=NUM_LAYERS, arm=CONTINUED, rate=rate, num_steps=num_steps)

    first, second = RATES
    if piece == "short":
        yield student(STUDENTS[0], BOTH, first)
        yield control(STUDENTS[0], first)
        for num_layers in STUDENTS[1:]:
            yield student(num_layers, BOTH, first)
        yield control(STUDENTS[0], second)
        yield student(COMPARED, BOTH, second)
        for arm in (CROSS_ENTROPY, KL):
            yield student(COMPARED, arm, first)
        for num_layers in STUDENTS:
            if num_layers != COMPARED:
                yield student(num_layers, BOTH, second)
        for arm in (CROSS_ENTROPY, KL):
            yield student(COMPARED, arm, second)
        return
    for arm in (BOTH, CROSS_ENTROPY, KL):
        for num_layers in STUDENTS:
            for rate in RATES:
                yield student(num_layers, arm, rate)
                if arm == BOTH:
                    yield control(num_layers, rate)


def control_steps(config: ModelConfig, num_layers: int, num_steps: int) -> int:
    """Return the steps of the whole model that have the FLOPs of a student's training with KL."""
    flops = num_steps * flops_per_token(config, num_layers, BOTH)
    return round(flops / flops_per_token(config, NUM_LAYERS, CONTINUED))


def flops_per_token(config: ModelConfig, num_layers: int, arm: str) -> float:
    """Return the training FLOPs per token, those of the teacher's passes included."""
    left_out = config.num_layers - num_layers
    schedule = config.corrections.leaving_out(range(left_out)) if left_out else None
    flops = training_flops_per_token(config, schedule, context_length=SEQUENCE_LENGTH)
    if arm in (BOTH, KL):
        teacher = inference_cost(config, context_length=SEQUENCE_LENGTH)
        flops += teacher.forward_flops_per_token
    return flops


class RecoveryStudy:
    """The models of the study, and what is stored of them.

    Args:
        folder: Holds texts, the workspace and its runs.
        results_file: The JSON file; one that exists is continued.
        choice_file: That of `cheaper_choice.py`.
    """

    def __init__(self, folder: Path, results_file: Path, choice_file: Path) -> None:
        self.folder = folder
        self.results_file = results_file
        self.choice_file = choice_file
        self.stored: dict[str, Any] = {"models": [], "times": {}, "spent": {}}
        if results_file.is_file():
            self.stored = json.loads(results_file.read_text("utf-8"))
        self.measured = measured_in(self.stored)

    @cached_property
    def _opened(self) -> tuple[Path, TokenStore]:
        return smollm2(self.folder)

    @cached_property
    def teacher(self) -> Decoder:
        """SmolLM2."""
        return load_model(self._opened[0])

    @cached_property
    def texts(self) -> dict[str, list[Batch]]:
        """Name of a text -> its held-out sequences; also those that choose rates."""
        checkpoint, documentation = self._opened
        settings = DataSettings(
            passage_characters=PASSAGE_CHARACTERS, tokenizer=str(checkpoint / "tokenizer.json")
        )
        # A model that was imported is trained on the newest tokens of its workspace, so these are
        # in another one.
        topics = open_data(prepare(settings, Workspace(self.folder / "help-topics")))
        assert isinstance(topics, TokenStore)
        self.stored["bits_per_nat"] = {
            name: bits_per_nat(data)
            for name, data in zip(TEXTS, (documentation, topics), strict=True)
        }
        self.stored["documentation"] = documentation.manifest.validation.model_dump(mode="json") | {
            "training_tokens": documentation.manifest.train.tokens
        }
        roles = {TEXTS[0]: REPORTS_STUDENTS, CHOOSES_RATES: CHOOSES_RATES}
        parts = {
            name: sequences_of(
                documentation, role, length=SEQUENCE_LENGTH, num_rounds=NUM_ROUNDS_OF_ROLES
            )
            for name, role in roles.items()
        }
        of_topics = topics.validation_batches(
            context_length=SEQUENCE_LENGTH,
            num_tokens=NUM_HELP_SEQUENCES * SEQUENCE_LENGTH,
            batch_size=1,
        )
        return {**parts, TEXTS[1]: [*of_topics]}

    @cached_property
    def likeliest(self) -> dict[str, list[Tensor]]:
        """Name of a text -> the teacher's likeliest tokens of each sequence."""
        return {name: _read(self.teacher, self.texts[name])[1] for name in TEXTS}

    def progress_of(self, piece: str) -> str:
        """Return how many models of a piece are stored, and which is next."""
        trainings = [*trainings_of(piece, self.teacher.config)]
        left = [training.name for training in trainings if training not in self.measured]
        done = f"{len(trainings) - len(left)} of {len(trainings)} stored"
        return f"{done}, next: {left[0]}" if left else f"{done}, complete"

    def run(self, pieces: Sequence[str]) -> None:
        """Train and measure the models of some pieces that are not stored."""
        for piece in pieces:
            for training in trainings_of(piece, self.teacher.config):
                if training not in self.measured:
                    self._make(training)

    def _make(self, training: Training) -> None:
        """Train a model, measure it, and store the result."""
        started = time.process_time()
        try:
            folder = self._trained(training)
        finally:
            # A training that is interrupted counts from its first step on.
            spent = self.stored["spent"].get(training.name, 0.0) + time.process_time() - started
            self.stored["spent"][training.name] = spent
            self.store()
        result = self._measure(training, folder, spent)
        self.measured[training] = result
        self.stored["models"].append(result.to_dict())
        self.store()
        print(
            f"{training.name}: {sum(result.is_right)} right, "
            f"{sum(result.nats[TEXTS[0]]) / len(result.nats[TEXTS[0]]):.4f} nats, "
            f"{spent:.0f} s",
            flush=True,
        )

    def store(self) -> None:
        """Write all that is known."""
        text = json.dumps(self.stored, indent=1)
        # A list of numbers is a line.
        text = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
        write_text(self.results_file, text + "\n")

    def _trained(self, training: Training) -> Path:
        """Return the folder of a model, trained if its arm says so."""
        checkpoint = self._opened[0]
        workspace = Workspace(self.folder / "workspace")
        if training.arm == PRUNED:
            if training.num_layers == NUM_LAYERS:
                return checkpoint
            folder = self.folder / "pruned" / str(training.num_layers)
            without_layers(self.teacher, self._left_out(training)).save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(checkpoint / name, folder / name)
            return folder
        settings = self._settings(training)
        if training.arm == CONTINUED:
            return pretrain(
                settings, workspace=workspace, source=checkpoint, name=training.name, local=True
            ).checkpoint
        schedule = self.teacher.schedule.leaving_out(n - 1 for n in self._left_out(training))
        return distill(
            settings, schedule=schedule, workspace=workspace, teacher=checkpoint,
            name=training.name, local=True,
        ).checkpoint  # fmt: skip

    def _left_out(self, training: Training) -> list[int]:
        """Return the layers that a student lacks, the first being 1: of the long piece by the way
        that is best, else by the loss, measured once."""
        choices = read_choices(self.choice_file)[SMOLLM2]
        way = best_way(choices) if training.num_steps == NUM_STEPS["long"] else LOSS
        return choices.layers_left_out(way, NUM_LAYERS - training.num_layers)

    def _settings(self, training: Training) -> Settings:
        """Return the settings of a training."""
        recipe = "training" if training.arm == CONTINUED else "distillation.training"
        changes = [
            f"{recipe}.num_steps={training.num_steps}", f"{recipe}.learning_rate={training.rate}",
        ]  # fmt: skip
        if training.arm == CONTINUED:
            changes += ["model.method=vanilla", *settings_of_documentation(self.folder)]
        if training.arm == CROSS_ENTROPY:
            changes.append("distillation.control=cross_entropy")
        if training.arm == KL:
            changes += [f"distillation.kl_weight={KL_ALONE}", f"{recipe}.clip_norm={KL_ALONE}"]
        return read_settings(SETTINGS, changes)

    def _measure(self, training: Training, folder: Path, cpu_seconds: float) -> Measured:
        decoder = load_model(folder)
        nats: dict[str, list[float]] = {}
        agreement: dict[str, float] = {}
        for name in TEXTS:
            nats[name], likeliest = _read(decoder, self.texts[name])
            same = [
                (ours == theirs).double().mean()
                for ours, theirs in zip(likeliest, self.likeliest[name], strict=True)
            ]
            agreement[name] = float(torch.stack(same).mean())
        selection, _ = _read(decoder, self.texts[CHOOSES_RATES])
        settings = read_settings(SETTINGS)
        evaluation = evaluate(settings, workspace=self.folder / "workspace", models=[folder])
        [result] = evaluation.evaluations.values()
        tokens = training.num_steps * settings.training.num_tokens_per_step
        per_token = flops_per_token(self.teacher.config, training.num_layers, training.arm)
        return Measured(
            training=training,
            training_flops=tokens * per_token,
            selection_nats=sum(selection) / len(selection),
            nats=nats,
            agreement=agreement,
            is_right=[value > 0 for value in result.results["facts"].values["acc"]],
            cpu_seconds=cpu_seconds if training.num_steps else 0.0,
        )

    def time(self) -> None:
        """Measure the CPU time of a token, one after the other, for each number of layers."""
        decoders = {NUM_LAYERS: self.teacher}
        for num_layers in STUDENTS:
            pruned = Training(num_layers=num_layers, arm=PRUNED)
            decoders[num_layers] = without_layers(self.teacher, self._left_out(pruned))
        prompt = self.texts[TEXTS[0]][0].input_ids[:, :NUM_TIMED_TOKENS]
        least = dict.fromkeys(decoders, math.inf)
        for _ in range(NUM_TIMINGS):  # In turns, as other programs run beside.
            for num_layers, decoder in decoders.items():
                started = time.process_time()
                decoder.generate(prompt, max_new_tokens=NUM_TIMED_TOKENS)
                seconds = time.process_time() - started
                least[num_layers] = min(least[num_layers], seconds / NUM_TIMED_TOKENS)
        for num_layers, decoder in decoders.items():
            self.stored["times"][str(num_layers)] = {
                "cpu_ms_per_token": 1000 * least[num_layers],
                "num_parameters": num_parameters(decoder.config),
                "kv_bytes_per_token": inference_cost(decoder.config).kv_bytes_per_token,
            }
        self.store()
        print(self.stored["times"])


@torch.no_grad()
def _read(decoder: Decoder, batches: Sequence[Batch]) -> tuple[list[float], list[Tensor]]:
    """Return for each sequence the nats per token, and the likeliest token of each position."""
    nats: list[float] = []
    likeliest: list[Tensor] = []
    for batch in batches:
        [logits] = decoder(batch.input_ids)
        [targets] = batch.input_ids
        nats.append(functional.cross_entropy(logits[:-1], targets[1:]).item())
        likeliest.append(logits.argmax(-1))
    return nats, likeliest


def measured_in(stored: Mapping[str, Any]) -> dict[Training, Measured]:
    """Return what the object of a results file holds."""
    results = [Measured.from_dict(values) for values in stored["models"]]
    return {result.training: result for result in results}


if __name__ == "__main__":
    sys.exit(main())
