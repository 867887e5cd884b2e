"""`python research/gates_study.py`: how should the gates of an identity start learn?

A plain Llama of two layers is trained on induction over five hops, once per seed. Its weights then
become an IIET with r = 3 and `start: identity`, which is trained on with each kind of damping (one
number or one per channel) and each factor of the gates' learning rate. `gates.md` states the rules,
which were written before their first runs, and the results.

Nothing is trained twice: the same command resumes after an interruption. It takes about twenty
minutes of one core; with `--steps 700 --results gates_study_700.json`, forty.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from training_loop import train_decoder

from iiet import Decoder, ModelConfig, preset
from iiet.model.facts import ImplicitEulerOptions
from orchestrator.cli.app import exit_code_of
from orchestrator.data.depth import write_depth
from orchestrator.data.mixture import open_data
from orchestrator.data.store import PreparedData
from orchestrator.settings import DataSettings, TrainingSettings
from orchestrator.settings.data import DepthSettings
from orchestrator.training.objective import validation_metrics
from orchestrator.training.world import World
from orchestrator.workspace.files import write_text
from orchestrator.workspace.journal import ACCURACY_METRIC

HOPS = 5
LENGTH = 64
NUM_SEQUENCES = 64
"""Sequences of a step."""
NUM_VALIDATION_SEQUENCES = 512
KINDS = ("scalar", "vector")
FACTORS = (1.0, 10.0, 30.0)
CORRECTIONS = 3
EQUAL_WITHIN = 0.01
"""Mean accuracies that differ by at most this count as equal."""
RESULTS = Path(__file__).with_name("gates_study.json")


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """One model of the study, and what was measured."""

    kind: str
    """`scalar` or `vector`; `plain` for a source."""
    factor: float
    seed: int
    accuracy: float
    """Share of right answers on held-out sequences, from 0 to 1."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or what is left of it; return the exit code as `iiet-orch` does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("gates-study"), help="for the sources")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N")
    parser.add_argument("--source-steps", type=int, default=2000, metavar="N")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of each retrofit")
    parser.add_argument(
        "--at-most", type=int, default=sys.maxsize, metavar="N", help="trainings of this call"
    )
    options = parser.parse_args(arguments)
    try:
        run_study(options)
    except BaseException as error:
        return exit_code_of(error)
    return 0


def run_study(options: argparse.Namespace) -> None:
    """Train each model that the results lack, and write them after each."""
    torch.set_num_threads(1)
    depth = DepthSettings(tasks=(f"phop_{HOPS}",), length=LENGTH)
    data = open_data(write_depth(DataSettings(source="depth", depth=depth), options.folder))
    models: list[TrainedModel] = []
    if options.results.is_file():
        stored = json.loads(options.results.read_text(encoding="utf-8"))["models"]
        models = [TrainedModel(**values) for values in stored]
    wanted = [("plain", 1.0, seed) for seed in options.seeds]
    wanted += [
        (kind, factor, seed) for seed, kind, factor in product(options.seeds, KINDS, FACTORS)
    ]
    finished = {(model.kind, model.factor, model.seed) for model in models}
    for kind, factor, seed in [one for one in wanted if one not in finished][: options.at_most]:
        source = options.folder / f"plain-{seed}"
        if kind == "plain":
            decoder = plain_model(data, seed)
            recipe = recipe_of(options.source_steps, seed)
        else:
            decoder = retrofit(Decoder.from_pretrained(source), kind)
            recipe = recipe_of(options.steps, seed, gate_rate_factor=factor)
        # A source sees other sequences than a retrofit.
        data_seed = seed + (1000 if kind == "plain" else 0)
        train_decoder(
            decoder,
            data,
            recipe,
            context_length=LENGTH,
            num_sequences=NUM_SEQUENCES,
            data_seed=data_seed,
        )
        if kind == "plain":
            decoder.save_pretrained(source)
        accuracy = accuracy_of(decoder, data)
        models.append(TrainedModel(kind=kind, factor=factor, seed=seed, accuracy=accuracy))
        results = {"models": [vars(model) for model in models], "chosen": choose(models)}
        write_text(options.results, json.dumps(results, indent=1) + "\n")
        print(f"{kind}, factor {factor:g}, seed {seed}: {accuracy:.1%}", flush=True)


def recipe_of(num_steps: int, seed: int, **changes: float) -> TrainingSettings:
    """Return the recipe of a model, all but its defaults."""
    return TrainingSettings(num_steps=num_steps, learning_rate=2e-3, seed=seed, **changes)


def plain_model(data: PreparedData, seed: int) -> Decoder:
    """Return a plain Llama with random weights."""
    torch.manual_seed(seed)
    config = preset(
        "tiny", method="vanilla", schedule=None, vocab_size=data.vocab_size, dim=64, num_layers=2,
        num_heads=4, ffn_dim=176, context_length=LENGTH,
    )  # fmt: skip
    return Decoder(config)


def retrofit(plain: Decoder, kind: str) -> Decoder:
    """Return an IIET with an identity start and the weights of a plain model."""
    options = ImplicitEulerOptions(start="identity", learn_damping=kind)  # type: ignore[arg-type]
    config: ModelConfig = replace(
        plain.config,
        method="iiet",
        schedule=CORRECTIONS,  # type: ignore[arg-type]
        method_options=options,
    )
    decoder = Decoder(config)
    decoder.load_state_dict(plain.state_dict(), strict=False)
    return decoder


def accuracy_of(decoder: Decoder, data: PreparedData) -> float:
    """Return the share of right answers on held-out sequences."""
    batches = data.validation_batches(
        context_length=LENGTH,
        num_tokens=NUM_VALIDATION_SEQUENCES * LENGTH,
        batch_size=NUM_SEQUENCES,
    )
    metrics = validation_metrics(
        decoder, list(batches), decoder.schedule, precision="fp32", world=World()
    )
    return metrics[ACCURACY_METRIC]


def choose(models: Sequence[TrainedModel]) -> dict[str, str | float] | None:
    """Return the kind and factor that the rule in `gates.md` takes; None while runs are missing."""
    seeds = {model.seed for model in models if model.kind == "plain"}
    means: dict[tuple[str, float], float] = {}
    for kind, factor in product(KINDS, FACTORS):
        accuracies = [m.accuracy for m in models if (m.kind, m.factor) == (kind, factor)]
        if not seeds or len(accuracies) < len(seeds):
            return None
        means[kind, factor] = mean(accuracies)
    best = max(means.values())
    # In the order of `KINDS` and `FACTORS`: fewer weights, then the rate closest to the others'.
    kind, factor = next(choice for choice in means if means[choice] >= best - EQUAL_WITHIN)
    return {"learn_damping": kind, "gate_rate_factor": factor}


if __name__ == "__main__":
    sys.exit(main())
