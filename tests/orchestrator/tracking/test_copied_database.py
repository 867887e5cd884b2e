"""The tests' copied databases are what MLflow's migrations make."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from copied_database import copy_databases
from mlflow.store.db import utils as mlflow_utils
from sqlalchemy import create_engine

utils: Any = mlflow_utils


@pytest.mark.slow
def test_a_copied_database_is_a_migrated_one(tmp_path: Path) -> None:
    copy_databases(tmp_path / "template.db")
    copied = [_made_by(utils._initialize_tables, tmp_path / name) for name in ("a.db", "b.db")]
    migrated = _made_by(utils._initialize_tables.migrate, tmp_path / "c.db")
    assert copied == [migrated, migrated]
    assert any(table == "experiments" for table, *_ in migrated)
    assert ("alembic_version", utils._get_latest_schema_revision()) in migrated


def _made_by(make: Callable[[Any], None], path: Path) -> set[tuple[object, ...]]:
    """Return the columns of a database's tables and indexes, and its version.

    Not its statements: the migrations write constraints in a random order.
    """
    engine = create_engine(f"sqlite:///{path}")
    make(engine)
    engine.dispose()
    with closing(sqlite3.connect(path)) as database:
        return {
            row
            for query in (
                "SELECT m.name, c.name, c.type, c.[notnull], c.pk, c.dflt_value"
                " FROM sqlite_master m, pragma_table_info(m.name) c",
                "SELECT m.tbl_name, m.name, c.name"
                " FROM sqlite_master m, pragma_index_info(m.name) c WHERE m.sql IS NOT NULL",
                "SELECT m.name, k.[from], k.[table], k.[to], k.on_delete"
                " FROM sqlite_master m, pragma_foreign_key_list(m.name) k",
                "SELECT 'alembic_version', version_num FROM alembic_version",
            )
            for row in database.execute(query)
        }
