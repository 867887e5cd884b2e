"""Sphinx's configuration of the documentation site: `make docs`.

Sphinx, because it is maintained: MkDocs 1 has had no release since August 2024, its successor has
no plugins, and the Material theme is no longer developed. The pages are Markdown and stay readable
where no site is built; `index.md` repeats the README. Two pages of the reference include what is
written from the code before Sphinx reads (`generated_pages.py`), the third is made of docstrings.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS), str(DOCS.parent)]

from generated_pages import write_pages  # noqa: E402

import iiet  # noqa: E402

project = "iiet-orch"
author = "the iiet-orch authors"
copyright = f"2026, {author}"
version = release = iiet.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

# Option names begin with two hyphens, which must not become a dash.
smartquotes = False
# GitHub's names of headings, so that a link to a heading works in both places.
myst_heading_anchors = 3
# Blocks without a language are what a terminal shows.
highlight_language = "none"

# Docstrings have Markdown's single backticks.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Keys", "params_style")]  # Of what `--json` prints.

html_theme = "furo"
html_title = f"iiet-orch {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]


def _link_to_the_first_page(_app: Any, _name: str, source: list[str]) -> None:
    source[0] = source[0].replace("](../README.md)", "](index.md)")


def mark_formulas(lines: list[str]) -> list[str]:
    """Mark the indented blocks of a docstring as literal text, as Markdown reads them.

    Args:
        lines: A docstring without its common indentation.
    """
    marked: list[str] = []
    is_formula = False
    for number, line in enumerate(lines):
        before = lines[number - 1].strip() if number else ""
        is_indented = line.startswith("    ")
        if is_indented and not before and number and not is_formula:
            marked += ["::", ""]
        is_formula = (is_indented and (is_formula or not before)) or (
            is_formula and not line.strip()
        )
        marked.append(line)
    return marked


def _mark_formulas(
    _app: Any, what: str, _name: str, _object: Any, _options: Any, lines: list[str]
) -> None:
    # In an attribute's first line, napoleon takes all before a colon for its type. An empty comment
    # is a first line without one.
    first = ["..", ""] if what in ("attribute", "data", "property") else []
    lines[:] = first + mark_formulas(lines)


def setup(app: Any) -> None:
    """Connect what happens before a page or a docstring is read."""
    app.connect("builder-inited", lambda _: write_pages(DOCS.parent / "build" / "reference"))
    app.connect("source-read", _link_to_the_first_page)
    # Before napoleon, which indents the texts of arguments.
    app.connect("autodoc-process-docstring", _mark_formulas, priority=400)
