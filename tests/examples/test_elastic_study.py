"""The bars of the elastic study: fixed numbers, met or not by made-up results."""

from __future__ import annotations

from pathlib import Path

import elastic_study as study
import pytest
from elastic_figure import write_figure
from sample_trials import sample_trial

from orchestrator.records.trial import Trial
from orchestrator.reporting.elastic_section import ElasticRow, ElasticSection
from orchestrator.reporting.front_axes import FrontAxes
from orchestrator.settings import read_settings
from orchestrator.sweeping.checks import check_sweep
from orchestrator.sweeping.elastic_plans import ElasticFlops


def model(schedule: tuple[int, ...], loss: float, accuracy: float) -> Trial:
    quality = {"validation_loss": loss, "accuracy": accuracy}
    return sample_trial(key=f"{schedule} {loss}", schedule=schedule, quality=quality)


def reading(teacher: str, share: float = 0.3) -> study.Reading:
    pairs = {
        (3, 3): (model((3, 3), 2.001, 0.99), model((3, 3), 2.0, 1.0)),
        (0, 3): (model((0, 3), 2.1, 0.97), model((0, 3), 2.1, 0.985)),
        (0, 2): (model((0, 2), 2.204, 0.80), model((0, 2), 2.2, 0.85)),
        (0, 0): (model((0, 0), 2.3, 0.1), model((0, 0), 2.3, 0.6)),
    }
    rows = (ElasticRow(elastic=one, student=two, difference=None) for one, two in pairs.values())
    section = ElasticSection(rows=tuple(rows), axes=FrontAxes(), flops=None)
    flops = ElasticFlops(share, 1.0)
    longer = model((3, 3), 1.99, 1.0)
    return study.Reading(teacher=teacher, times=2, section=section, longer=longer, flops=flops)


def verdicts(of: study.Reading) -> dict[str, bool]:
    return {name: value <= most for name, value, most in study.checks(of)}


def test_text_is_held_to_the_loss_of_every_schedule() -> None:
    assert verdicts(reading("text")) == {
        "(3,3) against its student": True,
        "(0,3) against its student": True,
        "(0,2) against its student": False,
        "(0,0) against its student": True,
        "the full schedule against the teacher trained on": False,
        "share of the separate students' training FLOPs": True,
    }


def test_depth_is_held_to_the_accuracy_of_two_schedules() -> None:
    assert verdicts(reading("depth", share=0.4)) == {
        "(0,3) against its student": True,
        "(0,2) against its student": False,
        "share of the separate students' training FLOPs": False,
    }
    page = study.study_markdown([reading("depth")])
    assert "| (0,2) against its student | 0.0500 | 0.0200 | no |" in page
    assert "trained on for as many steps: validation_loss 1.9900, accuracy 1.0000." in page


def test_the_picture_shows_each_schedule_at_the_cost_of_each_length(tmp_path: Path) -> None:
    readings = [reading("text"), reading("depth", share=0.2), reading("depth", share=0.4)]
    panels = study.figure_panels(readings)
    label, lines, most = panels["depth"]
    assert "points" in label
    assert most == pytest.approx(2.0)
    assert [share for share, _ in lines["0,2"]] == [0.2, 0.4]
    assert [worse for _, worse in lines["0,2"]] == pytest.approx([5.0, 5.0])
    assert panels["text"][1]["0,2"][0] == (0.3, pytest.approx(4.0))  # 0.004 nats.
    paths = write_figure(panels, study.MAX_FLOPS, tmp_path / "trade-off")
    assert [path.suffix for path in paths] == [".png", ".svg"]
    assert "0,3" in paths[1].read_text()  # The legend names the schedules.


@pytest.mark.parametrize("teacher", study.TEACHERS)
def test_its_sweeps_are_possible(teacher: str) -> None:
    file, *changes = study.TEACHERS[teacher]
    usual = ["sweep.elastic=true", "sweep.compare=true", "sweep.seeds=[0, 1]"]
    own = study._of_length(read_settings(file, [*changes, *usual]), 2.5)
    check_sweep(own)
    longer = study._longer_teacher(own)
    check_sweep(longer)
    assert (longer.sweep.selection, longer.sweep.budgets) == ("threshold", ())
    num_steps = own.distillation.training.num_steps
    assert longer.distillation.training.num_steps == own.sweep.elastic_steps == 2.5 * num_steps


@pytest.mark.slow
def test_a_dry_run_says_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "ws"
    assert study.main(["--dry-run", "--workspace", str(folder), "--times", "1", "3"]) == 0
    printed = capsys.readouterr().out
    assert "text: then elastic trainings of 60, 180 steps" in printed
    assert "depth: then elastic trainings of 400, 1,200 steps" in printed
    assert not folder.exists()
