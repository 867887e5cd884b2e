"""Finds a port for a local server, and its processes, so that a test can say that none is left."""

from __future__ import annotations

import socket

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


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
