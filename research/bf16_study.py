"""`python research/bf16_study.py`: does training in bf16 on a CPU cost quality?

A processor with bf16 instructions trains models of width 256 and more in two thirds of the time.
For each task (the demo's, and that of `sweep claims`), each method and each seed, two models are
trained that differ in `training.precision` alone, and are evaluated in float32. `bf16.md` states
the rule, which was written before the first run, and the result.

Nothing is trained twice: the same command resumes after an interruption. It takes about an hour on
two cores; `--tasks demo` alone takes ten minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

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
    options = parser.parse_args(arguments)
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
