"""Charts: their content, read from their data and from the SVG that is drawn of them."""

from __future__ import annotations

import itertools
import math
import re
from html import unescape
from typing import Any

import pytest
import vl_convert
from refusals import refused
from sample_trials import sample_front, sample_trial

from orchestrator.reporting.charts import (
    BASELINE,
    NAME_WIDTHS,
    PAPER_MARK,
    TEACHER,
    Spec,
    curves_chart,
    front_chart,
    influence_chart,
    menu_fronts,
    save_chart,
)
from orchestrator.reporting.colors import run_color
from orchestrator.reporting.front import FrontAxes, with_confidence

pytestmark = pytest.mark.slow  # Most of a second draws a chart.

CHARACTER_WIDTH = 6.7
LETTER_SIZE = 8.0
"""The height of a name's letters, about, in pixels."""


def texts_in(svg: str) -> set[str]:
    return {unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)}


def width_of(svg: str) -> float:
    return float(re.findall(r'<svg [^>]*?width="([\d.]+)"', svg)[0])


def names_in(svg: str) -> dict[str, list[tuple[float, float]]]:
    """Return the places of the letters of each model's name; a halo has the same places."""
    places = {}
    pattern = (
        r'<text text-anchor="(\w+)" transform="translate\(([-\d.]+),([-\d.]+)\)"'
        r'[^>]*font-size="12px"[^>]*stroke="#ffffff"[^>]*>([^<]+)<'
    )
    for anchor, x, y, text in re.findall(pattern, svg):
        name = unescape(text)
        start = {"start": 0.0, "middle": len(name) / 2, "end": len(name)}[anchor]
        steps = (CHARACTER_WIDTH * (n + 0.5 - start) for n in range(len(name)))
        places[name] = [(float(x) + step, float(y)) for step in steps]
    return places


def drawn(chart: Spec) -> str:
    return str(vl_convert.vegalite_to_svg(chart))


def test_the_subtitle_says_whose_line_it_is(sample_results):
    """A baseline may stand above the line, in which it does not compete."""
    chart = front_chart(sample_front(sample_results), title="Toy")
    assert "best of teacher and students at each cost" in chart["title"]["subtitle"]
    competing = sample_front([r for r in sample_results if r.role != "teacher"])
    assert "teacher" not in front_chart(competing, title="Toy")["title"]["subtitle"]


def test_the_front_shows_roles_steps_and_names(sample_results, tmp_path):
    front = sample_front(sample_results)
    svg = drawn(front_chart(front, title="Toy", mark_paper=True))
    assert {"Toy", "trial", TEACHER, BASELINE, PAPER_MARK} <= texts_in(svg)
    names = names_in(svg)
    assert {"0,1,1,1,1,1 (knee)", "0,0,0,0,0,0", "vanilla", "teacher"} <= set(names)
    off_front = [model for model in front.placed if model.role == "trial" and not model.on_front]
    assert off_front
    assert len(names) == len(front.placed) - len(off_front) > 5
    # No name covers another one, on a page and on a phone, where those without room are left out.
    on_phone = drawn({**front_chart(front, mark_paper=True), "width": NAME_WIDTHS[1]})
    phone = names_in(on_phone)
    # The legend's longest name is below the chart, not beside it.
    unmarked = drawn({**front_chart(front), "width": NAME_WIDTHS[1]})
    assert width_of(on_phone) == width_of(unmarked)
    assert 'fill="black"' not in unmarked, "marks of the legend are hollow"
    assert {"0,0,0,0,0,0", "teacher"} <= set(phone) <= set(names)
    for names_of_width in (names, phone):
        for letters, letters_of_another in itertools.combinations(names_of_width.values(), 2):
            assert (
                min(math.dist(*pair) for pair in itertools.product(letters, letters_of_another))
                > LETTER_SIZE
            )
    bars = re.findall(r'<line [^>]*x2="0" y2="(-?[\d.]+)"[^>]*stroke-width="1.2"', svg)
    errors = sorted(model.error for model in front.placed)
    lengths = sorted(abs(float(bar)) for bar in bars)
    assert [length / lengths[-1] for length in lengths] == pytest.approx(
        [error / errors[-1] for error in errors], rel=1e-3
    )
    for chart in (save_chart(front_chart(front), tmp_path / name) for name in "ab"):
        assert [path.suffix for path in chart] == [".png", ".svg"]
    for kind in ("png", "svg"):  # The same picture has the same bytes.
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    # A model with an infinite loss is not drawn on a front of losses.
    infinite = {"cost/evaluations": 1.0, "quality/validation_loss": math.inf}
    lost = sample_results[0].model_copy(
        update={"key": "lost", "label": "lost", "role": "baseline", "numbers": infinite}
    )
    axes = FrontAxes(quality="quality/validation_loss")
    names = names_in(drawn(front_chart(sample_front([*sample_results, lost], axes))))
    assert "vanilla" in names
    assert "lost" not in names
    with refused(ValueError, "result"):
        front_chart(sample_front([]))


