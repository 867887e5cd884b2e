"""The README and the pages of docs/, and the commands, Python and YAML in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Line:
    """A command of a page, as words."""

    page: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    text = page.read_text(encoding="utf-8")
    return [block for _, name, block in FENCE.findall(text) if name == language]


def shell_lines() -> list[Line]:
    """Return the commands of all shell blocks, without comments and prompts."""
    lines = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    lines.append(Line(page.name, tuple(words)))
    return lines


def inline_commands() -> list[Line]:
    """Return the commands within sentences and tables, such as `iiet-orch list KIND`."""
    commands = []
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for code in re.findall(r"`(iiet-orch [^`]+)`", text):
            commands.append(Line(page.name, tuple(shlex.split(code.replace("\n", " ")))))
    return commands
