"""The command line: a command parses, calls one pipeline and prints what it returns.

Each command imports what it needs when it runs, so that `--help` is instant.
"""

# The order is that of --help.
from orchestrator.cli import quick_start, training, distilling, measuring, comparing  # noqa: F401, I001
from orchestrator.cli import sweeps, searching, results, models, picking  # noqa: F401
from orchestrator.cli import submit, workspace, checking, settings  # noqa: F401
from orchestrator.cli.app import main

__all__ = ["main"]
