"""The command line: a command parses, calls one pipeline and prints what it returns.

Each command imports what it needs when it runs, so that `--help` is instant.
"""

from orchestrator.cli import training, measuring, sweeps, results, models, cluster, manifests  # noqa: F401, I001  # the order of --help
from orchestrator.cli.app import main

__all__ = ["main"]
