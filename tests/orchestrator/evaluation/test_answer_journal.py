"""A journal gives back what was written whole, whatever happened to the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.evaluation.answer_journal import AnswerJournal

SCORES = {"a": [[-1.25, True], [-0.1 - 0.2, False]], "b": "a text\nof two lines, ü"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "evaluations" / "key.answers"


def write(path: Path, answers: dict[str, object] = SCORES) -> None:
    AnswerJournal(path, seconds_between_writes=0).add(answers)


def test_values_come_back_exactly(path: Path) -> None:
    write(path)
    write(path, {"c": [[float("-inf"), False]]})
    journal = AnswerJournal(path)
    assert {key: journal.get(key) for key in ("a", "b", "c", "d")} == {
        **SCORES,
        "c": [[float("-inf"), False]],
        "d": None,
    }
    assert journal.num_answers == 4


def test_each_damaged_line_is_as_good_as_missing(path: Path) -> None:
    for key in "abc":
        write(path, {key: [[-1.5, True]]})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'{"b":[[-1.5', b'{"b":[[-2.5')[:-4])
    write(path, {"d": "after a cut line"})
    journal = AnswerJournal(path)
    assert [journal.get(key) is not None for key in "abcd"] == [True, False, False, True]
    path.write_bytes(b"\xff\x00" * 99 + b"\n[]\n" + whole)
    assert AnswerJournal(path).num_answers == 3


def interrupted(journal: AnswerJournal) -> None:
    journal.add(SCORES)
    raise KeyboardInterrupt


def test_a_second_passes_between_writes_and_an_error_writes_the_rest(path: Path) -> None:
    with AnswerJournal(path, seconds_between_writes=1e9) as journal:
        journal.add(SCORES)
    assert not path.exists(), "a finished task has no use for its journal"
    journal = AnswerJournal(path, seconds_between_writes=1e9)
    with pytest.raises(KeyboardInterrupt), journal:
        interrupted(journal)
    assert AnswerJournal(path).get("b") == SCORES["b"]


def test_a_file_that_cannot_be_written_is_said_once(path: Path) -> None:
    path.parent.write_text("not a folder")
    errors: list[OSError] = []
    journal = AnswerJournal(path, failed=errors.append, seconds_between_writes=0)
    assert journal.num_answers == 0
    for _ in range(2):
        journal.add(SCORES)
    assert len(errors) == 1
