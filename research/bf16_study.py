"""`python research/bf16_study.py`: does training in bf16 on a CPU cost quality?

A processor with bf16 instructions trains models of width 256 in two thirds of the time (`--time`).
For each task (the demo's, and that of `sweep claims`), each method and each seed, two models are
trained that differ in `training.precision` alone, and are evaluated in float32. `bf16.md` states
the rule, which was written before the first run, and the result.

Nothing is trained twice: the same command resumes after an interruption. It takes about an hour on
two cores; `--tasks demo` alone takes ten minutes. `--time` trains nothing: it prints the CPU time
of a step in bf16 as a multiple of that in fp32, for several widths.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from iiet import Decoder, preset
from orchestrator import Workspace, evaluate, prepare, pretrain, read_settings
from orchestrator.cli.app import exit_code_of
from orchestrator.cli.session import Session, open_session
from orchestrator.terminal.render import print_line
from orchestrator.workspace.files import write_text

TASKS = ("demo", "claims")
"""Shipped sweeps whose teachers' recipe and task are taken."""
METHODS = {"iiet": ["model.corrections=3"], "vanilla": ["model.method=vanilla"]}
"""Method -> what is changed in the sweep's model."""
PRECISIONS = ("fp32", "bf16")
WIDTHS = (64, 128, 256, 512)
"""Widths whose steps `--time` times."""
WORST_MEAN = -0.01
"""Least mean difference of accuracy over seeds, bf16 minus fp32, of a task and method."""
WORST_SEED = -0.03
"""Least difference of one seed."""
RESULTS = Path(__file__).with_name("bf16_study.json")


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """One model of the study, and what was measured."""

    task: str
    method: str
    seed: int
    precision: str
    accuracy: float
    """Share of right answers on the task's test items, from 0 to 1."""
    validation_loss: float
    """Nats per token; not a number if the training diverged."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study, or what is left of it; return the exit code as `iiet-orch` does."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workspace", type=Path, help="folder for all that is made")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file to write")
    parser.add_argument("--time", action="store_true", help="time steps instead")
    options = parser.parse_args(arguments)
    if options.time:
        for width in WIDTHS:
            print(f"width {width}: bf16 takes {time_ratio(width):.2f} of the CPU time of fp32")
        return 0
    try:
        with open_session(options.workspace, "bf16-study", verbose=None, dry_run=False) as session:
            run_study(session, options.tasks, options.seeds, options.changes, options.results)
    except BaseException as error:
        return exit_code_of(error)
    return 0


def run_study(
    session: Session,
    tasks: Sequence[str],
    seeds: Sequence[int],
    changes: Sequence[str],
    results_file: Path,
) -> None:
    """Train and evaluate each model, and write the results after each task and method."""
    models: list[TrainedModel] = []
    for task in tasks:
        for method in METHODS:
            for seed in seeds:
                for precision in PRECISIONS:
                    models.append(train_model(session, task, method, seed, precision, changes))
            results = {"models": [vars(model) for model in models], "verdicts": verdicts(models)}
            write_text(results_file, json.dumps(results, indent=1) + "\n")
            print_line(session.console, f"study: {results_file}")


def train_model(
    session: Session, task: str, method: str, seed: int, precision: str, changes: Sequence[str]
) -> TrainedModel:
    """Train one model and evaluate it in float32; a finished one is found again."""
    settings = read_settings(
        task,
        [
            *METHODS[method],
            f"training.seed={seed}",
            f"training.precision={precision}",
            "evaluation.precision=fp32",
            *changes,
        ],
    )
    workspace: Workspace = session.workspace
    prepare(settings, workspace=workspace, progress=session.progress)
    run = pretrain(settings, workspace=workspace, progress=session.progress, local=True)
    evaluations = evaluate(
        settings, models=[run.checkpoint], workspace=workspace, progress=session.progress
    )
    (measured,) = evaluations.models
    return TrainedModel(
        task=task,
        method=method,
        seed=seed,
        precision=precision,
        accuracy=measured["quality"]["accuracy"],
        validation_loss=run.validation_loss,
    )


def time_ratio(width: int, num_turns: int = 7) -> float:
    """Return the CPU time of a step in bf16 over that in fp32, one thread, the median of turns.

    The model is an IIET of two layers, r = 3; a step has 512 tokens of 16 sequences.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = preset("tiny", dim=width, num_heads=4, num_layers=2, schedule=3, context_length=32)
    decoder = Decoder(config)
    optimizer = torch.optim.AdamW(decoder.parameters())
    tokens = torch.randint(config.vocab_size, (16, 32))

    def step_seconds(*, is_bf16: bool) -> float:
        started = time.process_time()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
            loss = decoder.loss(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - started

    step_seconds(is_bf16=True)  # Compiles kernels, and makes the optimizer's moments.
    return median(
        step_seconds(is_bf16=True) / step_seconds(is_bf16=False) for _ in range(num_turns)
    )


def verdicts(models: Sequence[TrainedModel]) -> list[dict[str, Any]]:
    """Return whether bf16 holds for each task and method, by the rule in `bf16.md`."""
    rows = []
    for task, method in sorted({(model.task, model.method) for model in models}):
        compared = [model for model in models if (model.task, model.method) == (task, method)]
        accuracy = {(model.seed, model.precision): model.accuracy for model in compared}
        seeds = sorted({seed for seed, _ in accuracy})
        differences = [accuracy[seed, "bf16"] - accuracy[seed, "fp32"] for seed in seeds]
        has_diverged = any(math.isnan(model.validation_loss) for model in compared)
        holds = (
            not has_diverged and mean(differences) >= WORST_MEAN and min(differences) >= WORST_SEED
        )
        rows.append({"task": task, "method": method, "differences": differences, "holds": holds})
    return rows


if __name__ == "__main__":
    sys.exit(main())
