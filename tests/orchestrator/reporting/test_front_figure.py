"""Front figure: its content, read from Matplotlib's objects."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from sample_trials import sample_front

from orchestrator.records.trial import Trial
from orchestrator.reporting.figure_style import save_figure
from orchestrator.reporting.front_axes import PAPER_MARK, FrontAxes
from orchestrator.reporting.front_figure import draw_front


def names_in(panel: Panel) -> list[str]:
    legend = panel.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def boxes_of_labels(figure: Figure) -> dict[str, tuple[float, float, float, float]]:
    texts = [t for t in figure.axes[0].texts if t.get_text()]
    return {t.get_text(): t.get_window_extent().extents for t in texts}


def test_front_shows_roles_steps_and_labels(sample_results: list[Trial]) -> None:
    front = sample_front(sample_results)
    figure = draw_front(front, title="Toy", mark_paper=True)
    panel = figure.axes[0]
    assert {"front", "teacher", "dominated trial", "vanilla", PAPER_MARK} <= set(names_in(panel))
    steps = next(line for line in panel.lines if line.get_label() == "front")
    assert steps.get_drawstyle() == "steps-post"
    assert list(steps.get_xdata())[:-1] == [point.cost for point in front.members]
    labels = boxes_of_labels(figure)
    assert "011111 (knee)" in labels
    assert "000000" in labels


def test_distilled_baselines_of_one_kind_share_a_marker(sample_results: list[Trial]) -> None:
    (vanilla,) = (r for r in sample_results if r.label == "vanilla")
    (teacher,) = (r for r in sample_results if r.role == "teacher")
    distilled = {"role": "baseline", "parent": teacher.key}
    deep = [
        vanilla.model_copy(
            update={
                **distilled, "key": f"deep{count}",
                "model": dataclasses.replace(vanilla.model, num_layers=count),
                "cost": vanilla.cost.model_copy(update={"evaluations": count}),
            }
        )
        for count in (8, 16)
    ]  # fmt: skip
    fewer = teacher.model_copy(update={**distilled, "key": "fewer"})
    figure = draw_front(sample_front([*sample_results, *deep, fewer]))
    names = names_in(figure.axes[0])
    assert [name for name in names if "front" not in name and "trial" not in name] == [
        "teacher", "vanilla", "r = 0 from scratch", "vanilla, distilled", "fewer layers"
    ]  # fmt: skip
    assert {"8 layers", "16 layers"} <= set(boxes_of_labels(figure))


def test_labels_do_not_overlap(sample_results: list[Trial]) -> None:
    boxes = list(boxes_of_labels(draw_front(sample_front(sample_results))).values())
    assert len(boxes) > 5
    for i, (left, bottom, right, top) in enumerate(boxes):
        for other_left, other_bottom, other_right, other_top in boxes[i + 1 :]:
            apart = right <= other_left or other_right <= left
            assert apart or top <= other_bottom or other_top <= bottom


def test_a_loss_has_an_inverted_axis(sample_results: list[Trial]) -> None:
    axes = FrontAxes("cost/decode_ms_per_token", "quality/bits_per_byte")
    panel = draw_front(sample_front(sample_results, axes), mark_paper=True).axes[0]
    low, high = panel.get_ylim()
    assert low > high
    # The paper's headline is about accuracy and means nothing on a loss.
    assert PAPER_MARK not in names_in(panel)


def test_several_sweeps_lie_under_the_front_of_all(sample_results: list[Trial]) -> None:
    half = [result for result in sample_results if result.role == "trial"][::2]
    sweep_of = {r.key: "first" if r in half else "second" for r in sample_results}
    front = sample_front(sample_results, sweep_of=sweep_of)
    panel = draw_front(front).axes[0]
    assert {"front of all", "first", "second", "teacher"} <= set(names_in(panel))
    steps = [line for line in panel.lines if line.get_drawstyle() == "steps-post"]
    assert [line.get_alpha() for line in steps] == [None, 0.45, 0.45]
    assert list(steps[0].get_xdata())[:-1] == [point.cost for point in front.members]
    drawn = [list(line.get_xdata())[:-1] for line in steps[1:]]
    for name in ("first", "second"):
        assert [point.cost for point in front.by_sweep[name].members] in drawn
    markers = {line.get_marker() for line in panel.lines if line.get_linestyle() == "None"}
    assert {"o", "s", "*"} <= markers


def test_errors_are_drawn_and_an_empty_front_is_refused(sample_results: list[Trial]) -> None:
    front = sample_front(sample_results)
    panel = draw_front(front).axes[0]
    ends = sorted(
        float(end)
        for bars in panel.collections
        for segment in bars.get_segments()  # type: ignore[attr-defined]
        for end in segment[:, 1]
    )
    expected = [100 * (p.quality + sign * (p.error or 0)) for p in front.points for sign in (-1, 1)]
    assert ends == pytest.approx(sorted(expected))
    with pytest.raises(ValueError, match="at least one result"):
        draw_front(sample_front([]))


def test_the_same_picture_has_the_same_bytes(sample_results: list[Trial], tmp_path: Path) -> None:
    front = sample_front(sample_results)
    first = save_figure(draw_front(front), tmp_path / "a")
    second = save_figure(draw_front(front), tmp_path / "b")
    assert [path.name for path in first] == ["a.png", "a.svg"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
