"""Rank correlations of influence and the cost of dropping: ties, a case by hand, the scatter."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from rich.console import Console

from iiet.influence import InfluenceTable
from iiet.pruning import schedule_family
from iiet.schedule import IterationSchedule
from orchestrator.reporting.influence_check import (
    InfluenceCheck,
    influence_check_table,
    rank_correlation,
)
from orchestrator.reporting.influence_check_figure import draw_influence_check

Rows = tuple[tuple[float, ...], ...]


def check_of(
    cosine: Rows,
    loss: Rows,
    accuracy_lost: Rows = (),
    pruned: Mapping[tuple[int, ...], float] | None = None,
) -> InfluenceCheck:
    def table(metric: str, rows: Rows, lost: Rows = ()) -> InfluenceTable:
        return InfluenceTable(metric, rows, rows, 64, accuracy_lost_rows=lost)  # type: ignore[arg-type]

    tables = {"cosine": table("cosine", cosine), "loss": table("loss", loss, accuracy_lost)}
    if pruned is None:  # Every schedule of both families is alike.
        families = [schedule_family(one) for one in tables.values()]
        qualities = {member.schedule: 0.5 for family in families for member in family}
    else:
        qualities = {IterationSchedule(counts): quality for counts, quality in pruned.items()}
    return InfluenceCheck(tables, qualities)  # type: ignore[arg-type]


def test_equal_values_share_the_mean_of_their_ranks() -> None:
    assert rank_correlation([1, 20, 300], [0.1, 0.2, 0.9]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)), here with d = 0, 1, -1, 0.
    assert rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, squares 4.5 and 5.
    assert rank_correlation([1, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    for values in ([1.0], [2.0, 2.0, 2.0]):
        assert math.isnan(rank_correlation(values, list(range(len(values)))))


def test_suffix_maxima_repair_an_order_that_single_values_do_not_show() -> None:
    """Layer 1's first correction looks small, but goes together with the large second one."""
    check = check_of(
        cosine=((0.01, 0.4), (0.2, 0.02)),
        loss=((2.0, 1.5), (0.1, -0.001)),
        accuracy_lost=((0.31, 0.3), (0.02, 0.0)),
    )
    assert check.names == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert check.costs == pytest.approx([31.0, 30.0, 2.0, 0.0])
    # Ranks 1, 4, 3, 2 against 4, 3, 2, 1; suffix maxima 3.5, 3.5, 2, 1.
    expected = (1 - 6 * (9 + 1 + 1 + 1) / 60, 4.5 / math.sqrt(4.5 * 5))
    assert check.correlations("cosine") == pytest.approx(expected)
    assert check.correlations("loss") == pytest.approx((1.0, 1.0))
    console = Console(width=80)
    with console.capture() as captured:
        console.print(influence_check_table(check))
    printed = [line.split() for line in captured.get().splitlines()]
    assert ["1,2", "0.4", "1.5", "30"] in printed
    assert ["cosine", "-0.20", "+0.95", "50.0"] in printed
    assert "4 corrections are too few" in check.notes()[-1]


def test_the_quality_when_pruned_is_the_best_of_the_family_within_each_budget() -> None:
    rows = ((0.4, 0.3), (0.1,))
    pruned = {(2, 1): 0.9, (2, 0): 0.95, (0, 0): 0.2, (0, 1): 0.6}
    # Cosine keeps layer 1 (2,1 to 2,0, 1,0, 0,0), loss layer 2 (2,1 to 0,1, 0,0).
    check = check_of(
        cosine=rows,
        loss=((0.01, 0.02), (0.5,)),
        accuracy_lost=rows,
        pruned={**pruned, (1, 0): 0.3},
    )
    # Within 0, 1, 2 and 3 corrections.
    assert check.pruned_quality("cosine") == pytest.approx((0.2 + 0.3 + 0.95 + 0.95) / 4)
    assert check.pruned_quality("loss") == pytest.approx((0.2 + 0.6 + 0.6 + 0.9) / 4)
    # Of a loss the lowest is the best.
    text = check_of(cosine=rows, loss=((0.4, 0.3), (0.1,)), pruned={**pruned, (1, 0): 0.1})
    assert text.pruned_quality("loss") == pytest.approx((0.2 + 0.1 + 0.1 + 0.1) / 4)


def test_the_scatter_has_a_panel_for_each_metric_and_names_every_correction() -> None:
    rows = ((0.3, 0.2), (), (0.02,))
    check = check_of(cosine=rows, loss=((1.0, 0.5), (), (-0.1,)), accuracy_lost=rows)
    figure = draw_influence_check(check)
    assert [panel.get_xlabel() for panel in figure.axes] == [
        "Influence (cosine)",
        "Influence (loss)",
    ]
    assert figure.axes[0].get_ylabel() == "Accuracy lost (points)"
    assert {text.get_text() for text in figure.axes[0].texts} == {"1,1", "1,2", "3,1"}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["layer 1", "layer 3"]
    first, third = (
        line
        for line in figure.axes[0].lines
        if len(line.get_xdata()) and "layer" in str(line.get_label())
    )
    assert (list(first.get_xdata()), first.get_marker()) != (list(third.get_xdata()), "o")
    with pytest.raises(ValueError, match="at least one correction"):
        draw_influence_check(check_of(((),), ((),)))


def test_the_cost_is_the_rise_of_the_loss_where_there_is_no_accuracy() -> None:
    check = check_of(cosine=((0.3, 0.2),), loss=((0.1, 0.2),))
    assert (check.cost_name, check.costs) == ("rise of the loss (nats)", [0.1, 0.2])
    assert "the cost is the metric `loss` itself" in check.notes()[2]
    assert check.to_dict()["rank_correlation"]["cosine"] == pytest.approx([-1.0, -1.0])
    undefined = check_of(cosine=((0.3,),), loss=((0.1,),))
    assert undefined.to_dict()["rank_correlation"]["cosine"] == [None, None]
