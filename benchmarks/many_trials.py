"""Time and memory of a sweep's bookkeeping against its number of trials.

The trials are simulated; measured is what the sweep's own process does with them. `planning` makes
the plan and its price, `a look` shows the progress of 64 running trials, `front over time` takes in
one trial after another, and `report` writes all files. Each size has a process of its own, for its
memory. A ratio of 1 means that the time per trial is that of the smallest size.
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.report import Goal, Quantity, Report, Row, checked
from benchmarks.simulated_sweep import NUM_STEPS, SimulatedSweep, write_journal
from benchmarks.timing import Spread
from orchestrator.reporting.pareto import find_front
from orchestrator.reporting.results import StoredSweep, result_table
from orchestrator.reporting.sweep_report import write_sweep_report
from orchestrator.reporting.training_curves import read_history_curves
from orchestrator.sweeping.front_history import FrontHistory
from orchestrator.sweeping.round_progress import RoundProgress
from orchestrator.sweeping.trial_states import trial_states
from orchestrator.terminal.progress import Progress

__all__ = ["measure"]

_SIZES, _QUICK_SIZES = (100, 1_000, 10_000), (70, 140)
_NUM_RUNNING = 64
_NUM_LOOKS = 20
_STAGES = ("planning", "a look", "front over time", "report")
_GIB = 2**30


def measure(*, quick: bool, say: Callable[[str], None]) -> Report:
    """Measure the bookkeeping of simulated sweeps.

    `quick`: tiny sizes, which only test the benchmark. `say` reports progress.
    """
    sizes = _QUICK_SIZES if quick else _SIZES
    found = {}
    for size in sizes:
        say(f"many_trials: {size:,} trials")
        command = [sys.executable, "-m", "benchmarks.many_trials", str(size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[size] = json.loads(done.stdout)
    smallest, largest = sizes[0], sizes[-1]
    rows = []
    for size in sizes:
        for stage in _STAGES:
            # A look depends on the running trials, whose number is the same for all sizes.
            growth = 1.0 if stage == "a look" else size / smallest
            rows.append(
                Row(
                    what=f"{size:,} trials: {stage}",
                    quantities=(_quantity(stage, found[size][stage], "s"),),
                    ratio=_exact(found[size][stage] / found[smallest][stage] / growth),
                    goal=None if quick or size == smallest else Goal("at most", 1.5),
                )
            )
    rows += [
        Row(
            what=f"{largest:,} trials: {stage} / one minute",
            quantities=(_quantity(stage, found[largest][stage], "s"),),
            ratio=_exact(found[largest][stage] / 60),
            goal=None if quick else Goal("at most", 1.0),
        )
        for stage in _STAGES
    ]
    rows += [
        Row(
            what=f"{size:,} trials: peak memory / 1 GiB",
            quantities=(_quantity("with all libraries", found[size]["bytes"] / _GIB, "GiB"),),
            ratio=_exact(found[size]["bytes"] / _GIB),
            goal=None if quick else Goal("at most", 1.0),
        )
        for size in sizes
    ]
    setting = f"{_NUM_RUNNING} of the trials run; two tasks of 700 items; without MLflow"
    difference = max(numbers["difference"] for numbers in found.values())
    check = checked("hypervolumes of the recorded front and the whole one", difference, 1e-12)
    return Report(title="many_trials", setting=setting, rows=tuple(rows), checks=(check,))


def _quantity(label: str, value: float, unit: str) -> Quantity:
    return Quantity(label, _exact(value), unit)


def _exact(value: float) -> Spread:
    return Spread.of([value])


def _measure_size(num_trials: int, folder: Path) -> dict[str, float]:
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str, repetitions: int = 1) -> Iterator[None]:
        started = time.perf_counter()
        yield
        seconds[stage] = (time.perf_counter() - started) / repetitions

    sweep = SimulatedSweep(num_trials, folder)
    plan = sweep.plan()
    running = plan.trials[-_NUM_RUNNING:]
    sweep.finish(plan.trials[:-_NUM_RUNNING])
    with timed("planning"):
        trial_states(sweep.plan(), sweep.settings.sweep)
    progress = RoundProgress(
        Progress(), plan.trials, num_done=num_trials - len(running), num_all=num_trials
    )
    for trial in running:
        write_journal(trial, NUM_STEPS // 2)
    with timed("a look", _NUM_LOOKS):
        for _ in range(_NUM_LOOKS):
            progress.show({trial.key for trial in running})
    folder = sweep.workspace.sweeps / "history"
    history = FrontHistory(plan, folder, num_trials=num_trials)
    results = []
    with timed("front over time"):
        for trial in plan.trials:
            if result := history.add(trial):
                results.append(result)
            history.record()
        history.record(at_end=True)
    stored = StoredSweep(name=plan.name, key=plan.key, results=tuple(results))
    with timed("report"):
        write_sweep_report(sweep.workspace, stored)
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    volume = find_front(result_table(results)).hypervolume or math.nan
    [(_, curve)] = read_history_curves(folder)["Hypervolume against trials finished"]
    return {**seconds, "bytes": 1024.0 * kibibytes, "difference": abs(curve[-1][1] - volume)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(_measure_size(int(sys.argv[1]), Path(temporary))))
