"""TensorBoard's event files, from the journals that MLflow's runs are filled from.

A process writes the files of a run anew, from the beginning of the journal, and deletes those of
earlier processes. So a resumed training has each point once, and nothing has to be remembered
between processes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.workspace.journal import Record, read_journal

EVENT_FILES = "events.out.tfevents.*"


@dataclass
class _Run:
    """What this process has written of one run."""

    folder: Path
    key: str
    offset: int = 0
    """Bytes of the journal that were read."""
    steps: dict[str, int] = field(default_factory=dict)
    """Last step of each metric."""
    writer: Any = None
    """Open while the run is running."""


class TensorBoardLog:
    """Mirrors journals into `folder`/SWEEP/RUN, for `tensorboard --logdir folder`."""

    def __init__(self, folder: Path, *, warn: Callable[[str], None]) -> None:
        """Use a folder; the first metric creates it. `warn` is called once if it fails."""
        self._folder, self._warn = folder, warn
        self._runs: dict[Path, _Run] = {}
        self._has_failed = False

    def mirror(self, run: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
        """Write the new metrics of the journal that an update of a run names, if it names one.

        Args:
            run: The values of its `RunIdentity`.
            arguments: Those of the update: `journal` is a folder; a `status` other than RUNNING
                closes the files.
        """
        journal = arguments.get("journal")
        if journal is None:
            return
        try:
            self._write(self._run(run), Path(journal), arguments.get("status", "RUNNING"))
        except OSError as error:
            if not self._has_failed:
                self._warn(f"cannot write TensorBoard's files in {self._folder} ({error})")
            self._has_failed = True

    def _run(self, run: Mapping[str, Any]) -> _Run:
        parent = run.get("parent")
        folder = self._folder / (_file_name(parent["name"]) if parent else "")
        place = folder / _file_name(run["name"])
        known = self._runs.setdefault(place, _Run(place, run["key"]))
        if known.key == run["key"]:
            return known
        place = place.with_name(f"{place.name} {run['key']}")  # Another run of the same name.
        return self._runs.setdefault(place, _Run(place, run["key"]))

    def _write(self, run: _Run, journal: Path, status: str) -> None:
        is_first = run.offset == 0
        records, run.offset = read_journal(journal, run.offset)
        for record in records:
            if record["kind"] == "metrics":
                if is_first:
                    for earlier in run.folder.glob(EVENT_FILES):
                        earlier.unlink(missing_ok=True)
                    is_first = False
                _add_points(run, record)
        if run.writer is not None:
            run.writer.flush()
            if status != "RUNNING":
                run.writer.close()
                run.writer = None


def _add_points(run: _Run, record: Record) -> None:
    if run.writer is None:
        from torch.utils.tensorboard import SummaryWriter  # Takes seconds, and few use it.

        run.writer = SummaryWriter(str(run.folder))
    step = record["step"]
    for name, value in record["values"].items():
        # A resumed training repeats the steps since its checkpoint, with the same values.
        if step > run.steps.get(name, -1):
            run.steps[name] = step
            run.writer.add_scalar(name, value, step, walltime=record["time"] / 1000)


def _file_name(name: str) -> str:
    # Other systems take neither slashes nor colons in names of files.
    return re.sub(r"[^\w.,=+ -]", "_", name)
