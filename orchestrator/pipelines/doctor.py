"""Check this machine and a workspace: what works, what is broken, and what to do about it.

Nothing is written or started. What a check imports or asks may fail in any way; that is its answer.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.text import Text

from orchestrator.pipelines.listing import show_status
from orchestrator.pipelines.result import Result
from orchestrator.settings import ClusterSettings
from orchestrator.settings.cluster import LOCAL
from orchestrator.terminal.render import format_bytes, format_count
from orchestrator.workspace.errors import UserError, mask_secrets, strip_credentials
from orchestrator.workspace.files import abandoned_folders, free_disk
from orchestrator.workspace.layout import WORKSPACE_FILE_NAME, Workspace, find_workspace
from orchestrator.workspace.locks import is_locked
from orchestrator.workspace.provenance import NOT_INSTALLED, installed_version

if TYPE_CHECKING:
    from iiet.extensions import ExtensionTable

DISTRIBUTION = "iiet-orch"
NAMED = ("torch", "transformers", "ray", "mlflow", "lm-eval")
"""Libraries whose versions are printed; the others are only checked."""
LEAST_DISK, LEAST_MEMORY = 2 << 30, 1 << 30
"""Free bytes below which trainings of any use will fail."""
SERVER_SECONDS = 5.0
Found = Iterator[tuple[Any, str, str]]
"""State, text and remedy; of what is fine, the remedy is not shown."""
MARKS = {"ok": ("✓", "green"), "note": ("!", "yellow"), "broken": ("✗", "red")}


class Finding(Result):
    """The result of one check."""

    check: str
    """What was looked at."""
    state: Literal["ok", "note", "broken"]
    """`note`: works, but something is worth knowing; `broken`: some command will fail."""
    text: str
    """What was found."""
    remedy: str = ""
    """What to do."""

    def shown(self) -> Iterator[str | Text]:
        """Return a line with a mark, and the remedy."""
        yield Text.assemble(MARKS[self.state], f" {self.check}: {self.text}")
        if self.remedy:
            yield f"    {self.remedy}"


def examine(workspace: Workspace) -> Iterator[Finding]:
    """Yield what each check finds, in the order in which things depend on each other."""
    checks = (
        *(_python, _libraries, _import_path, _extensions, _pytorch, _cpu, _memory, _gpus, _disk),
        *(_ray, _mlflow, _workspace, _hugging_face_hub),
    )
    for check in checks:
        name = check.__name__.replace("_", " ").strip()
        try:
            for state, text, remedy in check(workspace):
                needed = "" if state == "ok" else remedy
                yield Finding(check=name, state=state, text=text, remedy=needed)
        except UserError as error:
            text, _, remedy = str(error).partition("; ")
            yield Finding(check=name, state="broken", text=text, remedy=remedy)
        except Exception as error:
            problem = mask_secrets(f"{type(error).__name__}: {error}")
            yield Finding(check=name, state="broken", text=problem)


def _python(_: Workspace) -> Found:
    wanted = SpecifierSet(metadata.metadata(DISTRIBUTION)["Requires-Python"])
    state = "ok" if wanted.contains(platform.python_version()) else "broken"
    remedy = f"install {DISTRIBUTION} with a Python {wanted}"
    yield state, f"Python {platform.python_version()}, {sys.executable}", remedy


def _libraries(_: Workspace) -> Found:
    wanted = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    num_right = 0
    for name, specifier in ((required.name, required.specifier) for required in needed):
        version = installed_version(name)
        if version != NOT_INSTALLED and specifier.contains(version, prereleases=True):
            num_right += 1
        else:
            text = f"{name} {version}, wanted {specifier}"
            yield "broken", text, f"pip install '{name}{specifier}'"
    named = ", ".join(f"{name} {installed_version(name)}" for name in NAMED)
    state = "ok" if num_right == len(needed) else "note"
    yield state, f"{num_right} of {len(needed)} in their ranges; {named}", ""


def _import_path(_: Workspace) -> Found:
    own, is_clear = Path(__file__).resolve().parents[1], True
    # Workers of Ray, and `python` itself, look into the working folder first.
    for place in dict.fromkeys(Path(place).resolve() for place in ("", *sys.path)):
        if place == own.parent:
            break
        for name in (own.name, "iiet"):
            for found in (place / name / "__init__.py", place / f"{name}.py"):
                if found.is_file():
                    is_clear = False
                    text = f"{found} may be imported in place of this program's {name}"
                    yield "broken", text, "rename it, or start the command in another folder"
    if is_clear:
        yield "ok", f"orchestrator is {own}", ""


def extension_points() -> tuple[ExtensionTable[Any], ...]:
    """Return the tables to which other packages add."""
    from iiet.influence_metrics import INFLUENCE_METRICS
    from iiet.methods import METHODS
    from orchestrator.data.text_source import DATA_SOURCES
    from orchestrator.evaluation.python_tasks import TASKS
    from orchestrator.tracking.loggers import LOGGERS

    return (METHODS, INFLUENCE_METRICS, TASKS, DATA_SOURCES, LOGGERS)


def _extensions(_: Workspace) -> Found:
    from iiet.extensions import ExtensionError, package_of

    num_usable = 0
    for table in extension_points():
        for entry in sorted(table.names.entry_points(), key=lambda entry: entry.name):
            package = package_of(entry)
            try:
                table[entry.name]
                num_usable += 1
                yield "ok", f"the {table.names.kind} {entry.name} of {package}", ""
            except ExtensionError as error:
                yield "broken", str(error), f"repair the package {package}, or uninstall it"
    if not num_usable:
        yield "ok", "no package adds anything usable", ""


def _pytorch(_: Workspace) -> Found:
    import torch

    build = torch.version.cuda or getattr(torch.version, "hip", None) or "CPUs"
    yield "ok", f"{torch.__version__}, built for {build}", ""


def _cpu(_: Workspace) -> Found:
    from orchestrator.planning.machine import local_resources

    cpus, load = local_resources(count_gpus=False).cpus, os.getloadavg()[0]
    text = f"{format_count(cpus, 'CPU')}, load {load:.1f}"
    remedy = "other processes use the CPUs; trainings are slower"
    yield "note" if load > 1.5 * cpus else "ok", text, remedy


def _memory(_: Workspace) -> Found:
    from orchestrator.planning.machine import free_memory

    free, total = free_memory(), psutil.virtual_memory().total
    state = "broken" if free < LEAST_MEMORY else "ok"
    text = f"{format_bytes(free)} of {format_bytes(total)} free"
    yield state, text, "end other programs, or raise the container's limit"


def _gpus(_: Workspace) -> Found:
    import torch

    from orchestrator.planning.machine import driver_version, installed_gpus, nvml_module

    gpus, usable = installed_gpus(), torch.cuda.device_count()
    if not gpus and not usable:
        yield "ok", "none; everything runs on CPUs", ""
        return
    listed = ", ".join(f"{gpu.name} ({format_bytes(gpu.free_bytes)} free)" for gpu in gpus)
    state = "broken" if usable < len(gpus) else "ok"
    text = f"{listed or usable}; driver {driver_version() or 'unknown'}; PyTorch uses {usable}"
    yield state, text, "install a PyTorch for this driver (pytorch.org), and see nvidia-smi"
    if usable and torch.version.cuda and nvml_module() is None:
        text = "the memory, load and names of GPUs are unknown to plans and metrics"
        yield "note", text, f"pip install '{DISTRIBUTION}[gpu]'"


def _disk(workspace: Workspace) -> Found:
    places = {"workspace": workspace.root, "temporary files": Path(tempfile.gettempdir())}
    for what, folder in places.items():
        free = free_disk(folder)
        text = f"{format_bytes(free)} free for the {what} in {folder}"
        yield "broken" if free < LEAST_DISK else "ok", text, "`iiet-orch clean` lists what can go"


def _ray(_: Workspace) -> Found:
    from orchestrator.cluster.ray import check_ray_can_run

    address = ClusterSettings().ray_address
    check_ray_can_run(address)
    where = "starts on this machine" if address == LOCAL else f"answers at {address}"
    yield "ok", f"Ray {installed_version('ray')} {where}", ""
    if abandoned := [str(folder) for folder in abandoned_folders()]:
        left = [
            str(process.pid)
            for process in psutil.process_iter(["cmdline"])
            if any(folder in " ".join(process.info["cmdline"] or ()) for folder in abandoned)
        ]
        text = f"{format_count(len(abandoned), 'folder')} of killed commands ({abandoned[0]})"
        text += f", whose processes {', '.join(left)} still run" if left else ""
        kill = f"kill {' '.join(left)}; then " if left else ""
        yield "note", text, f"{kill}`iiet-orch clean ray`"


def _mlflow(workspace: Workspace) -> Found:
    uri, state = workspace.tracking_uri, "broken"
    shown, remedy = strip_credentials(uri), "correct MLFLOW_TRACKING_URI, or unset it"
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    try:
        if uri.startswith(("http://", "https://")):
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_SECONDS).close()
        elif uri.startswith("sqlite:///") and path.exists():
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                database.execute("SELECT count(*) FROM sqlite_master").fetchall()
        state, text = "ok", f"store {shown}"
    except sqlite3.Error as error:
        text = f"the database {path} cannot be read ({error})"
        remedy = "move it away; `iiet-orch sync` publishes the workspace in a new one"
    except (OSError, ValueError) as error:
        text = f"no MLflow server answers at {shown} ({mask_secrets(str(error))})"
        remedy += "; runs go on meanwhile, and `iiet-orch sync` publishes it later"
    yield state, text, remedy


def _workspace(workspace: Workspace) -> Found:
    if not workspace.root.exists():
        yield "ok", f"{workspace.root} does not exist yet; the first command makes it", ""
        return
    find_workspace(workspace.root)
    if not os.access(workspace.root, os.W_OK):
        raise UserError(f"{workspace.root} cannot be written; choose another with --workspace")
    try:
        is_locked(workspace.root / WORKSPACE_FILE_NAME)
    except OSError as error:
        problem = f"the file system of {workspace.root} has no locks ({error.strerror})"
        raise UserError(f"{problem}; move the workspace to one that has") from None
    names = ", ".join(activity.name for activity in show_status(workspace).activities)
    yield "ok", f"{workspace.root}; {names or 'nothing'} runs in it", ""


def _hugging_face_hub(_: Workspace) -> Found:
    from orchestrator.models.hub import hub_problem

    problem = hub_problem()
    remedy = "data sets and models of the hub must be in its cache or in files"
    yield "note" if problem else "ok", problem or "reachable", remedy
