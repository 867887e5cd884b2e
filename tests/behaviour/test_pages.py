"""README and docs/ agree with the program: commands, options, settings, files and links exist.

Commands of `iiet-orch` are parsed by its own parser, with the settings that `--set` names; of
commands within sentences, which have placeholders, only names and options are checked. Programs of
this repository are looked up with their options; other programs are listed.
"""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import packages_figure
import pytest
import typer
import yaml
from documented import FENCE, PAGES, ROOT, Line, blocks, inline_commands, shell_lines

import orchestrator
from orchestrator import cli
from orchestrator.cli.submit import parse_command
from orchestrator.settings import Settings, read_settings, resolve_settings
from orchestrator.settings.files import shipped_sweeps

OTHER_PROGRAMS = {
    *("curl", "export", "git", "kubectl", "lm_eval", "mlflow", "optuna-dashboard", "ray", "sbatch"),
    *("scancel", "ssh", "tensorboard"),
}
GROUP: Any = typer.main.get_command(cli.build_app())
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
SHELL = shell_lines()
# Commands of troubleshooting.md are wrong by intent, those of extending.md need its package; both
# are run by a test of their own.
OWN = [
    line
    for line in SHELL
    if line.words[0] == "iiet-orch" and line.page not in ("troubleshooting.md", "extending.md")
]
OTHERS = [line for line in SHELL if line.words[0] != "iiet-orch"]
GLOSSARY = (
    *("correction", "schedule", "NFE", "influence", "threshold family", "teacher", "student"),
    *("elastic", "front", "knee", "draft"),
)


def parsed(words: tuple[str, ...]) -> dict[str, Any]:
    """Parse the words after `iiet-orch` as the program does, and return the options by name."""
    command, name, rest = GROUP, "iiet-orch", list(words)
    while hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    options: dict[str, Any] = command.make_context(name, rest).params
    return options


@pytest.mark.parametrize("line", OWN, ids=str)
def test_a_shell_line_is_accepted(line: Line) -> None:
    words = tuple(word for word in line.words[1:] if word != "&")
    options = parsed(words)
    if words[0] == "submit":
        options = parse_command(options["words"])
    sweep = options.get("config") or options.get("file")
    name = sweep if sweep in shipped_sweeps() else None
    assert read_settings(name, options.get("set_") or [])


def test_a_wrong_line_is_refused() -> None:
    for words in (("pretrain", "--step", "3"), ("sweep",), ("pick", "--cost", "euros")):
        with pytest.raises(Exception, match=r"step|config|FILE|euros"):
            parsed(words)
    with pytest.raises(KeyError):
        parsed(("pretend",))


@pytest.mark.parametrize("line", inline_commands(), ids=str)
def test_a_command_within_a_sentence_exists(line: Line) -> None:
    words = [word for word in line.words[1:] if word not in ("...", "…")]
    known, command = {"--version", "--help", "--install-completion"}, GROUP
    for word in words:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
            known |= {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
            if command.name == "submit":
                command = GROUP  # A command for the cluster follows.
    if words[0] != "COMMAND":
        assert words[0].startswith("--") or words[0] in GROUP.commands
    used = {word for word in words if re.match("--?[a-z]", word)}
    assert used <= known


@pytest.mark.parametrize("line", OTHERS, ids=str)
def test_another_program_is_known(line: Line) -> None:
    program, *words = line.words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "pip":
        assert words[0] == "install"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for extras in re.findall(r"\[(.*)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(project["optional-dependencies"])
    elif program == "python":
        path = ROOT.joinpath(*words[1].split(".")) if words[0] == "-m" else ROOT / words[0]
        if words[0] == "-m":
            sources = [*path.glob("*.py")] if path.is_dir() else [path.with_suffix(".py")]
        else:
            sources = [path, *path.parent.glob("*.py")]
        text = "".join(source.read_text(encoding="utf-8") for source in sources)
        before_others = words[: words.index("--")] if "--" in words else words
        for option in (word for word in before_others if word.startswith("--")):
            assert f'"{option}"' in text, option
    else:
        assert program in OTHER_PROGRAMS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_and_settings_of_a_page_are_valid_and_nothing_is_left_to_do(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module in ("iiet", "orchestrator"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
    for block in blocks(page, "yaml"):
        tree = yaml.safe_load(block)
        if set(tree) <= set(Settings.model_fields):
            resolve_settings(tree)
    assert not [word for word in ("TODO", "TBD", "@@") if word in TEXTS[page.name]]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    for target, anchor in links:
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), f"{target}#{anchor}"


def test_the_first_pages_name_every_command_page_word_and_sweep() -> None:
    for name in ("README.md", "commands.md"):
        assert set(re.findall(r"`iiet-orch ([a-z][a-z-]+)", TEXTS[name])) == set(GROUP.commands)
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", TEXTS["README.md"]))
    assert linked == set(TEXTS) - {"README.md", "index.md"}
    assert len(TEXTS["README.md"].splitlines()) <= 200
    for word in GLOSSARY:
        assert re.search(rf"^\| {word} \| [A-Z].*\.", TEXTS["README.md"], flags=re.MULTILINE), word
    listed = re.search(r"or a shipped one by name: ([a-z0-9, -]+) \|", TEXTS["commands.md"])
    assert listed
    assert set(listed[1].split(", ")) == set(shipped_sweeps())
    for path in shipped_sweeps().values():
        assert path.read_text(encoding="utf-8").startswith("# ")
        read_settings(path)
    assert read_settings(shipped_sweeps()["toy"]) == Settings(), "it spells out the defaults"


FUNCTIONS = {
    "influence": "measure_influence", "import": "import_model", "search": "sweep",
    "sweep-threshold": "sweep", "sweep-iterations": "sweep",
}  # fmt: skip
"""The functions of commands that have another name."""


def test_the_commands_that_are_python_functions_are_those_that_a_page_names() -> None:
    public = {name for name in GROUP.commands if hasattr(orchestrator, FUNCTIONS.get(name, name))}
    page = " ".join(TEXTS["python.md"].split())
    (others,) = re.findall(r"Every command is also a function, but for (.*?)\.", page)
    assert set(re.findall(r"`(.+?)`", others)) == GROUP.commands.keys() - public


def test_the_architecture_names_what_exists() -> None:
    text = TEXTS["architecture.md"]
    for path in re.findall(r"`([\w/]+\.py)`", text):
        is_whole = path.startswith(("iiet/", "tests/", "examples/", "research/", "docs/"))
        assert (ROOT / path if is_whole else ROOT / "orchestrator" / path).is_file(), path
    for folder in re.findall(r"^- `([a-z/_]+)/`: ", text, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
    named = re.findall(r"^\| `(\w+)/` \|", text, flags=re.MULTILINE)
    assert set(named) == {p.parent.name for p in (ROOT / "orchestrator").glob("*/__init__.py")}
    assert {*packages_figure.PLACES, *packages_figure.USED_BY_ALL} == {*named, "iiet"}
    ends = {end for giver, receiver, _ in packages_figure.FLOWS for end in (giver, receiver)}
    assert ends == set(packages_figure.PLACES)


def test_the_drawn_packages_are_shown(tmp_path: Path) -> None:
    (drawn,) = packages_figure.write_figure(tmp_path / "packages")
    image = re.findall(r"!\[.*?\]\((images/packages.png)\)", TEXTS["architecture.md"])[0]
    width_and_height = slice(16, 24)  # Of a PNG file.
    shown = ROOT / "docs" / image
    assert drawn.read_bytes()[width_and_height] == shown.read_bytes()[width_and_height]
