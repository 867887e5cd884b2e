"""Every command in the README and in docs/ is one that the program accepts.

Commands of `iiet-orch` are parsed by its own parser, with the settings that `--set` names. Those
within sentences have placeholders, so only their names and options are checked. Programs of this
repository are looked up with their options. What other programs do is not checked; they are listed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tomllib
from pathlib import Path
from typing import Any

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
SHELL = shell_lines()
OWN = [
    line
    for line in SHELL
    # Those of troubleshooting.md are wrong by intent; test_troubleshooting.py runs them. Those of
    # extending.md need the package of that page; test_extending_doc.py runs them with it.
    if line.words[0] == "iiet-orch" and line.page not in ("troubleshooting.md", "extending.md")
]


def parsed(words: tuple[str, ...]) -> dict[str, Any]:
    """Parse the words after `iiet-orch` as the program does, and return the options by name.

    Raises:
        SystemExit, click's UsageError: If the program would refuse them.
    """
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


def test_there_are_many_shell_lines() -> None:
    assert len(OWN) >= 60
    assert len({line.page for line in OWN}) >= 12


def test_a_wrong_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.parametrize("line", [x for x in SHELL if x.words[0] != "iiet-orch"], ids=str)
def test_another_program_is_known(line: Line) -> None:
    program, *words = line.words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words) <= set(targets)
    elif program == "pip":
        check_extras(words)
    elif program == "python":
        check_own_program(words)
    else:
        assert program in OTHER_PROGRAMS


def check_extras(words: list[str]) -> None:
    """Check that the extras to install exist: `pip install 'iiet-orch[cluster]'`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[0] == "install"
    for extras in re.findall(r"\[(.*)\]", " ".join(words)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def check_own_program(words: list[str]) -> None:
    """Check that a script or module exists, and that its sources name the options."""
    if words[0] == "-m":
        path = ROOT.joinpath(*words[1].split("."))
        sources = [*path.glob("*.py")] if path.is_dir() else [path.with_suffix(".py")]
    else:
        sources = [ROOT / words[0], *(ROOT / words[0]).parent.glob("*.py")]
    assert sources[0].is_file()
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    before_others = words[: words.index("--")] if "--" in words else words
    for option in (word for word in before_others if word.startswith("--")):
        assert f'"{option}"' in text, option


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_valid_and_its_imports_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module in ("iiet", "orchestrator"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), alias.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_in_yaml_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        tree = yaml.safe_load(block)
        if set(tree) <= set(Settings.model_fields):
            resolve_settings(tree)


def words(page: Path) -> str:
    """Return the text of a page in one line."""
    return " ".join(page.read_text(encoding="utf-8").split())


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


@pytest.mark.parametrize(
    ("page", "sentence", "content"),
    [
        (
            "docs/results.md",
            r"On Python's documentation .*? see the front in the \[.*?\]\((.*?)\)",
            r"The front of .* on Python's documentation",
        ),
        ("CONTRIBUTING.md", r"A method of your own .*?\]\((.*?)\)", r" ## A method "),
    ],
)
def test_a_page_that_is_named_for_something_has_it(page: str, sentence: str, content: str) -> None:
    (target,) = re.findall(sentence, words(ROOT / page))
    assert re.search(content, words((ROOT / page).parent / target))


FUNCTIONS = {
    "influence": "measure_influence", "import": "import_model", "search": "sweep",
    "sweep-threshold": "sweep", "sweep-iterations": "sweep",
}  # fmt: skip
"""The functions of commands that have another name."""


def test_the_commands_that_are_python_functions_are_those_that_the_pages_name() -> None:
    public = {name for name in GROUP.commands if hasattr(orchestrator, FUNCTIONS.get(name, name))}
    readme, page = words(ROOT / "README.md"), words(ROOT / "docs/python.md")
    (others,) = re.findall(r"Every command is also a function, but for (.*?)\.", page)
    assert set(re.findall(r"`(.+?)`", others)) == GROUP.commands.keys() - public
    (alike,) = re.findall(r"([^.]*) have the same form", page)
    for name in re.findall(r"`(\w+)`", alike):
        assert "workspace" in inspect.signature(getattr(orchestrator, name)).parameters
    rows = dict(re.findall(r"\| ([a-z ]+) \| ((?:`iiet-orch [a-z-]+`(?:, )?)+) \|", readme))
    (kinds,) = re.findall(r"Those that (.*?) are Python functions", readme)
    for kind in re.split(", | or ", kinds):
        assert set(re.findall(r"iiet-orch ([a-z-]+)", rows[kind])) <= public
