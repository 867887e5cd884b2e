"""Of many models, tables, pages and bootstraps hold those on the front and nearest to it."""

from __future__ import annotations

import csv
import json
import random
import re
from pathlib import Path

import pytest
from sample_trials import sample_front, sample_trial

from orchestrator.reporting.front_tables import models_table
from orchestrator.reporting.pareto import MAX_SHOWN, Front, left_out_notes
from orchestrator.reporting.report import SweepReport, write_report_files

NUM_TRIALS = 600


@pytest.fixture
def front() -> Front:
    draw = random.Random(0)
    trials = [
        sample_trial(
            key=f"k{n}",
            role="teacher" if n == 0 else "baseline" if n == 1 else "trial",
            label=f"model {n}",
            cost={"evaluations": 24 if n == 0 else draw.randint(6, 23)},
            quality={"accuracy": 0.9 if n == 0 else 0.5 * draw.random(), "other": draw.random()},
        )
        for n in range(NUM_TRIALS)
    ]
    return sample_front(trials)


def test_those_of_a_small_front_are_all_shown(front: Front) -> None:
    small = sample_front(front.results[:MAX_SHOWN])
    assert small.shown == small.points
    assert not left_out_notes(small)


def test_members_teacher_and_baselines_are_shown_and_the_nearest_others(front: Front) -> None:
    shown = front.shown
    assert len(shown) == MAX_SHOWN
    assert [p for p in front.points if p in shown] == list(shown), "the order stays"
    needed = [p for p in front.points if p.on_front or p.result.role != "trial"]
    assert set(map(id, needed)) <= set(map(id, shown))

    def shortfall(point: object) -> float:
        cheaper = [m.quality for m in front.members if m.cost <= point.cost]  # type: ignore[attr-defined]
        return max(cheaper) - point.quality  # type: ignore[attr-defined]

    near = [shortfall(p) for p in shown if p.is_candidate]
    far = [shortfall(p) for p in front.points if p not in shown]
    assert max(near) <= min(far)
    [note] = left_out_notes(front)
    assert f"Of {NUM_TRIALS} models" in note


def test_a_page_holds_the_members_of_every_front_and_data_files_hold_all(
    front: Front, tmp_path: Path
) -> None:
    files = {
        path.name: path
        for path in write_report_files(SweepReport(name="many", front=front), tmp_path)
    }
    assert len(list(csv.DictReader(files["front.csv"].read_text().splitlines()))) == NUM_TRIALS
    assert models_table(front).to_markdown().count("model ") <= MAX_SHOWN
    found = re.search(r'id="charts">(.*?)</script>', files["front.html"].read_text())
    assert found
    [chart] = json.loads(found[1])
    [rows] = (rows for rows in chart["datasets"].values() if "members" in rows[0])
    assert len(rows) < NUM_TRIALS
    best = max(front.results, key=lambda result: result.value("quality/other") or 0.0)
    assert best.key in [row["key"] for row in rows]
    assert files["front.html"].stat().st_size < 1_500_000
    assert files["front.svg"].stat().st_size < 1_000_000
