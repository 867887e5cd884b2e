"""The command line: thin commands that read settings, call stages and print one table.

Nothing heavy is imported at the top, so that `--help` is instant: each command imports what it
needs. Commands stand in the order in which people meet them.
"""

from orchestrator.cli import training, stages, sweeps, search, results, models  # noqa: F401, I001  # the order of --help
from orchestrator.cli.app import app, main

__all__ = ["app", "main"]
