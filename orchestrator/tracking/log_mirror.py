"""Passes runs on to a logger beside MLflow, from the operations and journals that MLflow gets.

A process reads the journal of a run anew, from its beginning. So a resumed training has each point
once, and nothing has to be remembered between processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from iiet.extensions import ExtensionError, ExtensionTable
from orchestrator.settings.cluster import LOGGERS as LOGGER_NAMES
from orchestrator.tracking.run_logger import LoggedRun, RunLogger
from orchestrator.tracking.tensorboard_logger import TensorBoardLogger
from orchestrator.workspace.errors import UserError, first_line
from orchestrator.workspace.journal import read_journal

LOGGERS: ExtensionTable[type[RunLogger]] = ExtensionTable(
    LOGGER_NAMES, {"tensorboard": TensorBoardLogger}, bases=(RunLogger,)
)
"""Loggers beside MLflow by name; the keys are values of the setting `tracking.loggers`."""


def logger_class(name: str) -> type[RunLogger]:
    """Return a logger's class.

    Raises:
        UserError: If its package is missing or broken.
    """
    try:
        return LOGGERS[name]
    except ExtensionError as error:
        raise UserError(f"tracking.loggers: {error}") from None


def log_folder(root: Path, name: str) -> Path:
    """Return the folder of a logger in a workspace; those of other packages share one."""
    return root / name if name in LOGGER_NAMES.own else root / "loggers" / name


@dataclass
class _Run:
    """A run, and what this process has passed on of it."""

    logger: RunLogger
    offset: int = 0
    """Bytes of the journal that were read."""
    steps: dict[str, int] = field(default_factory=dict)
    """Last step of each metric."""


class LogMirror:
    """Passes runs on to a logger, whose files lie in `folder`/SWEEP/RUN."""

    def __init__(self, name: str, folder: Path, *, warn: Callable[[str], None]) -> None:
        """Use a logger; `warn` is called once if it fails.

        Raises:
            UserError: If its package is missing or broken.
        """
        self._name, self._class = name, logger_class(name)
        self._folder, self._warn = folder, warn
        self._runs: dict[Path, _Run] = {}
        self._has_failed = False

    def update(self, identity: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
        """Pass on an update of a run.

        Args:
            identity: The values of its `RunIdentity`.
            arguments: Those of the update: `params`, `points`, `journal`, a folder whose new
                metrics are passed on, and `status`; a status other than RUNNING ends the run.
        """
        try:
            self._update(self._run(identity), arguments)
        except Exception as error:  # A logger runs its own code.
            if not self._has_failed:
                self._warn(
                    f"the logger {self._name} cannot log to {self._folder} "
                    f"({first_line(error, with_type=True)}); the work continues without it"
                )
            self._has_failed = True

    def _run(self, identity: Mapping[str, Any]) -> _Run:
        parent = identity.get("parent")
        run = LoggedRun(
            key=identity["key"],
            kind=identity.get("kind", ""),
            name=identity["name"],
            sweep=parent["name"] if parent else None,
        )
        folder = self._folder / (_file_name(run.sweep) if run.sweep else "")
        place = folder / _file_name(run.name)
        known = self._runs.get(place)
        if known is not None and known.logger.run.key != run.key:  # Another run of the same name.
            place = place.with_name(f"{place.name} {run.key}")
            known = self._runs.get(place)
        if known is None:
            known = self._runs[place] = _Run(self._class(place, run))
        return known

    def _update(self, run: _Run, arguments: Mapping[str, Any]) -> None:
        status = arguments.get("status") or "RUNNING"
        if parameters := arguments.get("params"):
            run.logger.log_parameters(parameters)
        if journal := arguments.get("journal"):
            self._read(run, Path(journal))
        points = sorted(arguments.get("points", ()), key=itemgetter(2))
        for step, of_step in groupby(points, key=itemgetter(2)):
            run.logger.log_results(step, {name: value for name, value, _ in of_step})
        run.logger.flush()
        if status != "RUNNING":
            run.logger.close(status)

    def _read(self, run: _Run, journal: Path) -> None:
        records, run.offset = read_journal(journal, run.offset)
        for record in records:
            if record["kind"] != "metrics":
                continue
            step = record["step"]
            # A resumed training repeats the steps since its checkpoint, with the same values.
            new = {n: v for n, v in record["values"].items() if step > run.steps.get(n, -1)}
            run.steps |= dict.fromkeys(new, step)
            if new:
                run.logger.log(step, new, time=record["time"] / 1000)


def _file_name(name: str) -> str:
    # Other systems take neither slashes nor colons in names of files.
    return re.sub(r"[^\w.,=+ -]", "_", name)
