"""The command line: a command reads its settings, calls one pipeline and returns its result.

Each command imports what it needs when it runs, so that `--help` is instant.
"""

from orchestrator.cli.app import commands, main

__all__ = ["commands", "main"]
