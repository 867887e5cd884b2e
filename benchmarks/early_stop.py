"""`python -m benchmarks.early_stop SWEEP_FOLDER`: what ending trials early would have saved.

Reads a finished sweep that stopped nothing: its plan, the journals of its trials, their results.
Trains nothing. Students of a threshold sweep: replays the rule of `sweep.stop_dominated` with the
recorded losses and times, and asks whether the front without the stopped trials is the same, by
loss and by accuracy. In two orders: the costliest first, as sweeps start that stop nothing, and the
cheapest first, as those that do, because only a finished trial that costs no more can end another
one. Models from scratch at several learning rates: replays `sweep.asha`, and asks whether each
model's best rate was trained to its end.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from iiet.cost import inference_cost
from orchestrator.analysis.axes import Axes
from orchestrator.analysis.pareto import find_front
from orchestrator.analysis.stop_replay import Curve, Replay, asha, dominated, replay_stops
from orchestrator.plan import PlannedTrial, exact_cost
from orchestrator.training.job import DONE_NAME
from orchestrator.trial import TrialResult
from orchestrator.trial_referee import other_rates_of, rivals_of, validation_losses
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
    plan = read_json(options.folder / "plan.json")
    trials = [_here(PlannedTrial(**values), options.folder.absolute()) for values in plan["trials"]]
    is_of_rates = plan.get("kind") == "iterations"
    rivals = other_rates_of if is_of_rates else rivals_of
    curves = [curve for trial in trials if (curve := curve_of(trial, trials, rivals))]
    if not curves:
        print(f"{options.folder} has no finished trainings to replay", file=sys.stderr)
        return 2
    rows = _replay_rates(curves, options) if is_of_rates else _replay(curves, trials, options)
    looks = sum(len(curve.losses) for curve in curves)
    facts = {"folder": str(options.folder), "trainings": len(curves), "looks": looks}
    start = {"first rung": options.first_rung} if is_of_rates else {"grace": options.grace}
    _print({**facts, **start, "at once": options.at_once}, rows)
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": rows}, indent=2) + "\n")
    return 0


def _replay(
    curves: Sequence[Curve], trials: Sequence[PlannedTrial], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Replay students in two orders, and compare their fronts."""
    costs = {trial.label: _cost(trial) for trial in trials}
    cheapest_first = sorted(curves, key=lambda curve: costs[curve.label])
    rows = []
    for order, own in (
        ("costliest first", cheapest_first[::-1]),
        ("cheapest first", cheapest_first),
    ):
        replay = replay_stops(own, dominated(options.grace), at_once=options.at_once)
        fronts = {
            name: _fronts(trials, set(replay.verdicts), Axes(quality=quality))
            for name, quality in QUALITIES.items()
        }
        rows.append({"order": order, **_facts(replay, own), **fronts})
    return rows


def _replay_rates(curves: Sequence[Curve], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Replay models at several rates, and look for each one's best."""
    rule = asha(options.first_rung, options.reduction_factor)
    replay = replay_stops(curves, rule, at_once=options.at_once)
    final = {curve.label: curve.final_loss for curve in curves}
    best = {min({c.label, *c.rivals} & final.keys(), key=lambda n: final[n]) for c in curves}
    lost = sorted(best & replay.verdicts.keys())
    kept = {"unchanged": not lost, "lost": lost}
    return [{"order": "as planned", **_facts(replay, curves), "best rates": kept}]


def curve_of(
    trial: PlannedTrial,
    trials: Sequence[PlannedTrial],
    rivals: Callable[[PlannedTrial, Sequence[PlannedTrial]], Mapping[str, str]],
) -> Curve | None:
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
        rivals=frozenset(rivals(trial, trials)),
    )


def _facts(replay: Replay, curves: Sequence[Curve]) -> dict[str, Any]:
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
        "lost": sorted(lost),
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


def _here(trial: PlannedTrial, sweep_folder: Path) -> PlannedTrial:
    """Return a trial of a workspace that may have been moved."""
    kind, name = Path(trial.folder).parts[-2:]
    folder = str(sweep_folder.parent.parent / kind / name)
    return replace(trial, folder=folder, job=trial.job and {**trial.job, "run_folder": folder})


def _print(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    table = Table(title="early_stop", caption=", ".join(f"{k}: {v}" for k, v in facts.items()))
    kept = [name for name in rows[0] if isinstance(rows[0][name], dict) and name != "stopped"]
    for title in ("order", "stopped", "steps saved", "seconds saved", *kept):
        table.add_column(title, overflow="fold")
    for row in rows:
        found = [row[name] for name in kept]
        table.add_row(
            row["order"],
            str(len(row["stopped"])),
            f"{row['steps saved']:.1%}",
            f"{row['seconds saved']:.1%}",
            *("" if one is None else _verdict(one) for one in found),
        )
    console.print(table)
    for label, text in rows[-1]["stopped"].items():
        console.print(f"  {label} {text}", markup=False)


def _verdict(found: dict[str, Any]) -> str:
    return "unchanged" if found["unchanged"] else f"lost: {', '.join(found['lost'])}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.early_stop", description=__doc__)
    parser.add_argument("folder", type=Path, help="of a finished sweep, with its plan.json")
    parser.add_argument("--grace", type=float, default=0.5, help="as sweep.grace_fraction")
    parser.add_argument("--first-rung", type=float, default=0.25, help="as sweep.asha_first_rung")
    parser.add_argument("--reduction-factor", type=int, default=2, help="as of ASHA's settings")
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
