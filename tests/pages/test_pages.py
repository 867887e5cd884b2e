"""README and docs/ agree with the program: commands, settings, files, links and figures exist.

Commands of `iiet-orch` are parsed by its own parser, with the settings that `--set` names;
test_page_commands.py runs them. Of commands within sentences, which have placeholders, only names
and options are checked.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packages_figure
import pytest
import typer
import yaml
from documented import FENCE, PAGES, ROOT, blocks, inline_commands, shell_lines

from orchestrator import cli
from orchestrator.settings import Settings, read_settings, resolve_settings
from orchestrator.settings.files import shipped_sweeps

GROUP: Any = typer.main.get_command(cli.commands)
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
UNUSUAL = ("extending.md",)
"""A page whose commands need a package; it has a test of its own."""
OTHER_PROJECT = "llama.cpp/"
"""A checkout of another project, whose programs pages name."""
PUBLISHED = {
    "SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 100000, "tie_word_embeddings": True,
    },
    "Llama-3.2-1B": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000, "head_dim": 64, "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "Mistral-7B-v0.3": {
        "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 32768, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""The sizes in the config.json of published models."""
FIRST = re.compile(r"([\d.,]+( \w+)? to )?[\d.,]+ ?\w*")


def parsed(words: tuple[str, ...]) -> dict[str, Any]:
    """Parse the words after `iiet-orch` as the program does, and return the options by name."""
    command = GROUP
    name = "iiet-orch"
    remaining_words = list(words)
    while hasattr(command, "commands"):
        name, *remaining_words = remaining_words
        command = command.commands[name]
    options: dict[str, Any] = command.make_context(name, remaining_words).params
    return options


def test_shell_lines_are_accepted_with_their_settings():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for line in shell_lines():
        program, *words = [word for word in line.words if word != "&"]
        if program == "iiet-orch" and line.page not in UNUSUAL:
            options = parsed(tuple(words))
            sweep = options.get("config") or options.get("file")
            name = sweep if sweep in shipped_sweeps() else None
            assert read_settings(name, options.get("set_") or []), line
        elif program == "make":
            assert set(words) <= set(targets), line
        elif program.endswith("python") and not words[0].startswith(OTHER_PROJECT):
            path = ROOT.joinpath(*words[1].split(".")) if words[0] == "-m" else ROOT / words[0]
            assert path.is_dir() or path.with_suffix(".py").is_file(), line


def test_commands_within_sentences_exist():
    for line in inline_commands():
        words = [word for word in line.words[1:] if word not in ("...", "…")]
        known = {"--version", "--help", "--install-completion"}
        command = GROUP
        for word in words:
            if word in getattr(command, "commands", {}):
                command = command.commands[word]
                known |= {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
        is_known = words[0].startswith("--") or words[0] in GROUP.commands
        assert is_known or words[0] == "COMMAND", line
        assert {word for word in words if re.match("--?[a-z]", word)} <= known, line


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_settings_and_links_of_pages_are_valid():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for tree in map(yaml.safe_load, blocks(page, "yaml")):
            if set(tree) <= set(Settings.model_fields):
                resolve_settings(tree)
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            linked_page = page.parent / target if target else page
            assert linked_page.exists(), (page, target)
            assert not anchor or anchor in anchors(linked_page), f"{page}: {target}#{anchor}"


def test_the_first_pages_name_every_command_page_and_sweep():
    for name in ("README.md", "commands.md"):
        assert set(re.findall(r"`iiet-orch ([a-z][a-z-]+)", TEXTS[name])) == set(GROUP.commands)
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)\)", TEXTS["README.md"]))
    assert linked == set(TEXTS) - {"README.md", "index.md"}
    [listed] = re.findall(r"or a shipped one by name: ([a-z0-9, -]+) \|", TEXTS["commands.md"])
    assert set(listed.split(", ")) == set(shipped_sweeps())
    defaults = read_settings(None, ["data.passage_characters=4000"])
    assert read_settings(shipped_sweeps()["toy"]) == defaults, "it spells out the defaults"


def test_the_architecture_names_what_exists():
    text = TEXTS["architecture.md"]
    for path in re.findall(r"`([\w/]+\.py)`", text):
        is_whole = path.startswith(("iiet/", "tests/", "examples/", "research/", "docs/"))
        assert (ROOT / path if is_whole else ROOT / "orchestrator" / path).is_file(), path
    for path in re.findall(r"`(tests/[\w/.]+)`", TEXTS["scaling.md"]):
        assert (ROOT / path).exists(), path
    packages = set(re.findall(r"^\| `(\w+)/` \|", text, flags=re.MULTILINE))
    assert packages == {p.parent.name for p in (ROOT / "orchestrator").glob("*/__init__.py")}
    assert {*packages_figure.PLACES, *packages_figure.USED_BY_ALL} == {*packages, "iiet"}


@pytest.fixture
def check_prices(tmp_path, capsys, monkeypatch) -> Callable[..., None]:
    """A function that checks the prices in a page's tables: the page, how many rows it has, and the
    names of the plan's rows that they show."""
    # Machines with a GPU would plan for that one.
    monkeypatch.setitem(sys.modules, "pynvml", None)

    def check(page: str, num_rows: int, *names: str) -> None:
        row_pattern = r"^\| `(iiet-orch pretrain --dry-run[^`]*)` \| (.*) \|$"
        rows = re.findall(row_pattern, TEXTS[page], flags=re.MULTILINE)
        assert len(rows) == num_rows
        for command, row in rows:
            assert cli.main([*shlex.split(command)[1:], "-w", str(tmp_path / "ws")]) == 0
            output = capsys.readouterr().out
            cells = []
            for name in names:
                [text] = re.findall(rf"^  {name}  +(\S.*)$", output, flags=re.MULTILINE)
                value = FIRST.match(text)
                assert value, text
                cells.append(value[0].strip())
            assert row.split(" | ") == cells, command
            assert re.search(r"on an H100 +it fits", output), command

    return check


@pytest.mark.slow
def test_the_tables_of_scaling_are_what_their_commands_print_and_every_row_fits(
    check_prices, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    [settings] = [b for b in blocks(ROOT / "docs" / "scaling.md", "yaml") if "dim: 4096" in b]
    (tmp_path / "7b.yaml").write_text(settings)
    check_prices("scaling.md", 13, "parameters", "memory", "training time", "a checkpoint")


@pytest.mark.slow
def test_the_tables_of_a_retrofit_are_what_its_commands_print(check_prices, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-texts").mkdir()
    (tmp_path / "my-texts" / "a.txt").write_text("A text.")
    [settings] = [b for b in blocks(ROOT / "docs" / "retrofit.md", "yaml") if "my-texts" in b]
    (tmp_path / "retrofit.yaml").write_text(settings)
    for name, values in PUBLISHED.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    check_prices("retrofit.md", 6, "memory", "training time", "a checkpoint")
