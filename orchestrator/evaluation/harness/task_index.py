"""Index of lm-eval's own tasks: name -> folders, found in 14,000 YAML files without parsing.

lm-eval parses all of them, which takes 8 seconds; a regular expression takes 0.3 to 3 seconds.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

_NAMED = re.compile(rb"^(task|group|tag):[ \t]*[\"']?([\w.:+-]+)", re.MULTILINE)
_TAG_LIST = re.compile(rb"^tag:[ \t]*\n((?:[ \t]*-[ \t]*[\w.:+-]+[ \t]*\n?)+)", re.MULTILINE)
_ITEM = re.compile(rb"-[ \t]*([\w.:+-]+)")


@lru_cache(maxsize=2)
def index_names(root: Path) -> dict[str, set[str]]:
    """Map each name of a task, group or tag under `root` to the folders to load it from.

    A task needs its own folder. A group may use tasks elsewhere in its family, so it needs the
    whole family: the top folder, directly under `root`.
    """
    folders: defaultdict[str, set[str]] = defaultdict(set)
    for folder, _, files in os.walk(root):
        family = str(root.joinpath(*Path(folder).relative_to(root).parts[:1]))
        for name in files:
            if not name.endswith(".yaml"):
                continue
            text = Path(folder, name).read_bytes()
            for kind, named in _NAMED.findall(text):
                folders[named.decode()].add(family if kind == b"group" else folder)
            if b"tag:" in text:
                for block in _TAG_LIST.findall(text):
                    for named in _ITEM.findall(block):
                        folders[named.decode()].add(folder)
    return dict(folders)


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most similar to a misspelt one, if any."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.75)
    return near[0] if near else None
