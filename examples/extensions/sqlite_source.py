"""A data source of one's own: documents of an SQLite database."""

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from orchestrator import UserError
from orchestrator.data.text import TextSource


@dataclass(frozen=True, kw_only=True)
class SqliteOptions:
    """Set by `data.source_options.sqlite`."""

    file: str
    query: str = "SELECT text FROM documents ORDER BY id"


class Sqlite(TextSource):
    """Documents from a table of an SQLite database."""

    Options = SqliteOptions

    def state(self):
        return [str(self.path()), self.path().stat().st_size, self.path().stat().st_mtime_ns]

    def documents(self, shard):
        with closing(sqlite3.connect(f"file:{self.path()}?mode=ro", uri=True)) as database:
            for number, (text,) in enumerate(database.execute(self.options.query)):
                yield text, f"row {number}"

    def num_bytes(self):
        return self.path().stat().st_size

    def path(self):
        path = Path(self.options.file).absolute()
        if not path.is_file():
            raise UserError(f"data.source_options.sqlite.file: there is no file {path}")
        return path
