"""One more sentence after an error: what the words of a command probably should have been."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)+=")
_SCHEDULE = re.compile(r"\d+([,.*]+\d+)*")


def hint(words: Sequence[str]) -> str | None:
    """Return what to type instead of a command that was refused; None if nothing is known."""
    for option, word in zip(["", *words], words, strict=False):
        if _SETTING.match(word) and not option.startswith("-"):
            return f"{word} looks like a setting; write --set {word}"
        if words[0] == "distill" and _SCHEDULE.fullmatch(word) and not option.startswith("-"):
            return f"the schedule of distill is an option: write --schedule {word}"
        if words[0] == "compare" and option == "--json" and word.endswith(".json"):
            return f"--json prints to standard output: write --json > {word}"
    return None
