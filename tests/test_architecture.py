"""Checks the design: which module may import which, read from the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest

from orchestrator.workspace.layout import open_workspace

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("iiet", "orchestrator", "benchmarks")

MODELING = tuple(f"iiet.hf.modeling_{name}" for name in ("explicit", "iiet", "looped", "pcformer"))
"""The code of exported folders, a module for each family of methods."""
ADAPTERS = {
    "ray": ("orchestrator.cluster",),
    "mlflow": ("orchestrator.tracking", "orchestrator.pipelines.ui"),
    "lm_eval": ("orchestrator.evaluation",),
    "typer": ("orchestrator.cli",),
    "datasets": ("orchestrator.data", "orchestrator.evaluation.heldout"),
    "vl_convert": ("orchestrator.reporting.charts", "orchestrator.reporting.sections"),
    "jinja2": ("orchestrator.reporting.sections",),
    "optuna": ("orchestrator.sweeping.search",),
    "gguf": ("orchestrator.models.gguf",),
    "huggingface_hub": (
        "orchestrator.data",
        "orchestrator.models",
        "orchestrator.reporting.model_card",
        *MODELING,
    ),
}
"""Library -> the only packages or modules that import it."""

OPTIONAL = ("cluster", "gguf", "gpu")
"""Extras whose libraries are imported at first use."""

ORDER = (
    "workspace",
    "terminal",
    "settings",
    "records",
    "models",
    "data",
    "tracking",
    "training",
    "evaluation",
    "planning",
    "cluster",
    "reporting",
    "pipelines",
    "sweeping",
    "cli",
)
"""Packages of `orchestrator/`: each imports from itself and from those before it."""


FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in FILES
}


@cache
def trees() -> dict[str, ast.Module]:
    """Return name of a module -> its syntax; read by the first test that asks."""
    return {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes but expressions, also those within functions; expressions hold no import."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.expr):
            yield node
            yield from _statements(node)


def _imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Return the modules that statements import, and what they import from them."""
    modules: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # A package stands for its `__init__.py`, unless only its modules are imported.
            modules |= names if names <= set(MODULES) else {node.module, *names}
    return modules


def _outside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements that importing a module executes."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.expr):
            yield node
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _outside_functions(node)


@cache
def imports() -> dict[str, set[str]]:
    """Return name of a module -> the modules that it imports."""
    return {name: _imported(_statements(tree)) for name, tree in trees().items()}


@cache
def libraries() -> dict[str, set[str]]:
    """Return name of a module -> the packages that it imports."""
    return {name: {i.split(".")[0] for i in imported} for name, imported in imports().items()}


@pytest.mark.slow
def test_the_core_imports_torch_and_the_standard_library_only():
    allowed = {*sys.stdlib_module_names, "torch", "iiet"}
    extra = {
        **{module: {"transformers", "huggingface_hub"} for module in MODELING},
        "iiet.exporting": {"transformers"},  # Within functions.
        "iiet.hf.weights": {"safetensors"},  # Within the functions that read and write files.
    }
    for name in (name for name in MODULES if name.startswith("iiet")):
        foreign = libraries()[name] - allowed - extra.get(name, set())
        assert not foreign, f"{name} imports {foreign}"


@pytest.mark.parametrize("library", ADAPTERS)
def test_each_outside_library_has_one_adapter(library):
    users = {name for name in MODULES if library in libraries()[name]}
    assert users, f"nothing imports {library}: is it still needed?"
    places = ADAPTERS[library]
    strangers = {n for n in users if not any(f"{n}.".startswith(f"{d}.") for d in places)}
    assert not strangers, f"{library} is imported by {strangers}, not only {places}"


def _distributions(requirements: list[str]) -> set[str]:
    return {_normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}


