"""The commands of docs/retrofit.md, and those of the README that start from a plain model, run one
after the other on a tiny model in place of one of the hub."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from documented import ROOT, blocks, shell_lines
from plain_models import random_model
from sample_texts import help_texts, lines_of, tokens_of

from orchestrator import cli
from orchestrator.models.folder import load_config
from orchestrator.workspace.layout import Workspace, find_checkpoints

pytestmark = pytest.mark.long

PAGE = ROOT / "docs" / "retrofit.md"
README = ROOT / "README.md"
COMMANDS = {
    PAGE: [line.words for line in shell_lines() if line.page == PAGE.name],
    README: [
        tuple(shlex.split(line, comments=True))
        for block in blocks(README, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if "smollm2" in block
    ],
}
SMALLER = {
    **{"1024": "32", "65536": "64", "num_steps: 1000": "num_steps: 2"},
    **{"256": "32", "num_steps: 20": "num_steps: 4"},
}
"""Numbers in the settings files of both pages -> smaller ones."""
REPLACED = {
    **{"hub:HuggingFaceTB/SmolLM2-135M": "published", "300": "4", "7000": "4"},
    "0*14,2*4,0*12": "2",
    "27,24,21": "3,2",
}
RULES = {
    **{"where:knee": "where:2,2,2", "--keep": "--best", "0.99": "--allow-loss"},
    "0.95": "--allow-loss",
}
"""Models this small have no knee, and keep nothing."""
FEW = ("--set", "evaluation.num_items=20", "--set", "influence.num_tokens=256")
ONLY_INFLUENCE = FEW[2:]


def write_files(folder: Path, page: Path) -> None:
    """Write a plain model as transformers stores it, texts, and the settings files of a page."""
    tokens = tokens_of(help_texts(79), folder / "tokens", vocab_size=400)
    sizes = {"vocab_size": 400, "num_hidden_layers": 3, "eos_token_id": 0}
    random_model("llama", **sizes).save_pretrained(folder / "published")
    shutil.copyfile(tokens / "tokenizer.json", folder / "published" / "tokenizer.json")
    config = {"eos_token": "<|endoftext|>"}
    (folder / "published" / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "my-texts").mkdir()
    (folder / "my-texts" / "all.jsonl").write_text(lines_of(help_texts(79)), encoding="utf-8")
    for block in blocks(page, "yaml"):
        if block.startswith("# "):
            text = block
            for number, small in SMALLER.items():
                text = text.replace(number, small)
            (folder / block.split()[1]).write_text(text)


def small(words: tuple[str, ...]) -> list[str]:
    """Return the words of a command of the page, as they run here."""
    known = REPLACED | RULES
    words = tuple(known.get(word, word) for word in words)
    if words[0] == "sweep-threshold":
        return [*words, *FEW]
    if words[0] == "influence":
        return [*words, *ONLY_INFLUENCE]
    if words[0] == "pretrain":
        recipe = ("num_validation_tokens=64", "warmup_steps=1", "learning_rate=0.01")
        options = [part for value in recipe for part in ("--set", f"training.{value}")]
        return [*words, "--local", *options]
    return list(words)


@pytest.mark.parametrize(
    ("page", "run", "counts"),
    [
        pytest.param(PAGE, "retrofit", {"pretrain": 2, "sweep-threshold": 3}, id="the page"),
        pytest.param(README, "iterated", {"pretrain": 1, "sweep-threshold": 2}, id="the README"),
    ],
)
def test_the_commands_of_the_page_run(page, run, counts, tmp_path, monkeypatch, ray_session, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IIET_WORKSPACE")  # The page uses the folder's own.
    write_files(tmp_path, page)
    ran = []
    for program, *words in COMMANDS[page]:
        if program != "iiet-orch":  # A server is another test's.
            continue
        code = cli.main(small(tuple(words)))
        assert code == 0, f"{words}\n{capfd.readouterr().err}"
        ran.append(words[0])
    assert {command: ran.count(command) for command in counts} == counts
    space = Workspace(tmp_path / "iiet-workspace")
    [*_, retrofit] = find_checkpoints(space.runs / run)
    assert load_config(retrofit).corrections == (2, 2, 2)
    front = json.loads((space.sweeps / "cheaper" / "front.json").read_text())
    assert {"teacher", "source", "source_continued"} <= {row["role"] for row in front["results"]}
    assert front["retention"], "the bits per byte of Python's text, without being asked"
    assert (tmp_path / "smollm2-iterative" / "config.json").is_file()
