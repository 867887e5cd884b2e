"""Which tasks the pipelines' evaluations run."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.evaluation import measuring
from orchestrator.evaluation.store import MeasuredTask


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks that were run, in order."""
    names: list[str] = []
    real = measuring.run_task

    def recorded(name: str, *arguments: Any) -> MeasuredTask:
        names.append(name)
        return real(name, *arguments)

    monkeypatch.setattr(measuring, "run_task", recorded)
    return names
