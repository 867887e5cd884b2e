"""Every public name is documented and typed, and both packages tell type checkers so."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import iiet
import iiet.extensions
import iiet.influence_metrics
import iiet.methods
import orchestrator
import orchestrator.data.text
import orchestrator.evaluation.tasks
import orchestrator.records.tracked_run
import orchestrator.tracking.loggers

PACKAGES = (iiet, orchestrator)
CONTRACTS = (
    iiet.methods.Layer,
    iiet.influence_metrics.InfluenceMetric,
    iiet.influence_metrics.Comparison,
    iiet.influence_metrics.MeasuredBatch,
    orchestrator.data.text.TextSource,
    orchestrator.evaluation.tasks.EvaluationTask,
    orchestrator.evaluation.tasks.TaskGroup,
    orchestrator.tracking.loggers.RunLogger,
    orchestrator.records.tracked_run.TrackedRun,
)
"""What packages subclass or get, besides the exported names."""

PUBLIC = {
    f"{package.__name__}.{name}": getattr(package, name)
    for package in PACKAGES
    for name in package.__all__
} | {f"{kind.__module__}.{kind.__qualname__}": kind for kind in CONTRACTS}


def own_members(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties that a class defines itself."""
    for name, member in vars(kind).items():
        if not name.startswith("_"):
            if isinstance(member, classmethod | staticmethod):
                yield name, member.__func__
            elif isinstance(member, property):
                yield name, member.fget
            elif inspect.isfunction(member):
                yield name, member


def functions() -> Iterator[tuple[str, Any]]:
    """Yield all public functions, methods and properties of this project with their names."""
    for name, found in PUBLIC.items():
        if inspect.isclass(found):
            yield from ((f"{name}.{member}", function) for member, function in own_members(found))
        elif inspect.isfunction(found):
            yield name, found


FUNCTIONS = dict(functions())


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_a_docstring(name: str) -> None:
    found = PUBLIC[name]
    if inspect.isclass(found) or inspect.isfunction(found):
        assert is_sentence(vars(found).get("__doc__") if inspect.isclass(found) else found.__doc__)
    else:
        assert is_sentence(docstring_of_constant(found, name.rpartition(".")[2]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_is_documented_and_typed(name: str) -> None:
    function = FUNCTIONS[name]
    overridden = inherits_docstring(name)
    assert is_sentence(function.__doc__) or overridden
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in list(signature.parameters.values()):
        assert parameter.name in ("self", "cls") or parameter.annotation is not parameter.empty
    if raises_of_its_own(function) and not overridden:
        assert "Raises:" in function.__doc__


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_marked_as_typed(package: ModuleType) -> None:
    assert (Path(str(package.__file__)).parent / "py.typed").read_text() == ""
    assert sorted(package.__all__) == sorted(set(package.__all__))


def is_sentence(text: str | None) -> bool:
    return bool(text) and "." in str(text)


def inherits_docstring(name: str) -> bool:
    """Whether a method overrides a documented one of its base."""
    owner, _, method = name.rpartition(".")
    kind = PUBLIC.get(owner)
    return inspect.isclass(kind) and any(
        getattr(vars(base).get(method), "__doc__", None) for base in kind.__mro__[1:]
    )


def raises_of_its_own(function: Any) -> bool:
    """Whether the body itself raises an error for the caller's mistake."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return any(
        isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
        and node.exc.func.id in ("ValueError", "UserError")
        for node in ast.walk(tree)
    )


def docstring_of_constant(value: Any, name: str) -> str | None:
    """Return the text below the assignment of a constant, wherever it is."""
    for module_name, module in sorted(sys.modules.items()):
        if module_name.startswith("iiet") and vars(module).get(name) is value:
            body = ast.parse(inspect.getsource(module)).body
            for node, after in zip(body, [*body[1:], None], strict=True):
                targets = (
                    node.targets
                    if isinstance(node, ast.Assign)
                    else [node.target]
                    if isinstance(node, ast.AnnAssign)
                    else []
                )
                if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                    is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                    return str(after.value.value) if is_text else None
    return None
