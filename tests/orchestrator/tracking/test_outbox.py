"""The outbox keeps every operation once and in order, also after crashes."""

from __future__ import annotations

import math
from pathlib import Path

from orchestrator.tracking.outbox import Outbox, Record


def records(*numbers: int) -> list[Record]:
    return [{"operation": "metrics", "number": n} for n in numbers]


def test_delivery_stops_at_the_first_failure(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.add(records(1, 2, 3))
    assert outbox.deliver(lambda record: record["number"] < 2) == 1
    assert outbox.records() == records(2, 3)
    assert outbox.deliver(lambda record: True) == 2
    assert outbox.records() == []


def test_records_with_nan_are_stored_once_and_removed(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    for _ in range(2):
        outbox.add([{"value": math.nan}])
    assert outbox.deliver(lambda record: True) == 1
    assert outbox.records() == []


def test_an_equal_operation_waits_once_and_last(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.add(records(1, 2))
    outbox.add(records(1))
    assert outbox.records() == records(2, 1)


def test_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.add(records(1, 2))
    whole, other = outbox.path.read_text().splitlines()
    for damaged in (other[:-5], other.replace("2", "3"), '{"trials": 1}', "[" * 100_000):
        outbox.path.write_text(f"{damaged}\n{whole}\n")
        assert (outbox.records(), outbox.num_damaged()) == (records(1), 1)
    outbox.add(records(4))
    assert (outbox.records(), outbox.num_damaged()) == (records(1, 4), 0)
