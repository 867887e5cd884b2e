"""`python -m benchmarks [NAME ...] [--quick] [--threads N] [--json FILE]`, from the repository's
root.

Runs the named benchmarks (default: all) and prints one table for each; `--json` stores the same
numbers. `decoding --gguf FILE` measures the model of that file instead of random weights. The
default is one thread, because ratios on one core have the least noise. The table shows a missed
goal, which is not a failure: the exit code is 0. It is 2 after a mistake on the command line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import (
    decoding,
    evaluation,
    many_trials,
    mix,
    model_size,
    schedules,
    speculation,
    sweep,
    teacher_cache,
    tracking_load,
    training,
)
from benchmarks.machine import describe, machine_facts
from benchmarks.report import Report

BENCHMARKS: dict[str, Callable[..., Report]] = {
    "mix": mix.measure,
    "decoding": decoding.measure,
    "schedules": schedules.measure,
    "speculation": speculation.measure,
    "teacher_cache": teacher_cache.measure,
    "training": training.measure,
    "evaluation": evaluation.measure,
    "sweep": sweep.measure,
    "many_trials": many_trials.measure,
    "tracking_load": tracking_load.measure,
    "model_size": model_size.measure,
}
"""The benchmarks by name, in the order in which they run."""

_PIPE_COLUMNS = 140


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (without the program's name) and return the exit code."""
    options = _parse(arguments)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        _run(options)
    finally:
        torch.set_num_threads(threads_before)
    return 0


def _run(options: argparse.Namespace) -> None:
    # A pipe or a file has no width of its own; tables would be cut to 80 columns.
    out = Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False)
    facts = machine_facts()
    out.print(describe(facts), markup=False)
    if options.quick:
        out.print("--quick: tiny sizes that only test the benchmarks; the numbers mean nothing")
    found: dict[str, Report] = {}
    minutes: dict[str, float] = {}
    for name in options.names or BENCHMARKS:
        started = time.perf_counter()
        measure = BENCHMARKS[name]
        if name == "decoding" and options.gguf is not None:
            measure = partial(decoding.measure, gguf=options.gguf)
        found[name] = measure(quick=options.quick, say=_say)
        minutes[name] = (time.perf_counter() - started) / 60
        out.print()
        out.print(found[name].table())
        out.print(f"{name} took {minutes[name]:.1f} minutes")
    if options.json is not None:
        reports = {
            name: {**report.to_dict(), "minutes": minutes[name]} for name, report in found.items()
        }
        content = {"machine": facts, "quick": options.quick, "benchmarks": reports}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"any of {', '.join(BENCHMARKS)}; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds, no goals")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of PyTorch")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model that decoding reads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store all numbers in FILE")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.gguf is not None and options.names != ["decoding"]:
        parser.error("--gguf is for one benchmark: python -m benchmarks decoding --gguf FILE")
    if options.gguf is not None and not options.gguf.is_file():
        parser.error(f"--gguf {options.gguf}: there is no such file")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no folder {options.json.parent}; make it")
    return options


if __name__ == "__main__":
    sys.exit(main())
