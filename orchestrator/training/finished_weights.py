"""Find finished trainings by their key: equal weights are not trained twice, whatever they are for.

A run of `pretrain --name`, a model of a sweep and a student may be the same training.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from orchestrator.workspace.errors import UserError
from orchestrator.workspace.files import read_json
from orchestrator.workspace.layout import DONE_NAME, JOB_NAME, Workspace


def folder_of_weights(workspace: Workspace, key: str, usual: Path) -> Path:
    """Return the folder in which a training is finished or will run.

    Args:
        key: Key of the training.
        usual: Its folder, unless it is finished in another one.
    """
    if (usual / JOB_NAME).exists():
        return usual
    # Folders of trials are named by their keys, so only the names of runs tell nothing.
    for done in (
        *sorted(workspace.runs.glob(f"*/{DONE_NAME}")),
        workspace.trials / key / DONE_NAME,
    ):
        record = done.with_name(JOB_NAME)
        are_files = done.is_file() and record.is_file()
        if are_files and _key_in(record, record.stat().st_mtime_ns) == key:
            return done.parent
    return usual


@lru_cache(maxsize=4096)
def _key_in(record: Path, _modified: int) -> str | None:
    try:
        return (read_json(record) or {}).get("key")
    except UserError:
        return None  # Who uses that run is told of the damage.
