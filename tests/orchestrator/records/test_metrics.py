"""The table of metrics is whole: options, costs of a shape, and metrics of single tasks."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest

from iiet.cost import InferenceCost
from orchestrator.records.metrics import (
    ACCURACY,
    BITS_PER_BYTE,
    COSTS,
    METRICS,
    OVERHEADS,
    PERPLEXITY,
    QUALITIES,
    VALIDATION_LOSS,
    CostName,
    QualityName,
    metric_of,
)


def test_the_values_of_options_are_those_of_the_table():
    assert set(COSTS) == set(get_args(CostName))
    assert set(QUALITIES) == set(get_args(QualityName))
    names = {name for pair in OVERHEADS.items() for name in (pair[0], *pair[1])}
    assert names <= METRICS.keys()


def test_what_follows_from_a_shape_is_a_number_of_the_cost_model():
    counted = {metric.counted_as for metric in METRICS.values() if metric.counted_as}
    assert counted <= {field.name for field in fields(InferenceCost)}


@pytest.mark.parametrize("name", QUALITIES.values())
def test_a_metric_in_the_table_is_as_the_same_metric_of_a_task(name):
    metric = METRICS[name]
    of_task = metric_of(name.replace("quality/", "quality/lastword/"))
    assert of_task.title == name.replace("quality/", "lastword/")
    assert of_task.is_percent == metric.is_percent == (name == ACCURACY)
    is_loss = name in (BITS_PER_BYTE, PERPLEXITY, VALIDATION_LOSS)
    assert of_task.higher_is_better == metric.higher_is_better == (not is_loss)
