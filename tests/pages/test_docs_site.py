"""The documentation site: the reference is complete, the figures are true, the build is strict."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from typing import Any

import concept_figures
import generated_pages
import pytest
import typer
from documented import FENCE, PAGES, ROOT

import iiet
import orchestrator
from orchestrator import cli
from orchestrator.settings import Section, Settings


def test_the_reference_has_every_command_option_and_setting():
    page = generated_pages.command_line_page()
    sections = dict(re.findall(r"^### iiet-orch (.*?)\n(.*?)(?=^##|\Z)", page, re.S | re.M))

    def check_options(group: Any, prefix: str = "") -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                check_options(command, f"{prefix}{name} ")
            for option in command.params:
                if not getattr(option, "hidden", False) and option.name != "help":
                    section = sections[prefix + name]
                    assert all(f"`{o}`" in section for o in option.opts if o[0] == "-"), option

    check_options(typer.main.get_command(cli.commands))
    pattern = r"^\| `([a-z0-9_.]+)` \|(.*)\|$"
    rows = dict(re.findall(pattern, generated_pages.settings_page(), re.MULTILINE))

    def check_settings(section: Section, prefix: str = "") -> None:
        for name, value in section:
            if isinstance(value, Section):
                check_settings(value, f"{prefix}{name}.")
                continue
            # A section that is unset by default is described by its own settings.
            key = prefix + name
            assert key in rows or any(row.startswith(f"{key}.") for row in rows), key
            if isinstance(value, int | float) and not isinstance(value, bool):
                assert f"`{value}`" in rows[key] or f"`{value:g}`" in rows[key], key

    check_settings(Settings())


def test_the_figures_are_of_the_demo_in_the_results():
    results = (ROOT / "research" / "results.md").read_text("utf-8")
    from_demo = results.partition("<!-- front: research/fronts/demo.json")[2]
    demo = from_demo.partition("<!-- end -->")[0]
    rows = re.findall(r"^\| (\d,\d) \| (\d+) \|", demo, re.MULTILINE)
    family = iiet.schedule_family(concept_figures.INFLUENCE)
    assert {str(m.schedule): str(m.schedule.num_evaluations) for m in family} == dict(rows)


def test_code_fits_the_column_of_the_site():
    blocks = [
        (page.name, block) for page in PAGES for *_, block in FENCE.findall(page.read_text("utf-8"))
    ]
    assert len(blocks) > 60
    wide = [(page, line) for page, block in blocks for line in block.splitlines() if len(line) > 90]
    assert not wide, "a screen of 1,280 pixels shows 90 characters"


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("sphinx") is None, reason="needs the extra docs: pip install '.[docs]'"
)
def test_the_site_is_built_without_a_warning_with_every_public_name(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    process = subprocess.run(
        [*command, "-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(site)],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    pages = {path: path.read_text("utf-8") for path in site.rglob("*.html")}
    for page, text in pages.items():
        for target in re.findall(r'(?:href|src)="([^"#?:]+)["#?]', text):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
    names = set(re.findall(r'id="([\w.]+)"', pages[site / "reference" / "api.html"]))
    for module in (orchestrator, iiet):
        assert not {f"{module.__name__}.{name}" for name in module.__all__} - names