def test_no_name_stands_on_the_line_of_the_front():
    """The chart is low, so that the place above the full model's star would be on the line."""
    points = {"source": (2, 0.766), "0,2": (4, 0.888), "1,3": (6, 0.992), "3,3": (8, 0.992)}
    trials = [
        sample_trial(key=name, label=name, cost={"evaluations": x}, quality={"accuracy": y})
        for name, (x, y) in points.items()
    ]
    teacher = {"key": "full", "label": "teacher", "role": "teacher"}
    trials.append(sample_trial(**teacher, cost={"evaluations": 8}, quality={"accuracy": 0.97}))
    names = names_in(drawn({**front_chart(sample_front(trials), height=215), "width": 500}))
    line = names["1,3"][0][1] + 10  # This name stands above the end of a step.
    assert abs(names["teacher"][0][1] - line) > LETTER_SIZE


def test_every_pair_of_axes_has_its_front(sample_results):
    results = [*sample_results, sample_trial(key="new", cost={"evaluations": 1.0})]
    fronts = menu_fronts(sample_front(results))
    pairs = [(front.axes.cost, front.axes.quality) for front in fronts]
    costs = {cost for cost, _ in pairs}
    assert {"cost/evaluations", "cost/flops_per_token"} <= costs
    assert pairs == [*itertools.product(dict(pairs), dict.fromkeys(q for _, q in pairs))]
    for front in fronts:
        expected = sample_front(results, FrontAxes(front.axes.cost, front.axes.quality))
        points = front_chart(front)["data"]["values"]
        drawn_on = sorted((point["x"], point["y"]) for point in points if point["is_member"])
        places = sorted((member.cost, member.quality) for member in expected.members)
        assert drawn_on == [pytest.approx(place) for place in places]


def test_axes_that_no_model_has_together_are_drawn_empty(sample_results):
    apart = [
        sample_trial(key="a", cost={"evaluations": 1.0}),
        sample_trial(key="b", quality={"accuracy": 0.5}),
    ]
    assert "Accuracy" in texts_in(drawn(front_chart(sample_front(apart))))


@pytest.mark.parametrize("cost", ["cost/evaluations", "cost/decode_ms_per_token"])
def test_the_papers_mark_stands_between_vanilla_and_the_full_model(sample_results, cost):
    def place(pattern: str) -> float:
        match = re.search(r'<path transform="translate\(([\d.]+),[\d.]+\)" ' + pattern, svg)
        assert match
        return float(match[1])

    full_and_vanilla = [result for result in sample_results if result.role != "trial"][:2]
    svg = drawn(front_chart(sample_front(full_and_vanilla, FrontAxes(cost)), mark_paper=True))
    vanilla = place('d="M-[\\d.]+,0L0,-')
    full = place('d="M0,-')
    mark = place('[^>]*stroke="#ffffff" stroke-width="8"')
    assert (mark - vanilla) / (full - vanilla) == pytest.approx(0.45)
    # Where vanilla was not trained, its evaluations are known, but not its time.
    svg = drawn(front_chart(sample_front(full_and_vanilla[:1], FrontAxes(cost)), mark_paper=True))
    assert ('stroke-width="8"' in svg) == (cost == "cost/evaluations")


