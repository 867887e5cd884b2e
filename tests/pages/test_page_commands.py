"""Every command of `iiet-orch` in the shell blocks of the pages runs, at a small size.

Each page runs in a workspace of its own, a copy of one with three models and a sweep. Left out is
what needs the Hugging Face Hub, a cluster or another machine's storage, and a server that does not
end; GPU commands run as dry runs. The tutorial begins with nothing. Three pages have tests of their
own: the real model, the retrofit, extending.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from commands import settings_options
from documented import ROOT, blocks, shell_lines
from sample_texts import help_texts, lines_of
from small_size import SMALL

from orchestrator import cli
from orchestrator.data.text import DOCUMENT_MARK

pytestmark = pytest.mark.long

TESTED_ELSEWHERE = {"real-model.md", "retrofit.md", "extending.md"}
LINES = [x for x in shell_lines() if x.words[0] == "iiet-orch" and x.page not in TESTED_ELSEWHERE]
PAGES = list(dict.fromkeys(line.page for line in LINES))

LEFT_OUT = re.compile(
    r"iiet-orch ui\b(?!.*--sync)|.*(hub|s3://|ouro\.yaml|prepare --config paper)"
    r"|.*(smollm2|iterated|cheaper|pick thin)"
)
"""A server that runs until it is stopped; what needs the Hugging Face Hub, also in a file, or a
cloud; and the README's commands for a plain model, which test_retrofit_page.py runs."""
REPLACED = {
    **{"heldout,piqa": "heldout", "--search": "--search=3", "30": ""},
    **{"--keep": "--cheapest", "0.97": ""},
}
"""Tasks of the hub are left out of a suite, a search is shorter, and models that have learned
nothing keep no share of a quality."""

MAY_REFUSE = {"--knee": "this front has no knee"}
"""Word of a command to the sentence with which it may end here: models this small learn nothing."""

SMALL_TEXT = [*SMALL, "model.corrections=3"]
SMALL_DEPTH = [
    "training.num_steps=4", "training.num_tokens_per_step=256", "training.warmup_steps=1",
    "training.num_validation_tokens=512", "distillation.training.num_steps=2",
    "distillation.training.num_tokens_per_step=256", "distillation.training.warmup_steps=1",
    "distillation.training.num_validation_tokens=512", "influence.num_tokens=512",
    "evaluation.num_items=20", "sweep.num_schedules=3",
]  # fmt: skip
TAKES_SETTINGS = {
    "prepare", "pretrain", "distill", "influence", "evaluate", "sweep", "sweep-threshold",
    "sweep-iterations",
}  # fmt: skip


def small(words: tuple[str, ...]) -> list[str]:
    """Return the options that make a command small."""
    # Plans of large sweeps are made as they stand.
    if words[0] not in TAKES_SETTINGS or not {"--gpus", "--gpu", "claims"}.isdisjoint(words):
        return []
    is_depth = "depth" in words
    changes = list(SMALL_DEPTH if is_depth else SMALL_TEXT)
    if "mixture.yaml" in words:
        changes.append("model.context_length=128")  # Its tasks do not fit into less.
    return settings_options(changes, words[0])


@pytest.fixture(scope="module")
def started_project(tmp_path_factory, ray_session) -> Path:
    """A folder with the files that the pages speak of, and a workspace."""
    folder = tmp_path_factory.mktemp("project")
    write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = settings_options(SMALL_TEXT, "pretrain")
        for number, name in enumerate(("my-run", "other", "tiny")):
            seed = f"--set=training.seed={number}"
            assert cli.main(["pretrain", "--local", "--name", name, seed, *options]) == 0
        options = settings_options(SMALL_TEXT, "sweep-threshold")
        assert cli.main(["sweep-threshold", "tiny", *options]) == 0
        assert cli.main(["export", "tiny", "--to", "my-chat-model", "--no-measure"]) == 0
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "my-chat-model" / "chat_template.jinja").write_text(template)
    return folder


def write_files(folder: Path) -> None:
    """Write texts, the settings files of the pages, and the task `capitals` with its items."""
    rows = lines_of(help_texts(100))
    for name in ("my-texts", "corpus", "tasks"):
        (folder / name).mkdir()
    (folder / "my-texts" / "all.jsonl").write_text(rows, encoding="utf-8")
    (folder / "corpus" / "all.jsonl").write_text(rows, encoding="utf-8")
    docs = ROOT / "docs"
    (mixture,) = [b for b in blocks(docs / "data.md", "yaml") if "phop_6: 0.3" in b]
    (capitals,) = [b for b in blocks(docs / "evaluation.md", "yaml") if "task: capitals" in b]
    (folder / "mixture.yaml").write_text(mixture)
    (folder / "tasks" / "capitals.yaml").write_text(capitals)
    cities = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Peru": "Lima"}
    items = [json.dumps({"country": k, "city": v}) + "\n" for k, v in cities.items()]
    (folder / "tasks" / "capitals.jsonl").write_text("".join(items[:2]))
    (folder / "tasks" / "examples.jsonl").write_text("".join(items[2:]))


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, started_project, tmp_path, monkeypatch, capfd, terminal):
    project = tmp_path / "project"
    if page == "tutorial.md":
        (project / "my-texts").mkdir(parents=True)
        (project / "my-texts" / "python.txt").write_text(DOCUMENT_MARK.join(help_texts(100)))
    else:
        shutil.copytree(started_project, project)
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.chdir(project)
    monkeypatch.delenv("IIET_WORKSPACE")  # The pages use the folder's own.
    used = []
    for line in LINES:
        if line.page != page or LEFT_OUT.match(shlex.join(line.words)):
            continue
        words = [REPLACED.get(word, word) for word in line.words[1:]]
        words = words[: words.index(">")] if ">" in words else words
        is_dry = "--gpus" in words and "--dry-run" not in words
        answer = "--yes" if words == ["clean"] else ""  # `clean` asks before it deletes.
        more = [*small(tuple(words)), "--dry-run" if is_dry else "", answer]
        code = cli.main([word for word in (*words, *more) if word])
        error = capfd.readouterr().err
        excuse = next((MAY_REFUSE[word] for word in words if word in MAY_REFUSE), None)
        assert code == 0 or (excuse and excuse in error), f"{line}\n{error}"
        used += re.findall(r"^model: (.*), (.*)$", error, flags=re.MULTILINE)
    if page == "tutorial.md":
        (_, picked), (folder, exported) = used
        assert (Path(folder), exported) == (project / "my-model", picked)
