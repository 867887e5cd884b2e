"""Tags of a new run that say who started it, with which command, and which commit of the code."""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path

from orchestrator.tracking.client import get_git_commit, resolve_tags
from orchestrator.workspace.errors import strip_credentials

SOURCE_TAG = "mlflow.source.name"
COMMIT_TAG, REPOSITORY_TAG = "mlflow.source.git.commit", "mlflow.source.git.repoURL"
COMMAND = "iiet-orch"
PROGRAMS = (f"/{COMMAND}", "/orchestrator/cli/__main__.py")
"""How the path of the running program ends if it is this command."""


@lru_cache(maxsize=1)
def context_tags() -> dict[str, str]:
    """Return the tags of MLflow's context providers, plugins and `MLFLOW_RUN_CONTEXT` among them.

    MLflow looks for the commit beside the program, which may lie outside the repository of the code
    that it runs; then the commit is that of this package.
    """
    tags = {name: str(value) for name, value in resolve_tags().items()}
    if Path(sys.argv[0]).as_posix().endswith(PROGRAMS):
        tags[SOURCE_TAG] = " ".join([COMMAND, *sys.argv[1:2]])
    if COMMIT_TAG not in tags and (commit := get_git_commit(__file__)):
        tags[COMMIT_TAG] = commit
    if REPOSITORY_TAG in tags:
        tags[REPOSITORY_TAG] = strip_credentials(tags[REPOSITORY_TAG])
    return tags