def _normal(distribution: str) -> str:
    """Spell a distribution as package indexes do."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_imported_library_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = _distributions(project["dependencies"])
    extras = project["optional-dependencies"]
    optional = {name for extra in OPTIONAL for name in _distributions(extras[extra])}
    suppliers = metadata.packages_distributions()
    for name, tree in trees().items():
        at_start = {i.split(".")[0] for i in _imported(_outside_functions(tree))}
        for library in libraries()[name] - {*sys.stdlib_module_names, *PACKAGES}:
            distributions = {_normal(supplier) for supplier in suppliers.get(library, [library])}
            place = (
                f"{name} imports {library}; declare {' or '.join(distributions)} in pyproject.toml"
            )
            assert distributions & (required | optional), place
            is_required = distributions & required or library not in at_start
            assert is_required, f"{place} as required, or import it within a function"


def test_files_are_loaded_without_running_their_code():
    """The package `cluster` unpickles what Ray has pickled in the same run, and nothing else."""
    for name, tree in trees().items():
        if not re.search(r"pickle|torch\.load", MODULES[name].read_text(encoding="utf-8")):
            continue
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call):
                continue
            function = ast.unparse(call.func)
            place = f"{name}, line {call.lineno}"
            options = {option.arg: ast.unparse(option.value) for option in call.keywords}
            if re.fullmatch(r"(cloud)?pickle\.(loads?|Unpickler)", function):
                assert name.startswith("orchestrator.cluster."), place
            if function == "torch.load":
                assert options["weights_only"] == "True", place
            assert options.get("allow_pickle") != "True", place


def test_packages_import_only_from_those_before_them():
    packages = {path.parent.name for path in (ROOT / "orchestrator").glob("*/__init__.py")}
    assert packages == set(ORDER)
    assert {path.name for path in (ROOT / "orchestrator").glob("*.*")} == {
        "__init__.py",
        "py.typed",
    }
    for name in (name for name in MODULES if "." in name):
        for imported in imports()[name] & set(MODULES) - set(PACKAGES):
            place = f"{name} imports {imported}, which comes after it"
            if name.startswith("iiet"):
                assert imported.startswith("iiet"), place
            elif name.startswith("orchestrator"):
                assert not imported.startswith("benchmarks"), place
                if imported.startswith("orchestrator"):
                    own_rank = ORDER.index(name.split(".")[1])
                    imported_rank = ORDER.index(imported.split(".")[1])
                    assert imported_rank <= own_rank, place


def test_no_module_or_package_imports_itself_through_others():
    """Imports of types count, too: a reader has to read them first."""

    def package_of(module: str) -> str:
        return ".".join(module.split(".")[:2])

    modules = {name: imported & set(MODULES) for name, imported in imports().items()}
    packages: dict[str, set[str]] = {}
    for name, imported in modules.items():
        package = package_of(name)
        imported_packages = {package_of(module) for module in imported}
        packages.setdefault(package, set()).update(imported_packages - {package})
    for graph in (modules, packages):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            pytest.fail(f"imports go in a circle: {' -> '.join(error.args[1])}")


def test_modules_have_a_docstring_and_none_is_hidden_by_a_name_of_its_package():
    for name, tree in trees().items():
        assert not tree.body or ast.get_docstring(tree), f"{name} has no docstring"
        if MODULES[name].name == "__init__.py":
            exported = {
                alias.asname or alias.name
                for node in tree.body
                if isinstance(node, ast.ImportFrom) and node.module != name
                for alias in node.names
            }
            hidden = {f"{name}.{alias}" for alias in exported} & set(MODULES)
            assert not hidden, f"{name} exports a function or class of the name of {hidden}"


IMPORT = re.compile(
    rf"\bfrom ((?:{'|'.join(PACKAGES)})(?:\.\w+)*) import (?:\(([^)]*)\)|(\w[\w ,]*))"
)
"""The import of names from a module of the project: the module, then its names, which stand in
brackets or in one line."""


@cache
def _names_in(module: str) -> set[str]:
    """Return what may be imported from a module: its names and its modules.

    A package that imports at first use, by `__getattr__`, shows its names to type checkers alone.
    """
    names = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == module}
    statements: list[ast.AST] = [*trees()[module].body]
    for_type_checkers: set[str] = set()
    while statements:
        node = statements.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {
                part.id for t in targets for part in ast.walk(t) if isinstance(part, ast.Name)
            }
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            imported = [n for n in node.body if isinstance(n, ast.Import | ast.ImportFrom)]
            for_type_checkers |= {a.asname or a.name for n in imported for a in n.names}
        else:
            statements += [
                child
                for child in ast.iter_child_nodes(node)
                if isinstance(child, ast.stmt | ast.ExceptHandler)
            ]
    return names | for_type_checkers if "__getattr__" in names else names


def test_tests_and_programs_inside_them_import_names_that_exist():
    """No tool renames what stands in a string, and slow tests would notice last."""
    num_imports = 0
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for module, in_brackets, in_line in IMPORT.findall(path.read_text(encoding="utf-8")):
            assert module in MODULES, (path, module)
            names = set(re.findall(r"(?:^|,)\s*(\w+)", in_brackets or in_line))
            assert names <= _names_in(module), (path, module, names - _names_in(module))
            num_imports += 1
    assert num_imports > 1000


LIGHT_WORK = """
import sys

heavy = {"torch", "numpy", "pandas", "ray", "mlflow", "lm_eval", "transformers", "datasets"}

def check(*others):
    loaded = {*heavy, *others} & {*sys.modules}
    assert not loaded, loaded

import orchestrator
check("typer")
import iiet
from orchestrator.settings import read_settings
read_settings("toy", ["sweep.methods=[vanilla, pcformer]"])
check("typer")
from orchestrator.planning.machine import check_available
check_available(1, 0)
check("typer")
from orchestrator.cli import main
for words in ("--help", "pretrain --help", "list", "list running"):
    assert main([*words.split(), *["-w", sys.argv[1]] * words.startswith("list")]) == 0, words
    check()
import orchestrator.pipelines.generating
heavy -= {"torch", "numpy"}
check()
"""
"""Each step loads no more than it needs, from what every program imports to what generates."""


@pytest.mark.slow
def test_light_work_imports_nothing_heavy(tmp_path):
    workspace = open_workspace(tmp_path)
    program = [sys.executable, "-c", LIGHT_WORK, str(workspace.root)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
