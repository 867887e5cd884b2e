"""Section on what corrections are worth: which models it compares, in all formats of the report."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from sample_trials import sample_trial

from orchestrator.cli.printing import print_report
from orchestrator.pipelines.reports import report_result
from orchestrator.records.training import TrainingJob
from orchestrator.records.trial import Trial, TrialSuite
from orchestrator.reporting.overlay_report import write_overlay_report
from orchestrator.reporting.sweep_report import write_sweep_report
from orchestrator.reporting.sweep_results import StoredSweep
from orchestrator.reporting.worth_section import WORTH_TITLE, WorthSection, worth_section
from orchestrator.settings import TrainingSettings
from orchestrator.workspace.folders import Workspace, open_workspace


def law(depth: float) -> float:
    return 3.0 - 0.5 * math.log(depth)


def scratch(
    name: str,
    num_layers: int,
    loss: float,
    *,
    r: int | None = None,
    method: str = "",
    seed: int | None = None,
    rate: float = 2e-3,
    sweep: str = "",
    accuracy: float = 0.5,
    **values: Any,
) -> Trial:
    """Return a finished training from scratch; with r, of an IIET unless a method is given."""
    method = method or ("vanilla" if r is None else "iiet")
    label = name if seed is None else f"{name}, seed {seed}"
    trial = sample_trial(
        key=f"{label} {num_layers} {rate}{sweep}",
        role="trial" if r is not None else "baseline",
        method=method,
        schedule=(r or 0,) * num_layers,
        label=label,
        group=None if seed is None else name,
        seed=seed,
        suite=TrialSuite(tokens_folder="", tokens="some"),
        quality={"accuracy": accuracy, "validation_loss": loss},
        train={"steps": 100, "tokens": 6400},
        cost={"evaluations": num_layers * (1 + (r or 0))},
    )
    recipe = TrainingSettings(num_steps=100, learning_rate=rate, seed=seed or 0)
    job = TrainingJob(run_folder="", tokens_folder="", model=trial.model, recipe=recipe)
    return trial.model_copy(update={"job": job, **values})


VANILLA = [scratch("vanilla", depth, law(depth)) for depth in (2, 4, 8)]
WORTH_HALF = scratch("r = 3", 2, law(4), r=3)
"""Two layers with four evaluations each that are as good as four layers: phi 0.5."""


def phis(*results: Trial, **sweep_of: str) -> dict[str, float | None]:
    section = worth_section(results, sweep_of)
    return {row.name: row.worth.phi for row in section.rows} if section else {}


def test_a_model_is_placed_among_the_vanilla_models_of_its_sweep() -> None:
    section = worth_section([*VANILLA, WORTH_HALF, scratch("r = 0", 2, law(2), r=0)])
    assert isinstance(section, WorthSection)
    none, full = section.rows
    assert (full.name, full.worth.phi) == ("r = 3", pytest.approx(0.5))
    assert full.cells == ("r = 3", "2", "4", "1", "2.307", "4.00 layers", "0.50")
    assert none.cells[-2:] == ("2.00 layers", "none")
    assert "2 layers 2.653, 4 layers 2.307, 8 layers 1.96." in section.notes[0]
    assert section.notes[-1].startswith("r = 0 has no phi: it evaluates each layer once")


def test_any_method_counts_by_its_evaluations_per_layer() -> None:
    thrice = scratch("pcformer", 2, law(2 * 3**0.46), method="pcformer", r=0)
    assert thrice.model.evaluations_per_layer() == (3, 3)
    ramp = scratch("r = 3,1", 2, law(2 * 3**0.46), r=3)
    model = type(ramp.model).from_dict({**ramp.model.to_dict(), "schedule": [3, 1]})
    ramp = ramp.model_copy(update={"model": model})
    looped = scratch("looped, r = 1", 2, law(2 * 2**0.46), method="looped", r=1)
    assert phis(*VANILLA, thrice, ramp, looped) == {
        "looped, r = 1": pytest.approx(0.46),
        "pcformer": pytest.approx(0.46),
        "r = 3,1": pytest.approx(0.46),
    }


def test_there_is_no_section_without_depths_or_without_corrections() -> None:
    assert worth_section([VANILLA[0], WORTH_HALF]) is None
    assert worth_section([*VANILLA, scratch("r = 0", 2, law(2), r=0)]) is None
    assert worth_section(VANILLA) is None
    assert worth_section([]) is None


@pytest.mark.parametrize(
    "other",
    [
        {"suite": TrialSuite(tokens_folder="", tokens="others")},
        {"train": WORTH_HALF.train.model_copy(update={"tokens": 12800})},
    ],
)
def test_models_on_other_tokens_do_not_compare(other: dict[str, Any]) -> None:
    section = worth_section([*VANILLA, WORTH_HALF.model_copy(update=other)])
    assert section is not None
    assert "at least two depths, trained on the same tokens" in section.rows[0].worth.refusal


def test_students_and_pruned_schedules_are_no_models_with_corrections() -> None:
    student = WORTH_HALF.model_copy(update={"key": "s", "label": "student", "parent": "teacher"})
    pruned = WORTH_HALF.model_copy(update={"key": "p", "label": "pruned", "job": None})
    teacher = pruned.model_copy(update={"key": "t", "label": "teacher", "role": "teacher"})
    assert list(phis(*VANILLA, student, pruned, teacher)) == ["teacher"]


def test_the_best_learning_rate_counts_and_seeds_give_an_interval() -> None:
    lucky = scratch("r = 3, rate 0.004", 2, law(8), r=3, rate=4e-3)
    seeds = [
        scratch("r = 3", 2, law(4) + shift, r=3, seed=seed)
        for seed, shift in enumerate((-0.02, 0.0, 0.02))
    ]
    bad = scratch("vanilla, rate 0.1", 4, 9.0, rate=0.1)
    section = worth_section([*VANILLA, bad, lucky, *seeds])
    assert section is not None
    [row] = section.rows
    assert (row.name, len(row.model.losses)) == ("r = 3", 3), "one seed may be lucky"
    assert row.worth.interval is not None
    assert row.worth.interval.low < 0.5 < row.worth.interval.high
    assert row.cells[-1].startswith("0.50 (0.4")


def test_models_of_one_name_have_their_sweep_beside_it() -> None:
    two_stages = WORTH_HALF.job.recipe.model_copy(update={"iterate_from_fraction": 0.5})  # type: ignore[union-attr]
    job = WORTH_HALF.job.model_copy(update={"recipe": two_stages})  # type: ignore[union-attr]
    other = WORTH_HALF.model_copy(update={"key": "two stages", "job": job})
    sweep_of = {WORTH_HALF.key: "one", "two stages": "two"}
    assert set(phis(*VANILLA, WORTH_HALF, other, **sweep_of)) == {"r = 3 (one)", "r = 3 (two)"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    space = open_workspace(tmp_path / "ws")
    sweeps = {"depths": [*VANILLA, WORTH_HALF], "vanilla": VANILLA, "corrections": [WORTH_HALF]}
    for name, results in sweeps.items():
        StoredSweep(name=name, key=name, results=tuple(results)).store(space)
    return space


def test_the_section_is_in_every_file_and_in_the_terminal(workspace: Workspace) -> None:
    alone = write_sweep_report(workspace, "depths")
    overlay = write_overlay_report(workspace, ["vanilla", "corrections"])
    for written in (alone, overlay):
        markdown = (written.folder / "front.md").read_text("utf-8")
        assert f"## {WORTH_TITLE}" in markdown
        assert "| r = 3 | 2 | 4 | 1 | 2.307 | 4.00 layers | 0.50 |" in markdown
        page = (written.folder / "front.html").read_text("utf-8")
        assert f"<h2>{WORTH_TITLE}</h2>" in page
        [row] = json.loads((written.folder / "front.json").read_text("utf-8"))["correction_worth"]
        assert row["phi"] == pytest.approx(0.5)
        assert row["phi_interval"] is None
        console = Console(file=StringIO(), width=100)
        print_report(console, report_result(written), workspace.root)
        said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
        assert "r = 3 2 4 1 2.307 4.00 layers 0.50" in said


def test_other_sweeps_have_no_such_section(workspace: Workspace) -> None:
    written = write_sweep_report(workspace, "vanilla")
    assert written.report.worth is None
    assert WORTH_TITLE not in (written.folder / "front.md").read_text("utf-8")
    assert "correction_worth" not in (written.folder / "front.json").read_text("utf-8")
