"""Public functions, classes and methods are documented and typed, and names are lazy;
and `tests/pages/test_page_python.py` runs its functions."""

from __future__ import annotations

import ast
import inspect
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import iiet
import iiet.iiad.influence
import iiet.methods
import orchestrator
import orchestrator.models.loops

PACKAGES = (iiet, orchestrator)
CONTRACTS = (
    iiet.methods.Layer,
    iiet.iiad.influence.InfluenceMetric,
    iiet.iiad.influence.Comparison,
    iiet.iiad.influence.MeasuredBatch,
    orchestrator.models.loops.LoopedModel,
)
"""What packages subclass or get, besides the exported names."""
EXPORTED = (getattr(package, name) for package in PACKAGES for name in package.__all__)
PUBLIC = [
    value
    for value in (*EXPORTED, *CONTRACTS)
    if inspect.isclass(value) or inspect.isfunction(value)
]


def own_members(kind: type) -> dict[str, Any]:
    """Return the public methods and properties that a class defines itself."""
    functions = {
        name: getattr(member, "__func__", getattr(member, "fget", member))
        for name, member in vars(kind).items()
        if not name.startswith("_")
    }
    return {name: function for name, function in functions.items() if inspect.isfunction(function)}


def is_sentence(text: str | None) -> bool:
    return bool(text) and "." in str(text)


def problems_of(function: Any, *, is_overridden: bool) -> list[str]:
    """Return what a reader or a type checker lacks of a function."""
    signature = inspect.signature(function)
    problems = []
    if not (is_sentence(function.__doc__) or is_overridden):
        problems.append("has no docstring")
    if signature.return_annotation is signature.empty:
        problems.append("does not say what it returns")
    for name, parameter in signature.parameters.items():
        if name not in ("self", "cls") and parameter.annotation is parameter.empty:
            problems.append(f"has no type of {name}")
    raised = [
        ast.unparse(node.exc.func)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function))))
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    ]
    is_named = is_overridden or "Raises:" in (function.__doc__ or "")
    if {"ValueError", "UserError"} & set(raised) and not is_named:
        problems.append("does not say what it raises")
    return problems


def test_public_functions_and_classes_are_documented_and_typed():
    problems = []
    for public_object in PUBLIC:
        members = own_members(public_object) if inspect.isclass(public_object) else {}
        if inspect.isclass(public_object):
            if not is_sentence(vars(public_object).get("__doc__")):
                problems.append((public_object, "has no docstring"))
        else:
            problems += [
                (public_object, text) for text in problems_of(public_object, is_overridden=False)
            ]
        for name, member in members.items():
            above = (vars(base).get(name) for base in public_object.__mro__[1:])
            is_overridden = any(getattr(method, "__doc__", None) for method in above)
            problems += [
                (member, text) for text in problems_of(member, is_overridden=is_overridden)
            ]
    assert len(PUBLIC) > 40
    assert not problems


def test_packages_are_marked_as_typed_and_export_each_name_once():
    for package in PACKAGES:
        assert (Path(str(package.__file__)).parent / "py.typed").read_text() == ""
        assert len(package.__all__) == len(set(package.__all__))


def test_dir_lists_the_interface_alone():
    assert dir(iiet) == sorted(["__version__", *iiet.__all__])
    assert dir(orchestrator) == sorted(orchestrator.__all__)


def test_every_name_exists_and_editors_see_the_same_names():
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
    plan_function = getattr(import_module(f"orchestrator.{module}"), name)
    planned = inspect.signature(plan_function).parameters
    taken = inspect.signature(getattr(orchestrator, call)).parameters
    # What a dry run assumes, and what a sweep knows of its students.
    plans_alone = {"mfu", "leaves_out_layers"}
    if call == "distill":
        plans_alone = {"schedules"}  # It gives one student of one schedule.
    assert {**planned}.keys() - {**taken}.keys() == plans_alone & {**planned}.keys()
    for parameter in taken.keys() & planned.keys():
        assert taken[parameter] == planned[parameter], parameter
