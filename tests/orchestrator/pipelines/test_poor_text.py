"""A sweep over text that gives no test items ends before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_size import SMALL

from orchestrator import cli


@pytest.mark.parametrize("kind", ["threshold", "search", "iterations"])
def test_text_too_poor_for_its_tasks_ends_a_sweep_before_training(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, workspace = tmp_path / "codes.txt", tmp_path / "workspace"
    text.write_text("<|endoftext|>".join(f"{i} " + f"0x{i:02x}; " * 40 for i in range(1, 60)))
    settings = [*SMALL, "data.source=files", f"data.files=[{text}]", f"sweep.kind={kind}"]
    changes = [part for setting in settings for part in ("--set", setting)]
    assert cli.main(["sweep", "toy", *changes, "--workspace", str(workspace)]) == 2
    printed = " ".join(capfd.readouterr().err.split())
    assert "the held-out documents give no test items: they contain too little English" in printed
    assert "Traceback" not in printed
    assert not [*workspace.glob("runs/*/*"), *workspace.glob("trials/*/*")]
