"""The documentation site: the reference is complete, the figures are true, the build is strict."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import concept_figures
import generated_pages
import pytest
import typer
from conf import mark_formulas
from documented import ROOT

import iiet
import orchestrator
from orchestrator import cli
from orchestrator.settings import Section, Settings

RESULTS = ROOT / "docs" / "results.md"


def option_names(group: Any, before: str = "") -> Iterator[tuple[str, str]]:
    """Yield the words of each command, with each of its options."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from option_names(command, f"{before}{name} ")
        for option in command.params:
            if not getattr(option, "hidden", False) and option.name != "help":
                yield from ((before + name, opt) for opt in option.opts if opt[0] == "-")


def setting_names(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting with its default."""
    for name, value in section:
        if isinstance(value, Section):
            yield from setting_names(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_the_reference_has_every_command_and_option() -> None:
    group: Any = typer.main.get_command(cli.build_app())
    page = generated_pages.command_line_page()
    sections = dict(re.findall(r"^### iiet-orch (.*?)\n(.*?)(?=^##|\Z)", page, re.S | re.M))
    assert len(sections) >= 26
    found = set(option_names(group))
    assert len(found) > 200
    for command, option in found:
        assert f"`{option}`" in sections[command], (command, option)


def test_the_reference_has_every_setting_with_its_default() -> None:
    rows = dict(
        re.findall(r"^\| `([a-z0-9_.]+)` \|(.*)\|$", generated_pages.settings_page(), re.MULTILINE)
    )
    for name, value in setting_names(Settings()):
        # A section that is unset by default is described by its own settings.
        assert name in rows or any(row.startswith(f"{name}.") for row in rows), name
        if isinstance(value, int | float | str) and value != "":
            shown = str(value).lower() if isinstance(value, bool) else str(value)
            assert f"`{shown}`" in rows[name] or f"`{value:g}`" in rows[name], name
    for name, row in rows.items():
        meaning, _, allowed = row.partition("<br>")
        assert meaning.strip(), name
        assert allowed.strip(" *"), name


def test_formulas_of_docstrings_are_literal_text_and_arguments_are_not() -> None:
    text = "Predict.\n\n    e = F(h)\n\n    s = e\n\nCost.\n\nArgs:\n    x: a number."
    marked = mark_formulas(text.split("\n"))
    assert [line for line in marked if line] == [
        *("Predict.", "::", "    e = F(h)", "    s = e", "Cost.", "Args:", "    x: a number."),
    ]


def test_the_family_that_is_drawn_is_that_of_the_demos_table() -> None:
    rows = re.findall(r"^ (\d,\d) +>?([\d.]+) ", (ROOT / "README.md").read_text(), re.MULTILINE)
    family = iiet.schedule_family(concept_figures.INFLUENCE)
    thresholds = {str(member.schedule): member.threshold_up_to for member in family}
    assert {name for name, _ in rows} == set(thresholds)
    assert {name: float(t) for name, t in rows if name != "0,0"} == {
        name: t for name, t in thresholds.items() if name != "0,0"
    }


def test_the_front_that_is_drawn_is_that_of_the_results() -> None:
    (table,) = re.findall(
        r"^Sweep threshold-684c1da8$(.*?)```", RESULTS.read_text("utf-8"), re.S | re.M
    )
    rows = re.findall(r"^ (\d,\d) .* ([\d.]+) ± .*?(?:● (\w+))?$", table, re.MULTILINE)
    drawn = {name: f"{100 * value:.1f}" for name, (value, _) in concept_figures.ACCURACY.items()}
    assert {name: accuracy for name, accuracy, _ in rows} == drawn
    picks = concept_figures.depth_front().picks
    assert {place: name for name, _, place in rows if place} == {
        place: point["label"] for place, point in picks.items()
    }


@pytest.mark.slow
def test_the_figures_are_drawn_and_shown(tmp_path: Path) -> None:
    drawn = {path.name for path in concept_figures.write_figures(tmp_path)}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    page = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    assert drawn == set(re.findall(r"images/concepts/(\w+\.png)", page))
    assert drawn == {path.name for path in concept_figures.FOLDER.iterdir()}


class _Targets(HTMLParser):
    """Collects the links, images and anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if name := values.get("id"):
            self.anchors.add(name)
        if target := values.get({"a": "href", "img": "src", "link": "href"}.get(tag, "")):
            self.links.add(target)


def parsed(page: Path) -> _Targets:
    """Return the targets of a page."""
    found = _Targets()
    found.feed(page.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("sphinx") is None, reason="needs the extra docs: pip install '.[docs]'"
)
def test_the_site_is_built_without_a_warning_and_every_link_leads_somewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    built = subprocess.run(
        [*command, "-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "site")],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = {path: parsed(path) for path in (tmp_path / "site").rglob("*.html")}
    assert len(pages) >= 22
    for page, found in pages.items():
        for link in found.links:
            address, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", address):
                continue
            target = (page.parent / address.partition("?")[0]).resolve() if address else page
            assert target.is_file(), f"{page.name}: {link}"
            assert not anchor or target not in pages or anchor in pages[target].anchors, link
    anchors = pages[tmp_path / "site" / "reference" / "api.html"].anchors
    for module in (orchestrator, iiet):
        names = {f"{module.__name__}.{name}" for name in module.__all__}
        assert not names - anchors
