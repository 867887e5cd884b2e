"""A teacher's influence table as it is stored with the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from orchestrator.records.record import Influence, Record

INFLUENCE_PATTERN = "influence-*.json"
"""Names of the files of influence tables in a checkpoint."""


class StoredInfluence(Record):
    """An influence table, and what it was measured on."""

    key: str
    """Hash of everything that determines the table: weights, schedule, tokens, metric."""
    table: Influence


class StoredRounds(Record):
    """The finished rounds of measuring whole layers one at a time."""

    key: str
    """Key of the table that the rounds lead to."""
    rounds: tuple[dict[str, Any], ...]
    """One entry for each removed layer, as `iiet.iiad.influence.LeavingRound` writes it."""


def rounds_path(checkpoint: Path, metric: str) -> Path:
    """Return the file of the rounds of a metric."""
    return checkpoint / f"rounds-{metric}.json"


def influence_path(checkpoint: Path, metric: str) -> Path:
    """Return the file of the table of a metric."""
    return checkpoint / INFLUENCE_PATTERN.replace("*", metric)
