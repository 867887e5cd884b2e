"""Shares of a mixture: its sources, and how many of its sequences each gives."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping

from iiet.extensions import ExtensionNames
from orchestrator.settings.depth import TASK_KINDS, is_depth_task, parse_task_name
from orchestrator.workspace.errors import quoted

OTHER_SOURCES = ("depth", "mixture")
"""Values of `data.source` that are no text."""


def _is_reserved(name: str) -> bool:
    return name in OTHER_SOURCES or is_depth_task(name)


TEXT_SOURCES = ExtensionNames(
    "iiet_orch.data_sources", "data source", ("python", "files", "hub"), is_reserved=_is_reserved
)
"""Names of text sources, also of other packages; their classes: `orchestrator.data.text_source`."""


def check_shares(shares: Mapping[str, float]) -> None:
    """Check the shares of a mixture; none at all are not checked.

    Raises:
        ValueError: If a name is no source, a share is not above 0, or they do not sum to 1.
    """
    for name, share in shares.items():
        if name not in TEXT_SOURCES:
            _check_task(name)
        if share <= 0:
            raise ValueError(f"the share of {name} is {share:g}; it must be above 0")
    total = math.fsum(shares.values())
    if shares and abs(total - 1) > 1e-6:
        raise ValueError(f"the shares sum to {total:.6g}; they must sum to 1")


def source_order(names: Iterable[str]) -> list[str]:
    """Return the sources of a mixture in their order: texts first, then tasks by name."""
    return sorted(names, key=lambda name: (name not in TEXT_SOURCES, name))


def _check_task(name: str) -> None:
    try:
        parse_task_name(name)
    except ValueError as error:
        if any(name.startswith(f"{kind}_") for kind in TASK_KINDS):
            raise
        depth = "".join(filter(str.isdigit, name)) or "6"
        known = [*TEXT_SOURCES, *(f"{kind}_{depth}" for kind in TASK_KINDS)]
        (near,) = difflib.get_close_matches(name, known, n=1) or ["phop_6"]
        raise ValueError(
            f"{quoted(name)} is not a source; did you mean {near}? Sources are "
            f"{', '.join(TEXT_SOURCES)} and depth tasks such as phop_6; a source of another "
            "package needs this package installed"
        ) from error
