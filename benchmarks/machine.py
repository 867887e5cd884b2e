"""Facts about machine and libraries, which every measurement needs."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers


def machine_facts() -> dict[str, str | int | float]:
    """Return processor, threads, versions and the current load of the machine."""
    return {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count() or 1,
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else -1.0,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "python": platform.python_version(),
        "system": platform.system(),
    }


def describe(facts: dict[str, str | int | float]) -> str:
    """Format the facts as two lines of text."""
    return (
        f"{facts['cpu']}, {facts['cpus']} CPUs, load before the run {facts['load_before']}; "
        f"PyTorch threads: {facts['threads']}\n"
        f"torch {facts['torch']}, transformers {facts['transformers']}, "
        f"Python {facts['python']}, {facts['system']}"
    )


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
