"""`python -m benchmarks [NAME ...] [--gpu] [--quick] [--threads N] [--gguf FILE] [--to FOLDER]`,
from the repository's root.

Runs the named sections, or all: ratios of programs on a CPU, or with `--gpu` the first hour on a
GPU machine. Each has a process of its own. Prints each result, and writes `cpu-report.md` and
`cpu-report.json` (`gpu-report`) again after each section, so that they hold what is known if the
machine is lost. `--quick` uses tiny sizes, which only test the sections; on a machine without a GPU
it rehearses the GPU's sections on the CPU. The default is one thread, because ratios on one core
have the least noise. The exit code is 0, also if a goal is missed; 1 if a section failed; 2 after a
mistake on the command line.
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

from benchmarks import decoding, mix, speculation, sweep, training
from benchmarks.gpu import commands, hardware, inference, recipes
from benchmarks.gpu import training as gpu_training
from benchmarks.report import SectionResult, machine_facts, to_dict, to_markdown
from benchmarks.runner import Section, Setup, run_in_process
from orchestrator.planning.machine import read_nvml
from orchestrator.training.world import gpu_peak_flops


def _by_name(*sections: Section) -> dict[str, Section]:
    return {section.name: section for section in sections}


CPU_SECTIONS = _by_name(
    Section(mix.mix, 30, "What do the learned sums cost in training, beside a stack of estimates?"),
    Section(decoding.decoding, 30, "How fast is cached decoding, beside transformers' Llama?"),
    Section(decoding.schedules, 30, "Is the time of a token linear in its evaluations?"),
    Section(speculation.speculation, 30, "What do drafts gain?"),
    Section(training.training, 30, "What does the training loop add to a bare PyTorch loop?"),
    Section(training.saving, 30, "How long do steps wait for checkpoints of a sharded model?"),
    Section(sweep.sweep, 30, "What does a sweep add to its trials?"),
)
"""The ratios of `make bench`, in the order in which they run; the limits only end what hangs."""
GPU_SECTIONS = _by_name(
    Section(gpu_training.parity, 4, "Are logits, loss and gradients those of the CPU?"),
    Section(recipes.recipes, 12, "Do the 340M recipe and a sharded 1.3B train, fit and speed?"),
    Section(recipes.retrofit, 5, "Does a Llama of 1B parameters become iterative?"),
    Section(gpu_training.speed, 12, "Tokens/s, MFU, waits; are compiled losses and memory right?"),
    Section(hardware.kernels, 3, "What do attention and the mix reach alone?"),
    Section(hardware.network, 2, "How fast are gradients summed over the GPUs?"),
    Section(hardware.tokenizing, 2, "How fast is text tokenized?"),
    Section(commands.resume, 4, "Does a killed training resume to the same result?"),
    Section(commands.node, 7, "Do all GPUs train as one, and survive one that fails?"),
    Section(commands.sweep, 4, "Does a sweep of two trials use its GPUs?"),
    Section(
        inference.decoding, 5, "How far is decoding from the bandwidth, with and without graphs?"
    ),
    Section(inference.evaluation, 3, "How many items per second does an evaluation score?"),
)
"""The sections of `make gpu`: what is right comes before what is fast."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (without the program's name) and return the exit code."""
    options = _parse(arguments)
    sections = GPU_SECTIONS if options.gpu else CPU_SECTIONS
    report = options.to / ("gpu-report" if options.gpu else "cpu-report")
    uses_gpu = options.gpu and torch.cuda.is_available()
    results: list[SectionResult] = []
    # Parts that use a GPU if there is one must find none on a CPU.
    hidden = {} if uses_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, hidden):
        setup = Setup(
            device="cuda" if uses_gpu else "cpu",
            num_gpus=torch.cuda.device_count() if uses_gpu else 0,
            is_toy=options.quick,
            num_threads=torch.get_num_threads() if options.gpu else options.threads,
            gguf=options.gguf,
            folder=Path(folder),
            report_folder=options.to.absolute(),
        )
        facts = _facts(setup)
        for name in options.names or sections:
            print(f"{name} ...", file=sys.stderr, flush=True)
            results.append(run_in_process(sections[name], setup))
            print(results[-1].to_markdown(), flush=True)
            content = json.dumps(to_dict(results, facts), indent=2)
            report.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
            report.with_suffix(".md").write_text(to_markdown(results, facts), encoding="utf-8")
    print(f"report: {report}.md")
    return 1 if any(result.status == "failed" for result in results) else 0


def _facts(setup: Setup) -> dict[str, Any]:
    """Return what the report says about the machine; `name` is that of the GPU or processor."""
    facts = machine_facts()
    shared = {
        **facts,
        "PyTorch threads": setup.num_threads,
        "size": "tiny: the figures mean nothing" if setup.is_toy else "full",
    }
    if setup.device == "cpu":
        return {"name": facts["processor"], **shared}
    properties = torch.cuda.get_device_properties(0)
    peak = gpu_peak_flops(properties.name, "bf16")
    nccl = "none"
    with suppress(Exception):  # A build without NCCL.
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return {
        "name": properties.name,
        "GPUs": setup.num_gpus,
        "memory (GiB)": round(properties.total_memory / 2**30, 1),
        "compute capability": f"{properties.major}.{properties.minor}",
        "bf16 peak (TFLOP/s)": peak / 1e12 if peak else "unknown, so there is no MFU",
        "driver": read_nvml()[0] or "unknown",
        "CUDA of PyTorch": torch.version.cuda,
        "NCCL": nccl,
        **shared,
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    known = f"any of {', '.join(CPU_SECTIONS)}; with --gpu any of {', '.join(GPU_SECTIONS)}"
    parser.add_argument("names", nargs="*", metavar="NAME", help=known)
    parser.add_argument("--gpu", action="store_true", help="the sections of a GPU machine")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, in seconds, no goals")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of PyTorch")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the model that decoding reads")
    parser.add_argument("--to", type=Path, default=Path(), metavar="FOLDER", help="of the report")
    options = parser.parse_args(arguments)
    sections = GPU_SECTIONS if options.gpu else CPU_SECTIONS
    unknown = [name for name in options.names if name not in sections]
    if unknown:
        parser.error(f"unknown section {', '.join(unknown)}; there are {', '.join(sections)}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.gguf is not None and (options.gpu or options.names != ["decoding"]):
        parser.error("--gguf is for one section: python -m benchmarks decoding --gguf FILE")
    if options.gguf is not None and not options.gguf.is_file():
        parser.error(f"--gguf {options.gguf}: there is no such file")
    if not options.to.is_dir():
        parser.error(f"--to {options.to}: there is no such folder; make it")
    if options.gpu and not options.quick and not torch.cuda.is_available():
        parser.error(
            f"PyTorch {torch.__version__} finds no CUDA GPU; install a CUDA build and a driver, or "
            "rehearse the sections on the CPU with --gpu --quick"
        )
    return options


if __name__ == "__main__":
    sys.exit(main())
