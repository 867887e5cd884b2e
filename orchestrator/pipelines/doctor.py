"""Check this machine and a workspace: what works, what is broken, and what to do about it.

Nothing is written or started. Any error in a check is its result.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pydantic import Field
from rich.text import Text

from orchestrator.pipelines.upkeep import list_workspace, show_status
from orchestrator.reporting.output import Result
from orchestrator.reporting.sections import two_column_table
from orchestrator.settings import ClusterSettings
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.render import format_bytes, format_count, format_duration_range
from orchestrator.workspace.errors import RunFailed, UserError, mask_secrets
from orchestrator.workspace.files import free_disk
from orchestrator.workspace.layout import Workspace, find_workspace
from orchestrator.workspace.processors import cpu_flags, num_cpus, processor_name
from orchestrator.workspace.provenance import NOT_INSTALLED, installed_version

if TYPE_CHECKING:
    from rich.console import RenderableType

    from iiet.extensions import ExtensionTable

DISTRIBUTION = "iiet-orch"
NAMED = ("torch", "transformers", "ray", "mlflow", "lm-eval")
"""Libraries whose versions are printed; the others are only checked."""
LEAST_DISK = 2 << 30
LEAST_MEMORY = 1 << 30
"""Free bytes of memory that a useful training needs."""
MARKS = {"ok": ("✓", "green"), "broken": ("✗", "red")}
Answers = Iterator[tuple[bool, str, str]]
"""For each thing that a check looks at: whether it works, a sentence, and a remedy in case it does
not."""


class Finding(Result):
    """The result of one check."""

    name: str = Field(serialization_alias="check")
    """What was looked at."""
    state: Literal["ok", "broken"]
    """`broken`: some command will fail."""
    text: str
    """What was found."""
    remedy: str = ""
    """What to do."""

    def shown(self) -> Iterator[str | Text]:
        yield Text.assemble(MARKS[self.state], f" {self.name}: {self.text}")
        if self.remedy:
            yield f"    {self.remedy}"


class ShippedSweep(Result):
    """What a shipped sweep takes in an empty workspace."""

    name: str
    """As `sweep` takes it."""
    fits: bool
    """Whether this machine has the memory, the disk and the GPUs for it."""
    hours: tuple[float, float]
    """Shortest and longest estimated hours of its trainings; `sweep NAME --dry-run` explains
    them."""
    num_devices: int
    """CPUs or GPUs that the estimate assumes."""
    num_gpus: int
    """GPUs that it needs; 0 if it trains on CPUs."""
    needs_hub: bool
    """Whether it needs data, a tokenizer or tasks from the Hugging Face hub."""
    problem: str | None
    """Why it does not fit; null if it does."""

    def text(self) -> str:
        """Return all of this in a line or two."""
        needs = [format_count(self.num_gpus, "GPU")] if self.num_gpus else []
        needs += ["the Hugging Face hub"] if self.needs_hub else []
        devices = format_count(self.num_devices, "GPU" if self.num_gpus else "CPU")
        time = format_duration_range(*(3600 * hours for hours in self.hours))
        parts = [f"{time} on {devices}"]
        parts += [f"needs {' and '.join(needs)}"] if needs else []
        parts += [f"does not fit: {self.problem}"] if self.problem else []
        return "; ".join(parts)


class Findings(Result):
    """What all checks found; a failure if something is broken."""

    findings: list[Finding]
    """One entry per check."""
    sweeps: list[ShippedSweep]
    """One entry per shipped sweep: what it takes on this machine."""

    def shown(self) -> Iterator[RenderableType]:
        rows = [
            (("✓ " if sweep.fits else "- ") + sweep.name, sweep.text()) for sweep in self.sweeps
        ]
        yield two_column_table("Shipped sweeps on this machine, time of their trainings", rows)

    def raise_failures(self) -> None:
        if broken := [finding.name for finding in self.findings if finding.state == "broken"]:
            raise RunFailed(f"broken: {', '.join(dict.fromkeys(broken))}")


def examine(workspace: Workspace) -> Iterator[Finding]:
    """Yield the finding of each check, in the order of dependence."""
    for check in (_versions, _extensions, _memory_and_disk, _processor, _gpus, _ray, _workspace):
        name = check.__name__.replace("_", " ").strip()
        try:
            for works, text, remedy in check(workspace):
                state: Literal["ok", "broken"] = "ok" if works else "broken"
                yield Finding(name=name, state=state, text=text, remedy="" if works else remedy)
        except Exception as error:
            message = str(error)
            if not isinstance(error, UserError):
                message = f"{type(error).__name__}: {message}"
            # This program's messages end with a remedy, after a semicolon.
            text, _, remedy = mask_secrets(message).partition("; ")
            yield Finding(name=name, state="broken", text=text, remedy=remedy)


def _versions(_: Workspace) -> Answers:
    python = SpecifierSet(metadata.metadata(DISTRIBUTION)["Requires-Python"])
    text = f"Python {platform.python_version()}, {sys.executable}; orchestrator is "
    text += str(Path(__file__).resolve().parents[1])
    remedy = f"install {DISTRIBUTION} with a Python {python}"
    yield python.contains(platform.python_version()), text, remedy
    for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue  # For an extra, or another system.
        name = requirement.name
        specifier = requirement.specifier
        version = installed_version(name)
        if version == NOT_INSTALLED or not specifier.contains(version, prereleases=True):
            yield False, f"{name} {version}, wanted {specifier}", f"pip install '{name}{specifier}'"
    yield True, ", ".join(f"{name} {installed_version(name)}" for name in NAMED), ""


def extension_points() -> tuple[ExtensionTable[Any], ...]:
    """Return the tables to which other packages add."""
    from iiet.model.facts import INFLUENCE_METRICS, METHODS
    from orchestrator.models.loops import LOOPED_MODELS

    return (METHODS, INFLUENCE_METRICS, LOOPED_MODELS)


def _extensions(_: Workspace) -> Answers:
    from iiet.extensions import ExtensionError, package_of

    for table in extension_points():
        for entry in sorted(table.entry_points(), key=lambda entry: entry.name):
            package = package_of(entry)
            try:
                table.load(entry.name)
                yield True, f"the {table.noun} {entry.name} of {package}", ""
            except ExtensionError as error:
                yield False, str(error), f"repair the package {package}, or uninstall it"


def _memory_and_disk(workspace: Workspace) -> Answers:
    from orchestrator.planning.machine import free_memory

    free = free_memory()
    total = psutil.virtual_memory().total
    text = f"{format_bytes(free)} of {format_bytes(total)} of memory free"
    yield free >= LEAST_MEMORY, text, "end other programs, or raise the container's limit"
    folders = {"workspace": workspace.root, "temporary files": Path(tempfile.gettempdir())}
    for use, folder in folders.items():
        free = free_disk(folder)
        text = f"{format_bytes(free)} free for the {use} in {folder}"
        yield free >= LEAST_DISK, text, "`iiet-orch clean` lists what can go"


def _gpus(_: Workspace) -> Answers:
    import torch

    from orchestrator.planning.machine import read_nvml

    driver, gpus = read_nvml()
    usable = torch.cuda.device_count()
    listed = ", ".join(f"{gpu.name} ({format_bytes(gpu.free_bytes)} free)" for gpu in gpus)
    build = torch.version.cuda or getattr(torch.version, "hip", None) or "CPUs"
    text = f"{listed or usable or 'none'}; driver {driver or 'unknown'}; "
    text += f"PyTorch {torch.__version__}, built for {build}, uses {usable}"
    remedy = "install a PyTorch for this driver (pytorch.org), and see nvidia-smi"
    yield usable >= len(gpus), text, remedy


def _processor(_: Workspace) -> Answers:
    flags = cpu_flags()
    text = f"{format_count(num_cpus(), 'CPU')} ({processor_name()})"
    if flags & {"avx512_bf16", "amx_bf16"}:
        text += (
            " with bf16 instructions: --set training.precision=bf16 trains models of width 128 and "
            "more in less time (docs/training.md)"
        )
    yield True, text, ""


def _ray(_: Workspace) -> Answers:
    from orchestrator.cluster.ray import check_ray_can_run

    address = ClusterSettings().ray_address
    check_ray_can_run(address)
    yield True, "Ray " + ("starts here" if address == LOCAL else f"answers at {address}"), ""


def _workspace(workspace: Workspace) -> Answers:
    root = find_workspace(workspace.root).root
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK, effective_ids=True)):
        raise UserError(f"{existing} cannot be written; choose another folder with --workspace")
    if existing != root:
        yield True, f"{root} does not exist yet; the first command makes it", ""
        return
    damage: list[str] = []
    list_workspace(workspace, note=damage.append)
    names = ", ".join(activity["name"] for activity in show_status(workspace).activities)
    for sentence in damage:
        text, _, remedy = sentence.partition("; ")
        yield False, text, remedy
    yield True, f"{workspace.root}; {names or 'nothing'} runs in it", ""
