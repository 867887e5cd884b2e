"""A sweep of two trials with one GPU each, by `iiet-orch sweep-iterations`.

With two GPUs both trials run at once. With one GPU they run one after the other, and in a second
sweep at once, with half of it each. On a CPU the sweep runs without GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.commands import Commands, RunRecord
from benchmarks.gpu.finding import Figure, Finding
from benchmarks.gpu.setup import Setup

NUM_TRIALS = 2


def sweep(setup: Setup) -> Iterator[Finding]:
    """Run the sweep with each share of a GPU per trial that this machine allows."""
    if setup.device == "cpu":
        yield _run(setup, "on CPUs", None)
        return
    yield _run(setup, "one GPU for each trial", 1.0)
    if setup.num_gpus == 1:
        yield _run(setup, "half a GPU for each trial", 0.5)


def _run(setup: Setup, what: str, gpus_per_trial: float | None) -> Finding:
    # A workspace of its own: another sweep's finished trials would be found again.
    commands = Commands(setup.folder / what.replace(" ", "-"))
    steps = 4 if setup.is_toy else 60
    settings = setup.command_settings | {
        "sweep.methods": "[vanilla, iiet]",
        "sweep.iterations": "[1]",
        "training.num_steps": steps,
        "training.checkpoint_every_steps": steps,
    }
    if gpus_per_trial:
        settings["cluster.num_gpus"] = min(setup.num_gpus, NUM_TRIALS)
        settings["sweep.gpus_per_trial"] = gpus_per_trial
    seconds = commands.run("sweep-iterations", "--name", "two", settings=settings)
    runs = [RunRecord(path) for path in sorted(commands.workspace.runs.iterdir())]
    figures: dict[str, Figure] = {"seconds": seconds, "overlap (s)": _overlap(runs)}
    starts = [run.events("started")[0] for run in runs]
    if gpus_per_trial:
        figures["GPUs of the trials"] = " and ".join(str(start["visible_gpus"]) for start in starts)
    return Finding(
        what=what,
        figures=figures,
        problem=_problem(setup, commands.workspace.sweeps / "two", starts, gpus_per_trial),
    )


def _problem(
    setup: Setup, folder: Path, starts: list[dict[str, object]], gpus_per_trial: float | None
) -> str | None:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"]
    finished = [result for result in results if result["quality"].get("accuracy") is not None]
    if len(finished) != NUM_TRIALS:
        return f"{len(finished)} of {NUM_TRIALS} trials have an accuracy"
    if devices := {str(start["device"]) for start in starts} - {setup.device}:
        return f"trials ran on {', '.join(devices)}, not on {setup.device}"
    if gpus_per_trial == 1.0 and setup.num_gpus >= NUM_TRIALS:
        gpus = [start["visible_gpus"] for start in starts]
        if len(set(gpus)) != NUM_TRIALS:
            return f"both trials ran on GPU {gpus[0]}"
    return None


def _overlap(runs: list[RunRecord]) -> float:
    """Return the seconds in which both trials trained."""
    spans: list[tuple[int, int]] = [
        (run.records[0]["time"], run.records[-1]["time"]) for run in runs
    ]
    overlap = min(end for _, end in spans) - max(start for start, _ in spans)
    return max(0.0, overlap / 1000)
