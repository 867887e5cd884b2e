"""Finds the processes of a local server, so that a test can say that none is left."""

from __future__ import annotations

import psutil


def servers(port: int) -> list[psutil.Process]:
    """Return the processes that have a port among their arguments, but this test's command."""
    running = psutil.process_iter(["cmdline", "status"])
    return [
        process
        for process in running
        if str(port) in (words := process.info["cmdline"] or [])
        and "orchestrator.cli" not in words
        and process.info["status"] != psutil.STATUS_ZOMBIE
    ]
