"""MLflow databases of tests, copied from the first one that a test has made.

MLflow makes a database by all migrations of its history, which takes a second of CPU and dozens of
waits for the disk. One database is made like this; the others get its tables.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any


def copy_databases(template: Path) -> None:
    """Let MLflow, once it is imported, copy `template` instead of migrating an empty database.

    Args:
        template: Where the first database is kept.
    """
    utils: Any = sys.modules.get("mlflow.store.db.utils")
    if utils is None or hasattr(utils._initialize_tables, "migrate"):
        return
    migrate = utils._initialize_tables

    def copy_or_migrate(engine: Any) -> None:
        if engine.dialect.name != "sqlite" or not utils._is_empty_database(engine):
            migrate(engine)
        elif template.exists():
            _copy(template, Path(engine.url.database))
        else:
            migrate(engine)
            # Another process may do the same.
            unfinished = template.with_name(f"{template.name}.{os.getpid()}")
            _copy(Path(engine.url.database), unfinished)
            unfinished.replace(template)

    copy_or_migrate.migrate = migrate
    utils._initialize_tables = copy_or_migrate


def _copy(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)
