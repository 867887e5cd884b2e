"""`python -m benchmarks.gpu [--device cuda|cpu] [--size full|toy] [--sections NAME,...] [--to
FOLDER]`, from the repository's root.

Runs the sections and writes `gpu-report.md` and `gpu-report.json`, again after each section, so
that they hold what is known if the machine is lost. The exit code is 0 if no section failed, 1 if
one did, 2 after a mistake on the command line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.facts import report_facts
from benchmarks.gpu.finding import SectionResult
from benchmarks.gpu.report import Facts, to_dict, to_markdown
from benchmarks.gpu.section_process import run_in_process
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.setup import Setup

NAME = "gpu-report"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (without the program's name) and return the exit code."""
    options = _parse(arguments)
    results: list[SectionResult] = []
    with tempfile.TemporaryDirectory(prefix="gpu-report-") as folder:
        setup = Setup(
            device=options.device,
            num_gpus=torch.cuda.device_count() if options.device == "cuda" else 0,
            is_toy=options.size == "toy",
            folder=Path(folder),
        )
        facts = report_facts(setup)
        _say(f"{facts['name']}, {len(options.sections)} sections")
        setup.tokens()
        for name in options.sections:
            limit = SECTIONS[name].limit_minutes
            _say(f"{name}, at most {limit:g} minutes ...")
            results.append(run_in_process(SECTIONS[name], setup))
            _say(f"{name}: {results[-1].status}", *results[-1].reasons)
            _write(results, facts, options.to)
    print(f"report: {options.to / NAME}.md")
    return 1 if any(result.status == "failed" for result in results) else 0


def _write(results: Sequence[SectionResult], facts: Facts, folder: Path) -> None:
    content = json.dumps(to_dict(results, facts), indent=2)
    (folder / f"{NAME}.json").write_text(content + "\n", encoding="utf-8")
    (folder / f"{NAME}.md").write_text(to_markdown(results, facts), encoding="utf-8")


def _say(*texts: str) -> None:
    print(*texts, sep="\n  ", flush=True)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--size", choices=("full", "toy"), default="full", help="toy: only test the sections"
    )
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), metavar="NAMES", help="default: %(default)s"
    )
    parser.add_argument(
        "--to", type=Path, default=Path(), metavar="FOLDER", help="default: this folder"
    )
    options = parser.parse_args(arguments)
    options.sections = options.sections.split(",")
    unknown = [name for name in options.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if not options.to.is_dir():
        parser.error(f"--to {options.to}: there is no such folder; make it")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            f"PyTorch {torch.__version__} finds no CUDA GPU; install a CUDA build and a driver, or "
            "rehearse the sections with --device cpu --size toy"
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
