"""YAML files from users are read within limits."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.settings import read_settings
from orchestrator.workspace.errors import UserError


def _bomb() -> str:
    """Return nine levels of nine aliases each: 387 million values in 20 lines."""
    lines = ["a: &a [" + ", ".join("x" * 9) + "]"]
    for below, above in pairwise("abcdefghi"):
        lines.append(f"{above}: &{above} [" + ", ".join([f"*{below}"] * 9) + "]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (_bomb(), "more than 20,000 values"),
        ("a: 1\n" * 100_000, "more than 20,000 values"),
        ("a: &a [*a]", "contains itself"),
        ("a: &a {<<: *a}", "contains itself"),
        ("a: " + "[" * 50 + "]" * 50, "more than 32 levels deep"),
        (
            "\n".join(f"a{i}: &a{i} [{f'*a{i - 1}' if i else 1}]" for i in range(50)),
            "32 levels",
        ),
        ("a: " + "x" * 1_000_000, "more than 1,000,000 characters"),
        ("training:\n  num_steps: " + "9" * 5000, "cannot be read as a whole number"),
        ("a: 2026-13-01", "cannot be read as a date"),
        ("a: \0", "special characters are not allowed"),
    ],
)
def test_a_file_beyond_a_limit_is_refused_in_a_short_message(
    text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_settings(tmp_path / "s.yaml")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000
