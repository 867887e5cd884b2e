"""Point MLflow's database in a workspace to the artifacts beside it, after a move or a copy.

MLflow stores absolute addresses of artifacts. The database of the original is not opened.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

ARTIFACTS_TAG = "iiet.artifacts_in_workspace"
"""Tag of experiments whose artifacts lie in the database's workspace."""
ADDRESS_COLUMNS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
}


def relocate_artifacts(database: Path, artifacts: Path) -> None:
    """Rewrite the addresses of artifacts that lay elsewhere, in one transaction.

    Call it before MLflow opens the database. Other addresses stay as they are.

    Raises:
        sqlite3.Error: If the database is damaged.
    """
    if not database.is_file() or not database.stat().st_size:
        return
    with closing(sqlite3.connect(database)) as connection, connection:
        if not connection.execute(
            "SELECT 1 FROM sqlite_master WHERE name = 'experiment_tags'"
        ).fetchone():
            return  # MLflow has not made its tables yet.
        earlier = connection.execute(
            "SELECT DISTINCT artifact_location FROM experiments JOIN experiment_tags "
            "USING (experiment_id) WHERE key = ? AND artifact_location != ?",
            (ARTIFACTS_TAG, artifacts.as_uri()),
        )
        for (address,) in earlier.fetchall():
            for table, columns in ADDRESS_COLUMNS.items():
                for column in columns:
                    connection.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (
                            artifacts.as_uri(),
                            len(address) + 1,
                            address,
                            len(address) + 1,
                            f"{address}/",
                        ),
                    )
