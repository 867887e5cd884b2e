"""`python -m benchmarks [NAME ...] [--quick] [--threads N] [--json FILE]`, from the repository's
root.

Runs the named benchmarks and prints one table for each; `--json` stores the same numbers. Without
names it runs all but `speculation`, which trains models for twenty minutes. `decoding --gguf FILE`
measures the model of that file instead of random weights. The default is one thread, because ratios
on one core have the least noise. The table shows a missed goal, which is not a failure: the exit
code is 0. It is 2 after a mistake on the command line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import decoding, evaluation, mix, speculation, sweep, teacher_cache, training
from benchmarks.report import Report, machine_facts

BENCHMARKS: dict[str, Callable[..., Report]] = {
    "mix": mix.measure,
    "decoding": decoding.measure,
    "schedules": decoding.measure_schedules,
    "speculation": speculation.measure,
    "teacher_cache": teacher_cache.measure,
    "training": training.measure,
    "evaluation": evaluation.measure,
    "sweep": sweep.measure,
}
"""The benchmarks by name, in the order in which they run."""
LONG = ("speculation",)
"""Run only if they are named."""


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
    out = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    facts = machine_facts()
    out.print(
        f"{facts['cpu']}, {facts['cpus']} CPUs, load before the run {facts['load_before']}; "
        f"PyTorch threads: {facts['threads']}\n"
        f"torch {facts['torch']}, transformers {facts['transformers']}, "
        f"Python {facts['python']}, {facts['system']}",
        markup=False,
    )
    if options.quick:
        out.print("--quick: tiny sizes that only test the benchmarks; the numbers mean nothing")
    reports: dict[str, dict[str, Any]] = {}
    for name in options.names or [name for name in BENCHMARKS if name not in LONG]:
        started = time.perf_counter()
        measure = BENCHMARKS[name]
        if options.gguf is not None:
            measure = partial(measure, gguf=options.gguf)
        report = measure(quick=options.quick, say=_say)
        minutes = (time.perf_counter() - started) / 60
        reports[name] = {**report.to_dict(), "minutes": minutes}
        out.print()
        out.print(report.table())
        out.print(f"{name} took {minutes:.1f} minutes")
    if options.json is not None:
        content = {"machine": facts, "quick": options.quick, "benchmarks": reports}
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr, flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(BENCHMARKS)}")
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
