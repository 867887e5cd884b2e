"""Held-out tasks: fair items, data without code, and files that lm-eval's own command runs."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sample_texts import tokens_of

from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import prepare
from orchestrator.data.store import open_tokens
from orchestrator.evaluation import heldout
from orchestrator.evaluation.heldout import (
    TEXT_TASKS,
    HeldoutSuite,
    build_heldout,
    offered_tasks,
)
from orchestrator.evaluation.selection import select_tasks, tasks_of_source
from orchestrator.evaluation.suite import load_suite
from orchestrator.evaluation.tasks import TaskSelection
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.settings import DataSettings, EvaluationSettings
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace

CONTEXT_LENGTH = 48
NUM_ITEMS = 60


ANIMALS = ("lion", "tiger", "zebra", "monkey", "rabbit", "turtle", "parrot", "donkey", "camel")
PLACES = ("river", "forest", "mountain", "village", "garden", "desert", "island", "valley")
THINGS = ("moon", "house", "boat", "stone", "tree", "bridge", "song", "well", "fire", "road")
KINDS = ("old", "great", "silent", "yellow", "broken", "little", "hidden", "famous", "heavy")
STUFFS = ("gold", "silver", "wood", "glass", "paper", "ice", "sand", "bread", "wool", "clay")
LINKS = ("behind", "under", "with", "for", "near", "beside", "to", "over", "by", "from", "about")


def story(draw: random.Random) -> str:
    lines = []
    for _ in range(8):
        one, other, place = draw.choice(ANIMALS), draw.choice(ANIMALS), draw.choice(PLACES)
        thing, kind, stuff = draw.choice(THINGS), draw.choice(KINDS), draw.choice(STUFFS)
        link = draw.choice(LINKS)
        lines.append(f"The {one} went to the {place} and met the {other}, who was asleep there.")
        lines.append(f"Soon the {one} walked home {link} the {kind} {thing} of {stuff}.")
    return "\n\n".join(" ".join(lines[i : i + 4]) for i in range(0, len(lines), 4))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    texts = [story(draw) for _ in range(150)]
    folder = tmp_path_factory.mktemp("tokens")
    return tokens_of(texts, folder, vocab_size=400, validation_fraction=0.3)


@pytest.fixture(scope="module")
def suite(tokens: Path) -> HeldoutSuite:
    return build_heldout(tokens, num_items=NUM_ITEMS, context_length=CONTEXT_LENGTH)


def rows(suite: HeldoutSuite, name: str) -> list[dict[str, Any]]:
    lines = (suite.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def held_out(tokens: Path) -> str:
    lines = (tokens / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    return "\0".join(json.loads(line)["text"] for line in lines)


def test_items_are_diverse_slices_of_the_held_out_documents(
    tokens: Path, suite: HeldoutSuite
) -> None:
    text, tokenizer = held_out(tokens), load_tokenizer(tokens)
    train = tokenizer.decode(open_tokens(tokens).train.tolist())
    items = rows(suite, "lastword")
    assert len(items) >= 10
    for item in items:
        whole = f"{item['context']} {item['word']}"
        assert whole in text
        assert item["context"][0].isupper()
        assert len(tokenizer.encode(whole).ids) <= CONTEXT_LENGTH
    for item in rows(suite, "bits_per_byte"):
        assert item["text"] in text
        assert item["text"] not in train
    counts = Counter(item["word"] for item in items)
    assert max(counts.values()) == max(1, int(0.02 * NUM_ITEMS))
    assert not {"a", "an", "the"} & set(counts)


def test_the_same_documents_and_settings_give_the_same_suite(
    tokens: Path, suite: HeldoutSuite, tmp_path: Path
) -> None:
    other = build_heldout(tokens, num_items=20, context_length=CONTEXT_LENGTH)
    assert other.folder != suite.folder
    assert other.tasks["lastword"] <= 20
    assert any("standard error" in note for note in other.notes)
    written = (suite.folder / "suite.json").stat().st_mtime_ns
    before = {name: rows(suite, name) for name in TEXT_TASKS}
    assert build_heldout(tokens, num_items=NUM_ITEMS, context_length=CONTEXT_LENGTH) == suite
    assert (suite.folder / "suite.json").stat().st_mtime_ns == written
    # The fingerprint does not depend on the path.
    copy = Path(shutil.copytree(suite.folder, tmp_path / suite.folder.name))
    here, there = (load_suite(TaskSelection(heldout=f)) for f in (suite.folder, copy))
    for name in TEXT_TASKS:
        assert there.fingerprint(name) == here.fingerprint(name)
        assert "custom_dataset" in here.tasks[name].dump_config()
    assert len({here.fingerprint(name) for name in TEXT_TASKS}) == len(TEXT_TASKS)
    # Made again.
    (suite.folder / "suite.json").unlink()
    build_heldout(tokens, num_items=NUM_ITEMS, context_length=CONTEXT_LENGTH)
    assert {name: rows(suite, name) for name in TEXT_TASKS} == before


def test_the_documents_with_the_smallest_hashes_are_sampled(tokens: Path) -> None:
    texts = held_out(tokens).split("\0")
    digest = {text: hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts}
    sizes = (1, 6000, 1500, 10**9)
    sampled = heldout._sample([open_tokens(tokens)], *sizes)
    for num_bytes, found in zip(sizes, sampled, strict=True):
        chosen, total = set[str](), 0
        for text in sorted(texts, key=digest.__getitem__):
            if total < num_bytes:
                chosen.add(text)
                total += len(text.encode())
        assert found == [text for text in texts if text in chosen]


def test_code_in_the_folder_is_never_run(tokens: Path, suite: HeldoutSuite, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(suite.folder, tmp_path / "tokens" / suite.folder.name))
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\ndef lastword(**_): raise SystemExit\n"
    (folder / "heldout_reader.py").write_text(code)
    for name in suite.tasks:
        text = f"task: {name}\ncustom_dataset: !function heldout_reader.lastword\n"
        (folder / f"{name}.yaml").write_text(text)
    found = load_suite(TaskSelection(heldout=folder))
    assert set(found.tasks) == set(TEXT_TASKS)
    assert found.num_items("lastword") == suite.tasks["lastword"]
    assert not ran.exists()


def test_text_without_sentences_is_one_error(tmp_path: Path) -> None:
    texts = [f"{i} " + "0x1f;" * i for i in range(1, 20)]
    folder = tokens_of(texts, tmp_path, vocab_size=300)
    with pytest.raises(UserError, match="give no test items"):
        build_heldout(folder, num_items=50, context_length=64)
    assert not list(folder.glob("*heldout*"))


def test_a_mixture_gives_tasks_of_all_texts_together_and_of_its_depth_tasks(
    tmp_path: Path,
) -> None:
    for number, name in enumerate(("files", "hub")):
        draw = random.Random(number)
        lines = [json.dumps({"text": f"{name}: {story(draw)}"}) for _ in range(120)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "stories.jsonl").write_text("\n".join(lines))
    settings = DataSettings(
        source="mixture",
        shares={"files": 0.5, "hub": 0.3, "s5_4": 0.2},
        files=(str(tmp_path / "files"),),
        hub_name=str(tmp_path / "hub"),
        vocab_size=400,
        validation_fraction=0.3,
    )
    data = prepare(settings, Workspace(tmp_path / "workspace"))
    names = (*TEXT_TASKS, "s5_4")
    assert tasks_of_source(settings) == offered_tasks(open_data(data)) == names
    suite = build_heldout(data, num_items=NUM_ITEMS, context_length=CONTEXT_LENGTH)
    assert suite.tasks.keys() == set(names)
    assert suite.tasks["s5_4"] == NUM_ITEMS
    whole = [row["text"].partition(":")[0] for row in rows(suite, "bits_per_byte")]
    assert set(whole) == {"files", "hub"}


@pytest.mark.slow
def test_lm_eval_runs_the_tasks(
    suite: HeldoutSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Guess(LM):
        """Draws log-likelihoods at random, whatever it is asked."""

        draw = random.Random(0)

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:  # type: ignore[override]
            return [(-100 * self.draw.random(), False) for _ in requests]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:  # type: ignore[override]
            return [-float(len(request.args[0].encode())) for request in requests]

        def generate_until(self, requests: list[Any]) -> list[str]:  # type: ignore[override]
            raise AssertionError("nothing is generated")

    monkeypatch.chdir(suite.folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    manager = TaskManager(include_path=".", include_defaults=False)
    tasks = manager.load(["heldout"])
    # No bootstrap: it forks, and a process with threads of Ray or PyTorch may then hang.
    results = lm_eval.evaluate(lm=Guess(), task_dict=tasks, bootstrap_iters=0)
    found = results["results"]
    assert set(TEXT_TASKS) <= set(found)
    assert found["lastword"]["acc,none"] == 0.0
    assert found["bits_per_byte"]["bits_per_byte,none"] == pytest.approx(1.4427, abs=1e-3)
    assert results["n-samples"]["lastword"]["effective"] == suite.tasks["lastword"]


def test_a_suite_can_mix_held_out_and_other_tasks(
    tokens: Path, suite: HeldoutSuite, tmp_path: Path
) -> None:
    settings = EvaluationSettings(
        suite="first, heldout, last", num_items=NUM_ITEMS, include_path=str(tmp_path)
    )
    asked = select_tasks(settings, tokens, context_length=CONTEXT_LENGTH)
    assert asked.names == ("first", *suite.tasks, "last")
    assert asked.folders == (tmp_path,)
    assert asked.heldout == suite.folder