@pytest.mark.parametrize("quality", ["accuracy", "bits_per_byte"])
def test_the_better_model_is_higher_also_on_a_loss(sample_results, quality):
    axes = FrontAxes("cost/decode_ms_per_token", f"quality/{quality}")
    svg = drawn(front_chart(sample_front(sample_results, axes), mark_paper=True))
    # The paper's headline is about accuracy, and means nothing of a loss.
    assert (PAPER_MARK in texts_in(svg)) == (quality == "accuracy")
    names = names_in(svg)
    assert names["teacher"][-1][1] < names["0,0,0,0,0,0"][-1][1]


def test_the_trials_of_each_sweep_have_a_color_and_a_shape(sample_results):
    half = [result for result in sample_results if result.role == "trial"][::2]
    sweep_of = {r.key: "first" if r in half else "second" for r in sample_results}
    svg = drawn(front_chart(sample_front(sample_results, sweep_of=sweep_of)))
    assert {"first", "second", TEACHER} <= texts_in(svg)
    steps = re.findall(r'<path d="M[^"]*L[^"]*" stroke="#\w+" stroke-width="([\d.]+)"', svg)
    assert steps == ["2"], "one line: the front of all"


def test_no_two_models_of_a_sweep_have_the_same_color_in_mlflow(sample_results):
    baselines = ("vanilla", "vanilla, 8 layers", "r = 0", "r = 1", "pcformer", "source")
    colors = [run_color("baseline", name, 0.25) for name in baselines]
    # Two of them cost the same.
    for trial in [result for result in sample_results if result.role != "baseline"]:
        share = trial.model.corrections.num_evaluations / 24
        colors.append(run_color(trial.role, trial.label, share))
    assert all(re.fullmatch("#[0-9a-fA-F]{6}", color) for color in colors)
    channels = [[int(color[start : start + 2], 16) for start in (1, 3, 5)] for color in colors]
    assert min(math.dist(*pair) for pair in itertools.combinations(channels, 2)) > 10


def test_tooltips_say_how_certain_a_place_is(sample_results, sample_evaluations):
    front = with_confidence(sample_front(sample_results), sample_evaluations)
    tips: list[dict[str, str]] = [row["tip"] for row in front_chart(front)["data"]["values"]]
    tip = next(tip for tip in tips if tip["title"].startswith("0,1,1,1,1,1"))
    assert [*tip][:2] == ["title", "NFE per token"], "the most important number comes first"
    assert tip["Accuracy"] == "44.4 ± 1.1%"
    assert 0 < float(tip["Confidence: on the front"].lstrip("<>")) < 1


def test_the_heat_map_has_every_number_and_the_cut(sample_influence):
    schedule = (0, 1, 1, 1, 1, 1)
    chart = influence_chart(
        sample_influence, metric="cosine", marked_schedule=schedule, marked_name="knee"
    )
    texts = {f"{value:.2g}" for row in sample_influence for value in row}
    assert texts | {"kept: knee"} <= texts_in(drawn(chart))
    cut: list[dict[str, Any]] = chart["layer"][-1]["data"]["values"]
    assert [corner["from"] for corner in cut] == [0.5, 0.5, *[1.5] * 10]
    # Rows may differ in length, and have zeros and gaps.
    chart = influence_chart([[0.1], [0.2, 0.0], [math.nan, math.nan]], metric="loss")
    cells = chart["data"]["values"]
    assert sorted(cell["text"] for cell in cells) == ["0", "0.1", "0.2"]
    assert {"0", "0.1", "0.2"} <= texts_in(drawn(chart))
    with refused(ValueError, "correction"):
        influence_chart([[], [math.nan]], metric="loss")


def test_curves_are_named_and_have_titles():
    curves = [("a", [(0, 3.0), (10, 2.0), (20, math.inf)]), ("b", [(0, 3.0), (10, 1.0)])]
    svg = drawn(curves_chart("Validation loss", curves))
    assert {"a", "b", "Validation loss", "Step"} <= texts_in(svg)
    assert len(re.findall(r'<path[^>]*stroke-width="1.8"', svg)) == 2
