"""Makes `iiet/hf/modeling_*.py`, the models of transformers that exports ship: `make modeling`.

Each of them must be one file without imports of this package, and most of it is the same in all.
So each is made from a template here: `iiet.py.jinja` is the whole file of IIET, and the others say
which of its blocks are different.
"""

from __future__ import annotations

import ast
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

FAMILIES = ("explicit", "iiet", "looped", "pcformer")
TEMPLATES = Path(__file__).resolve().parent
MODELS = TEMPLATES.parent / "iiet" / "hf"

LINE_LENGTH = 100


def modeling_text(family: str) -> str:
    """Return the text of `iiet/hf/modeling_FAMILY.py`."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    name = f"{family}.py.jinja"
    code = without_unused_imports(environment.get_template(name).render())
    return f"# Made by `make modeling` of iiet-orch from modeling/{name}; change that file.\n{code}"


def without_unused_imports(code: str) -> str:
    """Leave out the imported names that the code does not use; the template imports them for all.

    Each statement is written as ruff formats it.
    """
    tree = ast.parse(code)
    used_names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    lines = code.splitlines(keepends=True)
    for node in reversed(tree.body):  # So that the numbers of earlier lines stay.
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        used = [alias for alias in node.names if (alias.asname or alias.name) in used_names]
        lines[node.lineno - 1 : node.end_lineno] = [_import_statement(node, used)] if used else []
    return "".join(lines)


def _import_statement(node: ast.Import | ast.ImportFrom, aliases: list[ast.alias]) -> str:
    names = [ast.unparse(alias) for alias in aliases]
    start = f"from {node.module} import " if isinstance(node, ast.ImportFrom) else "import "
    in_one_line = f"{start}{', '.join(names)}\n"
    if len(in_one_line) <= LINE_LENGTH + 1:
        return in_one_line
    return f"{start}(\n" + "".join(f"    {name},\n" for name in names) + ")\n"


if __name__ == "__main__":
    for family in FAMILIES:
        (MODELS / f"modeling_{family}.py").write_text(modeling_text(family), encoding="utf-8")
