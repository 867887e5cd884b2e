"""A forward pass of IIET runs the files that docs/architecture.md lists, and no others."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import iiet
from iiet import Decoder, fast, preset

PACKAGE = Path(iiet.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
TITLE = "## A forward pass: from tokens to logits"


def documented_path() -> list[tuple[str, list[str]]]:
    """Return the rows of the page's table: a file, and the functions and classes named there."""
    section = PAGE.read_text(encoding="utf-8").split(TITLE)[1].split("\n## ")[0]
    rows = re.findall(r"^\| `iiet/([\w/]+\.py)` \| (.*?) \|", section, flags=re.MULTILINE)
    return [(file, re.findall(r"`([\w.]+)`", names)) for file, names in rows]


def functions_on_tensors(run) -> set[tuple[str, str]]:
    """Return (file, qualified name) of each function of `iiet` that gets or returns a tensor.

    The others read values that were known before the pass: config, schedule, facts of the method.
    """
    calls = set()

    def note(frame, event, result):
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(PACKAGE):
            return
        values = list(frame.f_locals.values()) if event == "call" else result
        if any(isinstance(value, torch.Tensor) for value in tree_leaves(values)):
            calls.add((str(path.relative_to(PACKAGE)), frame.f_code.co_qualname))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("is_training", [False, True])
def test_a_pass_runs_the_documented_files_and_functions(is_training, monkeypatch):
    monkeypatch.setattr(fast, "ENABLED", False)
    decoder = Decoder(preset("tiny", num_layers=2, schedule="2,0"))
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with torch.set_grad_enabled(is_training):
        calls = functions_on_tensors(lambda: decoder(tokens))
    # Turned off, this file only says that the plain formulas apply.
    calls = {(file, name) for file, name in calls if file != "fast.py"}
    path = documented_path()
    files = {file for file, _ in path}
    assert {file for file, _ in calls} == files
    assert len(files) <= 6
    for file, names in path:
        for name in names:
            assert any(
                called_file == file and called_name.startswith(name)
                for called_file, called_name in calls
            ), name
