"""The Python API: its names are lazy; `tests/behaviour/test_page_python.py` runs its functions."""

from __future__ import annotations

import ast
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

import orchestrator


def test_every_name_exists_and_editors_see_the_same_names():
    assert set(orchestrator.__all__) <= set(dir(orchestrator))
    with pytest.raises(AttributeError, match="no attribute 'swep'"):
        _ = orchestrator.swep
    tree = ast.parse(Path(str(orchestrator.__file__)).read_text(encoding="utf-8"))
    typed = {
        (node.module, alias.name)
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {name for _, name in typed} == set(orchestrator.__all__)
    for module, name in typed:
        assert getattr(import_module(str(module)), name) is getattr(orchestrator, name)


@pytest.mark.parametrize(
    ("call", "plan"),
    [
        ("pretrain", "pipelines.training.plan_pretrain"),
        ("distill", "pipelines.training.plan_distill"),
        ("sweep", "sweeping.stages.plan_sweep"),
        ("evaluate", "pipelines.evaluating.plan_evaluate"),
        ("benchmark", "pipelines.benchmarking.plan_benchmark"),
        ("pick", "pipelines.models.plan_pick"),
        ("measure_influence", "pipelines.influence.plan_influence"),
    ],
)
def test_a_call_takes_what_its_plan_takes(call, plan):
    module, name = plan.rsplit(".", 1)
    planned = signature(getattr(import_module(f"orchestrator.{module}"), name)).parameters
    taken = signature(getattr(orchestrator, call)).parameters
    # What a dry run assumes, and what a sweep knows of its students.
    plans_alone = {"mfu", "leaves_out_layers"}
    if call == "distill":
        plans_alone = {"schedules"}  # It gives one student of one schedule.
    assert {**planned}.keys() - {**taken}.keys() == plans_alone & {**planned}.keys()
    for parameter in taken.keys() & planned.keys():
        assert taken[parameter] == planned[parameter], parameter
