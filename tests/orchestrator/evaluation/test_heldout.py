"""Held-out tasks: fair items, data without code, and files that lm-eval's own command runs."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.corpus import Document
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import prepare
from orchestrator.data.store import open_tokens
from orchestrator.data.tokenization import write_tokens
from orchestrator.evaluation.harness import load_suite
from orchestrator.evaluation.heldout import (
    TEXT_TASKS,
    HeldoutSuite,
    build_heldout,
    offered_tasks,
)
from orchestrator.evaluation.heldout.ngrams import TokenBigrams, WordTrigrams
from orchestrator.evaluation.heldout.sentence_splitting import (
    cut_position,
    find_sentences,
    is_plain,
)
from orchestrator.evaluation.task_selection import select_tasks, tasks_of_source
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
    documents = [Document(story(draw), f"story {number}") for number in range(150)]
    settings = DataSettings(vocab_size=400, validation_fraction=0.3)
    return write_tokens(tmp_path_factory.mktemp("tokens"), documents, settings, resume_key="a key")


@pytest.fixture(scope="module")
def suite(tokens: Path) -> HeldoutSuite:
    return build_heldout(tokens, num_items=NUM_ITEMS, context_length=CONTEXT_LENGTH)


def rows(suite: HeldoutSuite, name: str) -> list[dict[str, Any]]:
    lines = (suite.folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def held_out(tokens: Path) -> str:
    lines = (tokens / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    return "\0".join(json.loads(line)["text"] for line in lines)


def test_passages_are_slices_of_the_held_out_documents(tokens: Path, suite: HeldoutSuite) -> None:
    text = held_out(tokens)
    train = load_tokenizer(tokens).decode(open_tokens(tokens).train.tolist())
    for item in rows(suite, "lastword"):
        assert f"{item['context']} {item['word']}" in text
    for item in rows(suite, "continuation"):
        assert f"{item['context']} {item['endings'][item['label']]}" in text
        assert item["context"][0].isupper()
    for item in rows(suite, "bits_per_byte"):
        assert item["text"] in text
        assert item["text"] not in train


def test_every_item_fits_the_context(tokens: Path, suite: HeldoutSuite) -> None:
    tokenizer = load_tokenizer(tokens)
    texts = [f"{item['context']} {item['word']}" for item in rows(suite, "lastword")]
    texts += [
        f"{item['context']} {ending}"
        for item in rows(suite, "continuation")
        for ending in item["endings"]
    ]
    longest = max(len(tokenizer.encode(text).ids) for text in texts)
    assert longest <= CONTEXT_LENGTH + 4  # wrong endings are alike in length, not equal


def test_an_ending_alone_does_not_reveal_whether_it_is_right(suite: HeldoutSuite) -> None:
    items = rows(suite, "continuation")
    assert len(items) >= 40
    right = Counter(item["endings"][item["label"]] for item in items)
    used = Counter(ending for item in items for ending in item["endings"])
    assert set(right.values()) == {1}
    assert set(used.values()) == {4}
    labels = Counter(item["label"] for item in items)
    assert set(labels) == {0, 1, 2, 3}
    assert max(labels.values()) < 0.45 * len(items)
    for item in items:
        assert len(set(item["endings"])) == 4
        assert len({ending.split()[0] for ending in item["endings"]}) == 4


def test_last_words_are_diverse(suite: HeldoutSuite) -> None:
    counts = Counter(item["word"] for item in rows(suite, "lastword"))
    assert max(counts.values()) <= max(1, 0.02 * NUM_ITEMS)
    assert not {"a", "an", "the"} & set(counts)


def test_a_suite_is_reused_and_depends_on_its_settings(tokens: Path, suite: HeldoutSuite) -> None:
    other = build_heldout(tokens, num_items=20, context_length=CONTEXT_LENGTH)
    assert other.folder != suite.folder
    assert other.tasks["lastword"] <= 20
    assert any("standard error" in note for note in other.notes)
    written = (suite.folder / "suite.json").stat().st_mtime_ns
    again = build_heldout(tokens, num_items=NUM_ITEMS, context_length=CONTEXT_LENGTH)
    assert again == suite
    assert (suite.folder / "suite.json").stat().st_mtime_ns == written


def test_the_same_documents_give_the_same_items(tokens: Path, suite: HeldoutSuite) -> None:
    before = {name: rows(suite, name) for name in TEXT_TASKS}
    (suite.folder / "suite.json").unlink()
    build_heldout(tokens, num_items=NUM_ITEMS, context_length=CONTEXT_LENGTH)
    assert {name: rows(suite, name) for name in TEXT_TASKS} == before


def test_code_in_the_folder_is_never_run(tokens: Path, suite: HeldoutSuite, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(suite.folder, tmp_path / "tokens" / suite.folder.name))
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\ndef lastword(**_): raise SystemExit\n"
    (folder / "heldout_reader.py").write_text(code)
    for name in suite.tasks:
        text = f"task: {name}\ncustom_dataset: !function heldout_reader.lastword\n"
        (folder / f"{name}.yaml").write_text(text)
    found = load_suite(heldout=folder)
    assert set(found.tasks) == set(TEXT_TASKS)
    assert found.num_items("lastword") == suite.tasks["lastword"]
    assert not ran.exists()


def test_a_suite_does_not_depend_on_its_path(suite: HeldoutSuite, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(suite.folder, tmp_path / suite.folder.name))
    here, there = load_suite(heldout=suite.folder), load_suite(heldout=copy)
    for name in TEXT_TASKS:
        assert there.fingerprint(name) == here.fingerprint(name)
        assert "custom_dataset" in here.tasks[name].dump_config()
    assert len({here.fingerprint(name) for name in TEXT_TASKS}) == len(TEXT_TASKS)


def test_text_without_sentences_is_one_error(tmp_path: Path) -> None:
    documents = [Document(f"{i} " + "0x1f;" * i, "code") for i in range(1, 20)]
    folder = write_tokens(tmp_path, documents, DataSettings(vocab_size=300), resume_key="a key")
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


def test_sentences_are_spans_of_the_text() -> None:
    text = "He asked Dr. Who, i.e. a man.\n\n(So it was.) Then he left, e.g. by car! No end"
    spans = [text[span] for span in find_sentences(text)]
    assert spans == ["He asked Dr. Who, i.e. a man.", "(So it was.)", "Then he left, e.g. by car!"]


def test_a_sentence_is_cut_before_a_phrase() -> None:
    text = "The cat that lived with us went away in the middle of the night."
    position = cut_position(text)
    assert position is not None
    assert text[position + 1 :] == "in the middle of the night."
    assert cut_position("Birds sing songs loudly everywhere today, louder always.") is None
    assert is_plain(text)
    assert not is_plain("and so it began, as these things do.")


def test_seen_text_is_more_likely() -> None:
    words = WordTrigrams("the cat sat on the mat. the cat sat on the dog. a cat ran.")
    assert words.expectation(["the", "cat"], "sat") > words.expectation(["the", "cat"], "ran") > 0
    assert words.expectation(["the", "cat"], "flew") == 0
    import numpy as np

    tokens = TokenBigrams(np.array([1, 2, 3, 1, 2, 3, 1, 2, 4], dtype=np.uint16), 5)
    assert tokens.log_likelihood([1, 2, 3]) > tokens.log_likelihood([1, 2, 4])
    assert tokens.log_likelihood([1, 0, 0]) < tokens.log_likelihood([3, 1, 1])


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
    assert 0.05 < found["continuation"]["acc,none"] < 0.45
    assert found["bits_per_byte"]["bits_per_byte,none"] == pytest.approx(1.4427, abs=1e-3)
    assert results["n-samples"]["continuation"]["effective"] == suite.tasks["continuation"]


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
