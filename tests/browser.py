"""Headless Chromium, for tests that read MLflow's pages as a user sees them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def page_text(url: str, profile: Path) -> str:
    """Return a page's elements after its scripts have run.

    Args:
        url: Address of the page.
        profile: Folder for the browser's files; created if it is missing.
    """
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--disable-sync", f"--user-data-dir={profile}", "--virtual-time-budget=90000"),
        # Charts are drawn when they come into view, which they only do in a picture.
        *("--window-size=1600,2400", f"--screenshot={profile}.png", "--dump-dom", url),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
