"""Runs `iiet-orch` commands in processes of their own, and reads the runs that they leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.workspace.journal import Record, read_journal
from orchestrator.workspace.layout import open_workspace

POLL_SECONDS = 0.02
NUM_LINES_SHOWN = 15
"""Last lines of a failed command's output in the report."""


class CommandFailed(Exception):
    """A command ended with another exit code than 0; holds the end of its output."""


@dataclass(frozen=True)
class RunRecord:
    """The journal of a run."""

    folder: Path

    @property
    def records(self) -> list[Record]:
        """All records; none before the run has started."""
        return read_journal(self.folder)[0]

    def values(self, metric: str) -> dict[int, float]:
        """Return a metric by step; of a step that was trained twice, the later value."""
        return {
            record["step"]: record["values"][metric]
            for record in self.records
            if record["kind"] == "metrics" and metric in record["values"]
        }

    def events(self, name: str) -> list[Record]:
        """Return the events of a name, in order."""
        return [record for record in self.records if record.get("name") == name]


class Commands:
    """Commands of one workspace."""

    def __init__(self, workspace: Path, environment: Mapping[str, str] | None = None) -> None:
        self.workspace = open_workspace(workspace)
        self._environment = {**os.environ, **(environment or {})}
        self._log = workspace / "commands.log"

    def run_record(self, name: str) -> RunRecord:
        """Return the journal of `pretrain --name NAME`."""
        return RunRecord(self.workspace.runs / name)

    def run(self, *arguments: str, settings: Mapping[str, Any]) -> float:
        """Run a command to its end and return its seconds.

        Raises:
            CommandFailed: If its exit code is not 0.
        """
        started = time.monotonic()
        process = self._start(arguments, settings)
        if code := process.wait():
            raise CommandFailed(self._failure(arguments, code))
        return time.monotonic() - started

    def kill_when(
        self, condition: Callable[[], bool], *arguments: str, settings: Mapping[str, Any]
    ) -> None:
        """Start a command and kill it (SIGKILL) as soon as a condition holds.

        Raises:
            CommandFailed: If it ends before.
        """
        process = self._start(arguments, settings)
        while not condition():
            if (code := process.poll()) is not None:
                raise CommandFailed(self._failure(arguments, code))
            time.sleep(POLL_SECONDS)
        process.kill()
        process.wait()

    def _start(
        self, arguments: Sequence[str], settings: Mapping[str, Any]
    ) -> subprocess.Popen[bytes]:
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        call = [sys.executable, "-m", "orchestrator.cli", *arguments, *options]
        call += ["--workspace", str(self.workspace.root)]
        with self._log.open("ab") as log:
            log.write(f"\n$ iiet-orch {' '.join(call[3:])}\n".encode())
            log.flush()
            return subprocess.Popen(
                call, stdout=log, stderr=subprocess.STDOUT, env=self._environment
            )

    def _failure(self, arguments: Sequence[str], code: int) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        end = "\n".join(lines[-NUM_LINES_SHOWN:])
        return f"iiet-orch {arguments[0]} ended with exit code {code}\n{end}"
