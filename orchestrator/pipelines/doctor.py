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
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from orchestrator.terminal.formatting import format_bytes, format_count
from orchestrator.workspace.activity import pending_records, read_status
from orchestrator.workspace.credentials import mask_secrets, strip_credentials
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import free_disk
from orchestrator.workspace.folders import Workspace, open_workspace
from orchestrator.workspace.locks import is_locked
from orchestrator.workspace.paths import WORKSPACE_FILE_NAME
from orchestrator.workspace.provenance import installed_version
from orchestrator.workspace.ray_address import LOCAL, chosen_address
from orchestrator.workspace.read_only import read_only
from orchestrator.workspace.scratch import PREFIX, abandoned_folders

DISTRIBUTION = "iiet-orch"
NAMED = ("torch", "transformers", "ray", "mlflow", "lm-eval")
"""Libraries whose versions are printed; the others are only checked."""
LEAST_DISK, LEAST_MEMORY = 2 << 30, 1 << 30
"""Free bytes below which trainings of any use will fail."""
SERVER_SECONDS = 5.0

State = Literal["ok", "note", "broken"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check."""

    check: str
    """What was looked at."""
    state: State
    """`note`: works, but something is worth knowing; `broken`: some command will fail."""
    text: str
    """What was found."""
    remedy: str = ""
    """What to do."""


def examine(workspace: Workspace) -> Iterator[Finding]:
    """Yield what each check finds, in the order in which things depend on each other."""
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "python": _python,
        "libraries": _libraries,
        "import path": _import_path,
        "extensions": _extensions,
        "pytorch": _pytorch,
        "cpu and memory": _cpu_and_memory,
        "gpus": _gpus,
        "disk": lambda: _disk(workspace),
        "ray": _ray,
        "mlflow": lambda: _mlflow(workspace),
        "workspace": lambda: _workspace(workspace),
        "hugging face hub": _hub,
    }
    for name, check in checks.items():
        try:
            yield from check()
        except UserError as error:
            text, _, remedy = str(error).partition("; ")
            yield Finding(check=name, state="broken", text=text, remedy=remedy)
        except Exception as error:
            problem = mask_secrets(f"{type(error).__name__}: {error}")
            yield Finding(check=name, state="broken", text=problem)


def _judged(
    check: str, text: str, *, is_bad: bool, remedy: str, state: State = "broken"
) -> Finding:
    """Return a finding that is `ok` and needs no remedy; if it `is_bad`, one with both."""
    if is_bad:
        return Finding(check=check, state=state, text=text, remedy=remedy)
    return Finding(check=check, state="ok", text=text)


def _python() -> Iterator[Finding]:
    wanted = SpecifierSet(metadata.metadata(DISTRIBUTION)["Requires-Python"])
    yield _judged(
        "python",
        f"Python {platform.python_version()}, {sys.executable}",
        is_bad=not wanted.contains(platform.python_version()),
        remedy=f"install {DISTRIBUTION} with a Python {wanted}",
    )


def _libraries() -> Iterator[Finding]:
    wanted = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or ()]
    needed = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = [r for r in needed if not _is_in_range(r)]
    for requirement in wrong:
        name, version = requirement.name, installed_version(requirement.name)
        yield Finding(
            check="libraries",
            state="broken",
            text=f"{name} {version}, wanted {requirement.specifier}",
            remedy=f"pip install '{name}{requirement.specifier}'",
        )
    named = ", ".join(f"{name} {installed_version(name)}" for name in NAMED)
    state: State = "note" if wrong else "ok"
    text = f"{len(needed) - len(wrong)} of {len(needed)} in their ranges; {named}"
    yield Finding(check="libraries", state=state, text=text)


def _is_in_range(requirement: Requirement) -> bool:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    return requirement.specifier.contains(version, prereleases=True)


def _import_path() -> Iterator[Finding]:
    own, is_clear = Path(__file__).resolve().parents[1], True
    # Workers of Ray, and `python` itself, look into the working folder first.
    places = list(dict.fromkeys(Path(place).resolve() for place in ("", *sys.path)))
    for place in places:
        for name in ("orchestrator", "iiet"):
            others = (place / name / "__init__.py", place / f"{name}.py")
            for found in filter(Path.is_file, others):
                if found.parent not in (own, own.parent / "iiet"):
                    is_clear = False
                    yield Finding(
                        check="import path",
                        state="broken",
                        text=f"{found} may be imported in place of this program's {name}",
                        remedy="rename it, or start the command in another folder",
                    )
        if place == own.parent:
            break
    if is_clear:
        yield Finding(check="import path", state="ok", text=f"orchestrator is {own}")


def _extensions() -> Iterator[Finding]:
    from orchestrator.pipelines.extensions import installed_extensions

    num_usable = 0
    for found in installed_extensions():
        num_usable += not found.problem
        yield _judged(
            "extensions",
            found.problem or f"the {found.kind} {found.name} of {found.package}",
            is_bad=bool(found.problem),
            remedy=f"repair the package {found.package}, or uninstall it",
        )
    if not num_usable:
        yield Finding(check="extensions", state="ok", text="no package adds anything usable")


def _pytorch() -> Iterator[Finding]:
    import torch

    build = torch.version.cuda or getattr(torch.version, "hip", None)
    text = f"{torch.__version__}, built for {build if build else 'CPUs'}"
    yield Finding(check="pytorch", state="ok", text=text)


def _cpu_and_memory() -> Iterator[Finding]:
    from orchestrator.planning.machine import free_memory, local_resources

    cpus, load = local_resources(count_gpus=False).cpus, os.getloadavg()[0]
    yield _judged(
        "cpu",
        f"{format_count(cpus, 'CPU')}, load {load:.1f}",
        is_bad=load > 1.5 * cpus,
        state="note",
        remedy="other processes use the CPUs; trainings are slower",
    )
    free, total = free_memory(), psutil.virtual_memory().total
    yield _judged(
        "memory",
        f"{format_bytes(free)} of {format_bytes(total)} free",
        is_bad=free < LEAST_MEMORY,
        remedy="end other programs, or raise the container's limit",
    )


def _gpus() -> Iterator[Finding]:
    import torch

    from orchestrator.planning.machine import driver_version, installed_gpus, nvml_module

    gpus, usable = installed_gpus(), torch.cuda.device_count()
    if not gpus and not usable:
        yield Finding(check="gpus", state="ok", text="none; everything runs on CPUs")
        return
    listed = ", ".join(f"{gpu.name} ({format_bytes(gpu.free_bytes)} free)" for gpu in gpus)
    yield _judged(
        "gpus",
        f"{listed or usable}; driver {driver_version() or 'unknown'}; PyTorch uses {usable}",
        is_bad=usable < len(gpus),
        remedy="install a PyTorch that is built for this driver (pytorch.org), and see nvidia-smi",
    )
    if usable and torch.version.cuda and nvml_module() is None:
        yield Finding(
            check="gpus",
            state="note",
            text="the memory, load and names of GPUs are unknown to plans and metrics",
            remedy=f"pip install '{DISTRIBUTION}[gpu]'",
        )


def _disk(workspace: Workspace) -> Iterator[Finding]:
    places = {"workspace": workspace.root, "temporary files": Path(tempfile.gettempdir())}
    for what, folder in places.items():
        free = free_disk(folder)
        yield _judged(
            "disk",
            f"{format_bytes(free)} free for the {what} in {folder}",
            is_bad=free < LEAST_DISK,
            remedy="`iiet-orch clean` lists what can go",
        )


def _ray() -> Iterator[Finding]:
    from orchestrator.cluster.joining import check_ray_can_run

    address = chosen_address(None)
    check_ray_can_run(address)
    where = "starts on this machine" if address == LOCAL else f"answers at {address}"
    yield Finding(check="ray", state="ok", text=f"Ray {installed_version('ray')} {where}")
    abandoned = [str(folder) for folder in abandoned_folders()]
    if abandoned:
        left = _processes_in(abandoned)
        kill = f"kill {' '.join(map(str, left))}; then " if left else ""
        yield Finding(
            check="ray",
            state="note",
            text=f"{format_count(len(abandoned), 'folder')} {PREFIX}* of killed commands"
            + (f", whose processes {', '.join(map(str, left))} still run" if left else ""),
            remedy=f"{kill}`iiet-orch clean ray`",
        )


def _processes_in(folders: list[str]) -> list[int]:
    """Return the processes whose command line names one of these folders."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if any(folder in line for folder in folders):
            found.append(process.pid)
    return found


def _mlflow(workspace: Workspace) -> Iterator[Finding]:
    uri = workspace.tracking_uri
    shown, remedy = strip_credentials(uri), "correct MLFLOW_TRACKING_URI, or unset it"
    problem = None
    if uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=SERVER_SECONDS).close()
        except (OSError, ValueError) as error:
            problem = f"no MLflow server answers at {shown} ({mask_secrets(str(error))})"
            remedy += "; runs go on meanwhile, and `iiet-orch sync` delivers later"
    elif uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
        try:
            if path.exists():
                with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                    database.execute("SELECT count(*) FROM sqlite_master").fetchall()
        except sqlite3.Error as error:
            problem = f"the database {path} cannot be read ({error})"
            remedy = "move it away; `iiet-orch sync` publishes the workspace in a new one"
    text = problem or f"store {shown}"
    yield _judged("mlflow", text, is_bad=bool(problem), remedy=remedy)
    if pending := pending_records(workspace):
        text = f"{format_count(pending, 'record')} not delivered to MLflow"
        yield Finding(check="mlflow", state="note", text=text, remedy="`iiet-orch sync`")


def _workspace(workspace: Workspace) -> Iterator[Finding]:
    if not workspace.root.exists():
        text = f"{workspace.root} does not exist yet; the first command makes it"
        yield Finding(check="workspace", state="ok", text=text)
        return
    with read_only():
        open_workspace(workspace.root)
    if not os.access(workspace.root, os.W_OK):
        raise UserError(f"{workspace.root} cannot be written; choose another with --workspace")
    try:
        is_locked(workspace.root / WORKSPACE_FILE_NAME)
    except OSError as error:
        raise UserError(
            f"the file system of {workspace.root} has no locks ({error.strerror}); move the "
            "workspace to one that has"
        ) from None
    running = read_status(workspace).activities
    names = ", ".join(activity.name for activity in running) or "nothing"
    yield Finding(check="workspace", state="ok", text=f"{workspace.root}; {names} runs in it")


def _hub() -> Iterator[Finding]:
    from orchestrator.data.hub import hub_problem

    problem = hub_problem()
    yield _judged(
        "hugging face hub",
        problem or "reachable",
        is_bad=bool(problem),
        state="note",
        remedy="data sets and models of the hub must be in its cache or in files",
    )
