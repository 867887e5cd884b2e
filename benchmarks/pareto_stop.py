"""`python -m benchmarks.pareto_stop SWEEP_FOLDER`: what ending dominated trials would have saved.

Reads a finished sweep that stopped nothing: its plan, the journals of its trials, their results.
Replays the rule of `sweep.stop_dominated` with the recorded losses and times, and asks whether the
front without the stopped trials is the same, by loss and by accuracy. Trains nothing. In two
orders: the costliest first, as sweeps start that stop nothing, and the cheapest first, as those
that do, because only a finished trial that costs no more can end another one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iiet.cost import inference_cost
from orchestrator.analysis.axes import Axes
from orchestrator.analysis.pareto import find_front
from orchestrator.analysis.stop_replay import Curve, Replay, replay_stops
from orchestrator.plan import PlannedTrial, exact_cost
from orchestrator.training.job import DONE_NAME
from orchestrator.trial import TrialResult
from orchestrator.trial_referee import rivals_of, validation_losses
from orchestrator.workspace import read_json

QUALITIES = {"loss": "quality/validation_loss", "accuracy": "quality/accuracy"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Replay a sweep and print what came out.

    Args:
        arguments: the command line's, without the program's name.

    Returns:
        The exit code: 0, or 2 for a folder without a finished sweep.
    """
    options = _parse(arguments)
    trials = _trials(options.folder)
    curves = [curve for trial in trials if (curve := curve_of(trial, trials))]
    if not curves:
        print(f"{options.folder} has no finished trainings to replay", file=sys.stderr)
        return 2
    costs = {trial.label: _cost(trial) for trial in trials}
    cheapest_first = sorted(curves, key=lambda curve: costs[curve.label])
    rows = []
    for order, curves in (
        ("costliest first", cheapest_first[::-1]),
        ("cheapest first", cheapest_first),
    ):
        replay = replay_stops(curves, at_once=options.at_once, grace_fraction=options.grace)
        rows.append({"order": order, **_facts(replay, curves, trials)})
    looks = sum(len(curve.losses) for curve in curves)
    facts = {"folder": str(options.folder), "trainings": len(curves), "looks": looks}
    _print({**facts, "grace": options.grace, "at once": options.at_once}, rows)
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    return 0


def curve_of(trial: PlannedTrial, trials: Sequence[PlannedTrial]) -> Curve | None:
    """Return a trial's training as it was recorded; None if it is not trained to its end."""
    done = read_json(Path(trial.folder) / DONE_NAME)
    if not trial.job or not done or not trial.result():
        return None
    num_steps = int(trial.job["recipe"]["num_steps"])
    losses = validation_losses(Path(trial.folder))
    losses = {step: loss for step, loss in losses.items() if step < num_steps}
    return Curve(
        label=trial.label,
        num_steps=num_steps,
        seconds=float(done["train_seconds"]),
        losses=losses,
        final_loss=float(done["validation_loss"]),
        rivals=frozenset(rivals_of(trial, trials)),
    )


def _facts(
    replay: Replay, curves: Sequence[Curve], trials: Sequence[PlannedTrial]
) -> dict[str, Any]:
    steps = sum(curve.num_steps for curve in curves)
    not_made = sum(v.num_steps - v.step for v in replay.verdicts.values())
    return {
        "stopped": {
            curve.label: f"{replay.verdicts[curve.label].text}; it came to {curve.final_loss:.3f}"
            for curve in curves
            if curve.label in replay.verdicts
        },
        "steps saved": not_made / steps,
        "seconds saved": replay.share_of_seconds,
        **{
            name: _fronts(trials, set(replay.verdicts), Axes(quality=quality))
            for name, quality in QUALITIES.items()
        },
    }


def _fronts(trials: Sequence[PlannedTrial], stopped: set[str], axes: Axes) -> dict[str, Any] | None:
    """Compare the front of all trials with that of those that were not stopped."""
    all_results = _results(trials)
    kept = [result for result in all_results if result.label not in stopped]
    full, left = find_front(all_results, axes), find_front(kept, axes)
    if not full.placed:
        return None
    lost = {p.result.label for p in full.members} - {p.result.label for p in left.members}
    return {
        "unchanged": not lost,
        "lost from the front": sorted(lost),
        "hypervolume": full.hypervolume,
        "hypervolume without the stopped": left.hypervolume,
    }


def _results(trials: Sequence[PlannedTrial]) -> list[TrialResult]:
    full = max(trials, key=_cost).config()
    return [
        replace(result, cost=exact_cost(trial.config(), full))
        for trial in trials
        if (result := trial.result())
    ]


def _cost(trial: PlannedTrial) -> float:
    return inference_cost(trial.config()).evaluations_per_token


def _trials(folder: Path) -> list[PlannedTrial]:
    plan = read_json(folder / "plan.json") or {"trials": []}
    return [_here(PlannedTrial(**values), folder.absolute()) for values in plan["trials"]]


def _here(trial: PlannedTrial, sweep_folder: Path) -> PlannedTrial:
    """Return a trial of a workspace that may have been moved."""
    kind, name = Path(trial.folder).parts[-2:]
    folder = str(sweep_folder.parent.parent / kind / name)
    return replace(trial, folder=folder, job=trial.job and {**trial.job, "run_folder": folder})


def _print(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    table = Table(title="pareto_stop", caption=", ".join(f"{k}: {v}" for k, v in facts.items()))
    for title in ("order", "stopped", "steps saved", "seconds saved", *QUALITIES):
        table.add_column(title, overflow="fold")
    for row in rows:
        fronts = [row[name] for name in QUALITIES]
        table.add_row(
            row["order"],
            str(len(row["stopped"])),
            f"{row['steps saved']:.1%}",
            f"{row['seconds saved']:.1%}",
            *("" if front is None else _verdict(front) for front in fronts),
        )
    console.print(table)
    for label, text in rows[-1]["stopped"].items():
        console.print(f"  {label} {text}", markup=False)


def _verdict(front: dict[str, Any]) -> str:
    if front["unchanged"]:
        return "front unchanged"
    return f"lost from the front: {', '.join(front['lost from the front'])}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pareto_stop", description=__doc__)
    parser.add_argument("folder", type=Path, help="of a finished sweep, with its plan.json")
    parser.add_argument("--grace", type=float, default=0.5, help="as sweep.grace_fraction")
    parser.add_argument("--at-once", type=int, default=2, help="trials side by side")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store all numbers there")
    options = parser.parse_args(arguments)
    if not (options.folder / "plan.json").is_file():
        parser.error(f"{options.folder} has no plan.json: it is no sweep's folder")
    if not 0 <= options.grace <= 1 or options.at_once < 1:
        parser.error("--grace is a share from 0 to 1, --at-once a number from 1 on")
    return options


if __name__ == "__main__":
    sys.exit(main())
