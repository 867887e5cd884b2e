"""`python -m benchmarks.gpu [--device cuda|cpu] [--size full|toy] [--sections NAME,...] [--to
FOLDER]`, from the repository's root.

Runs the sections and writes `gpu-report.md` and `gpu-report.json`, again after each section, so
that they hold what is known if the machine is lost. The exit code is 0 if no section failed, 1 if
one did, 2 after a mistake on the command line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.gpu.commands import resume, sweep
from benchmarks.gpu.inference import decoding, evaluation
from benchmarks.gpu.node import node
from benchmarks.gpu.report import (
    Section,
    SectionResult,
    Setup,
    run_in_process,
    to_dict,
    to_markdown,
)
from benchmarks.gpu.training import compiled, parity, speed, synchronizations
from benchmarks.report import machine_facts
from orchestrator.planning.machine import read_nvml
from orchestrator.training.monitor import gpu_peak_flops

NAME = "gpu-report"

SECTIONS: dict[str, Section] = {
    measure.__name__: Section(
        name=measure.__name__, question=question, measure=measure, limit_minutes=minutes
    )
    for measure, minutes, question in (
        (parity, 4, "Are logits, loss and gradients those of the CPU?"),
        (synchronizations, 4, "How often does a training step wait for the GPU?"),
        (compiled, 8, "Does the compiled model train equally, and how much faster?"),
        (speed, 14, "Tokens per second, MFU, and does memory agree with the plan?"),
        (resume, 6, "Does a killed training resume to the same result?"),
        (node, 9, "Do all GPUs train as one, and survive one that fails?"),
        (sweep, 6, "Does a sweep of two trials use its GPUs?"),
        (decoding, 5, "How far is decoding from the memory bandwidth?"),
        (evaluation, 4, "How many items per second does an evaluation score?"),
    )
}
"""Each section by name, in the order of the report: what is right comes before what is fast."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (without the program's name) and return the exit code."""
    options = _parse(arguments)
    results: list[SectionResult] = []
    # Parts that use a GPU if there is one must find none on a CPU.
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {}
    with (
        tempfile.TemporaryDirectory(prefix="gpu-report-") as folder,
        patch.dict(os.environ, hidden),
    ):
        setup = Setup(
            device=options.device,
            num_gpus=torch.cuda.device_count() if options.device == "cuda" else 0,
            is_toy=options.size == "toy",
            folder=Path(folder),
        )
        facts = _facts(setup)
        _say(f"{facts['name']}, {len(options.sections)} sections")
        setup.tokens()
        for name in options.sections:
            _say(f"{name}, at most {SECTIONS[name].limit_minutes:g} minutes ...")
            results.append(run_in_process(SECTIONS[name], setup))
            _say(f"{name}: {results[-1].status}", *results[-1].reasons)
            content = json.dumps(to_dict(results, facts), indent=2)
            (options.to / f"{NAME}.json").write_text(content + "\n", encoding="utf-8")
            text = to_markdown(results, facts)
            (options.to / f"{NAME}.md").write_text(text, encoding="utf-8")
    print(f"report: {options.to / NAME}.md")
    return 1 if any(result.status == "failed" for result in results) else 0


def _say(*texts: str) -> None:
    print(*texts, sep="\n  ", flush=True)


def _facts(setup: Setup) -> dict[str, Any]:
    """Return what the report says about the machine; `name` is that of the GPU or processor."""
    facts = machine_facts()
    shared = {
        "processor": f"{facts['cpu']}, {facts['cpus']} CPUs",
        "torch": facts["torch"],
        "python": facts["python"],
        "size": "toy: the figures mean nothing" if setup.is_toy else "full",
    }
    if setup.device == "cpu":
        return {"name": f"no GPU ({facts['cpu']})", **shared}
    properties = torch.cuda.get_device_properties(0)
    peak = gpu_peak_flops(properties.name, "bf16")
    nccl = "none"
    with suppress(Exception):  # A build without NCCL.
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {
        "name": properties.name,
        "GPUs": setup.num_gpus,
        "memory (GiB)": round(properties.total_memory / 2**30, 1),
        "L2 cache (MB)": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
        "compute capability": f"{properties.major}.{properties.minor}",
        "bf16 peak (TFLOP/s)": peak / 1e12 if peak else "unknown, so there is no MFU",
        "driver": read_nvml()[0] or "unknown",
        "CUDA of PyTorch": torch.version.cuda,
        "NCCL": nccl,
        **shared,
    }


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
