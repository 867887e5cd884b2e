"""The commands of docs/tutorial.md run in their order, at a small size, and ask nothing."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TextIO

import pytest
from documented import ROOT, blocks
from sample_texts import help_texts
from small_size import SMALL

from orchestrator import cli
from orchestrator.data.text import DOCUMENT_MARK

PAGE = ROOT / "docs" / "tutorial.md"
NOT_RUN = {"pip", "iiet-orch ui"}
"""An installation, and a server that does not end."""
TAKES_SETTINGS = {"sweep"}

pytestmark = pytest.mark.long


def commands() -> list[list[str]]:
    """Return the words of each line."""
    lines = [line for block in blocks(PAGE, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def test_from_text_to_a_model_of_transformers(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    ray_session: None,
    terminal: TextIO,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IIET_WORKSPACE", raising=False)
    monkeypatch.setattr("sys.stdin", terminal)
    texts = tmp_path / "my-texts"
    texts.mkdir()
    text = DOCUMENT_MARK.join(help_texts(100))
    (texts / "python.txt").write_text(text, encoding="utf-8")
    ran = []
    for words in commands():
        if words[0] in NOT_RUN or " ".join(words) in NOT_RUN:
            continue
        small = [f"--set={change}" for change in SMALL] if words[1] in TAKES_SETTINGS else []
        assert cli.main([*words[1:], *small]) == 0, capfd.readouterr().err
        ran.append(words[1])
    assert {"doctor", "init", "sweep", "status", "pick", "generate"} <= set(ran)
    captured = capfd.readouterr()
    assert re.search(r"schedule.*NFE", captured.out)
    used = re.findall(r"^model: (.*), (.*)$", captured.err, flags=re.MULTILINE)
    assert len(used) == 2
    assert Path(used[1][0]) == tmp_path / "my-model"
    assert used[0][1] == used[1][1], "the picked model, and the folder that it was exported to"
