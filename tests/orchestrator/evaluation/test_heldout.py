"""Held-out tasks: fair items of text, right answers of depth tasks, and files that lm-eval runs."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.model import LM
from refusals import refused
from sample_texts import save_word_tokenizer, tokens_of

from iiet import Decoder, ModelConfig
from iiet.exporting import export
from orchestrator.data.mixture import open_data
from orchestrator.data.preparation import prepare
from orchestrator.data.store import open_tokens
from orchestrator.evaluation import heldout
from orchestrator.evaluation.heldout import (
    TEXT_TASKS,
    HeldoutItems,
    heldout_chances,
    heldout_folder,
    offered_tasks,
    python_passages,
)
from orchestrator.evaluation.lm_eval_model import DecoderModel, run_task
from orchestrator.evaluation.tasks import (
    LoadedSuite,
    lm_eval_task_fingerprints,
    load_suite,
    make_suite,
    tasks_of_source,
)
from orchestrator.models.tokenizer import ModelTokenizer, load_tokenizer
from orchestrator.records.evaluation import EvaluationResult, Suite
from orchestrator.settings import DataSettings, EvaluationSettings, resolve_settings
from orchestrator.settings.evaluation import PYTHON_BITS_TASK, Prompts
from orchestrator.sweeping.stages import plan_sweep
from orchestrator.terminal.progress import Progress
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
        animal = draw.choice(ANIMALS)
        friend = draw.choice(ANIMALS)
        place = draw.choice(PLACES)
        thing = draw.choice(THINGS)
        kind = draw.choice(KINDS)
        stuff = draw.choice(STUFFS)
        link = draw.choice(LINKS)
        lines.append(
            f"The {animal} went to the {place} and met the {friend}, who was asleep there."
        )
        lines.append(f"Soon the {animal} walked home {link} the {kind} {thing} of {stuff}.")
    return "\n\n".join(" ".join(lines[i : i + 4]) for i in range(0, len(lines), 4))


class HandMade(LM):
    """Gives all probability to the continuation that a function of the context returns."""

    prompts = Prompts()

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.answer = answer

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        hits = [self.answer(request.args[0]) == request.args[1] for request in requests]
        return [(0.0 if hit else -10.0, hit) for hit in hits]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        return [-float(len(request.args[0].encode())) for request in requests]

    def generate_until(self, requests: list[Any]) -> list[str]:
        raise AssertionError("nothing is generated")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    draw = random.Random(0)
    texts = [story(draw) for _ in range(90)]
    folder = tmp_path_factory.mktemp("tokens")
    return tokens_of(texts, folder, vocab_size=400, validation_fraction=0.3)


def heldout_suite(
    data: Path, num_items: int = NUM_ITEMS, context_length: int = CONTEXT_LENGTH
) -> Path:
    return heldout_folder(
        data, num_items=num_items, context_length=context_length, make_progress=Progress()
    )


@pytest.fixture(scope="module")
def suite(tokens) -> Path:
    return heldout_suite(tokens)


def rows(suite: Path, name: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads((suite / "suite.json").read_text())["tasks"][name]
    return items


def held_out(tokens: Path) -> str:
    lines = (tokens / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    return "\0".join(json.loads(line)["text"] for line in lines)


def test_items_are_diverse_slices_of_the_held_out_documents(tokens, suite):
    text = held_out(tokens)
    tokenizer = load_tokenizer(tokens)
    train = tokenizer.decode(open_tokens(tokens).train[:].tolist())
    items = rows(suite, "lastword")
    assert len(items) >= 10
    for item in items:
        passage = f"{item['context']} {item['word']}"
        assert passage in text
        assert item["context"][0].isupper()
        assert len(tokenizer.encode(passage).ids) <= CONTEXT_LENGTH
    for item in rows(suite, "bits_per_byte"):
        assert item["text"] in text
        assert item["text"] not in train
    counts = Counter(item["word"] for item in items)
    assert max(counts.values()) == max(1, int(0.02 * NUM_ITEMS))
    assert not {"a", "an", "the"} & set(counts)


def test_other_items_of_the_same_data_are_another_version(suite):
    # If this fails, TEXT_VERSION must be raised: results of other items are found under its key.
    assert heldout.TEXT_VERSION == 2
    first_words = [row["word"] for row in rows(suite, "lastword")[:4]]
    assert first_words == ["sand", "monkey", "wool", "about"]


def test_the_size_of_the_held_out_text_is_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(heldout, "MAX_ROLLING_BYTES", 4000)
    draw = random.Random(0)
    texts = [f"{story(draw)} {number} {'ж' * 2000}" for number in range(30)]
    folder = tokens_of(texts, tmp_path, vocab_size=400, validation_fraction=0.5)
    sizes = [len(row["text"].encode()) for row in rows(heldout_suite(folder), "bits_per_byte")]
    assert 4000 <= sum(sizes) < 4000 + max(sizes)


def test_the_same_documents_and_settings_give_the_same_suite(tokens, suite, tmp_path):
    smaller = heldout_suite(tokens, 20)
    assert smaller != suite
    assert len(rows(smaller, "lastword")) <= 20
    file = suite / "suite.json"
    before = file.stat().st_mtime_ns
    content = file.read_bytes()
    assert heldout_suite(tokens) == suite
    assert (file.stat().st_mtime_ns, file.read_bytes()) == (before, content)
    # The fingerprint does not depend on the path.
    copy = Path(shutil.copytree(suite, tmp_path / suite.name))
    original, copied = (load_suite(Suite(suite_folder=str(folder))) for folder in (suite, copy))
    assert set(original.tasks) == set(TEXT_TASKS)
    for name in TEXT_TASKS:
        assert copied.fingerprint(name) == original.fingerprint(name)
        assert "custom_dataset" in original.tasks[name].dump_config()
    assert len({original.fingerprint(name) for name in TEXT_TASKS}) == len(TEXT_TASKS)
    file.unlink()
    heldout_suite(tokens)
    assert file.read_bytes() == content, "it is made again"


def test_text_without_sentences_is_one_error(tmp_path):
    texts = [f"{i} " + "0x1f;" * i for i in range(1, 20)]
    folder = tokens_of(texts, tmp_path, vocab_size=300)
    with refused(UserError, "items"):
        heldout_suite(folder, 50, 64)
    assert not list(folder.glob("*heldout*"))


@pytest.mark.slow
def test_a_mixture_gives_tasks_of_all_texts_together_and_of_its_depth_tasks(tmp_path):
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
    suite = heldout_suite(data)
    assert set(json.loads((suite / "suite.json").read_text())["tasks"]) == set(names)
    assert len(rows(suite, "s5_4")) == NUM_ITEMS
    sources = [row["text"].partition(":")[0] for row in rows(suite, "bits_per_byte")]
    assert set(sources) == {"files", "hub"}


def test_a_suite_can_mix_held_out_and_other_tasks(tokens, suite, tmp_path):
    settings = EvaluationSettings(
        suite="first, heldout, last", num_items=NUM_ITEMS, include_path=str(tmp_path)
    )
    mixed = make_suite(settings, tokens, context_length=CONTEXT_LENGTH)
    assert mixed.tasks == ("first", *TEXT_TASKS, "last")
    assert mixed.task_folders == (tmp_path,)
    assert mixed.heldout == suite


# Depth tasks

NUM_DEPTH_ITEMS = 150


def depth_data(folder: Path, *tasks: str, **changes: str) -> Path:
    depth = {"data.source": "depth", "data.depth.tasks": tasks, "data.depth.length": 16}
    options = {**depth, **{f"data.{name}": value for name, value in changes.items()}}
    return prepare(resolve_settings({}, options=options).data, Workspace(folder))


def hops(context: str, count: int) -> str:
    """Solve p-hop induction by search, from the text alone."""
    symbols = re.findall(r"<\|\d+\|>", context)
    place = len(symbols) - 1
    for _ in range(count):
        place = 1 + max(i for i in range(place) if symbols[i] == symbols[place])
    return symbols[place]


def run_model(suite: LoadedSuite, model: Any) -> EvaluationResult:
    return EvaluationResult(
        results={n: run_task(n, t, model).result for n, t in suite.tasks.items()}
    )


def test_a_perfect_model_has_all_items_right_and_a_guess_is_at_chance(tmp_path):
    folder = heldout_suite(depth_data(tmp_path, "phop_2", "phop_3"), NUM_DEPTH_ITEMS, 32)
    suite = load_suite(Suite(suite_folder=str(folder)))
    chances = heldout_chances(folder)
    perfect = run_model(suite, HandMade(lambda text: hops(text, int(text[7]))))
    assert perfect.accuracies["phop_2"][0] == perfect.accuracies["phop_3"][0] == 1.0
    draw = random.Random(0)
    guess = run_model(suite, HandMade(lambda _: f"<|{draw.randrange(4)}|>"))
    constant = run_model(suite, HandMade(lambda _: "<|2|>"))
    repeats = {
        "phop_2": ("last symbol", HandMade(lambda text: text[text.rindex("<") :])),
        "phop_3": ("symbol before the last", HandMade(lambda text: f"<{text.split('<')[-2]}")),
    }
    for name, (symbol_name, model) in repeats.items():
        repeated = 100 * run_model(suite, model).accuracies[name][0]
        assert chances[name] == f"25.0%, or {repeated:.1f}% by repeating the {symbol_name}"
        assert guess.accuracies[name][0] < 0.45
        mean, error = constant.accuracies[name]
        assert abs(mean - 0.25) < 4 * error
    assert "bits_per_byte" not in constant.quality()
    assert constant.quality()["accuracy"] == pytest.approx(constant.accuracy)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "symbols"), [("s5_4", "letters"), ("lookup_2", "words")])
def test_accuracy_is_that_of_the_likeliest_symbol(tmp_path, name, symbols):
    changes = {}
    if symbols == "words":
        changes = {"depth.symbols": "words", "tokenizer": str(save_word_tokenizer(tmp_path))}
    data = depth_data(tmp_path, name, **changes)
    tokenizer = ModelTokenizer(data / "tokenizer.json")
    torch.manual_seed(0)
    decoder = Decoder(
        ModelConfig(
            method="vanilla",
            vocab_size=tokenizer.tokenizer.get_vocab_size(),
            dim=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            ffn_dim=32,
            context_length=32,
            initializer_std=0.5,
        )
    ).eval()
    suite = heldout_suite(data, NUM_DEPTH_ITEMS, 32)
    loaded = load_suite(Suite(suite_folder=str(suite)))
    result = run_task(name, loaded.tasks[name], DecoderModel(decoder, tokenizer)).result
    values = []
    for row in rows(suite, name):
        context = torch.tensor([tokenizer.encode(row["context"], add_special_tokens=False)])
        ids = [tokenizer.encode(choice, add_special_tokens=False)[0] for choice in row["choices"]]
        with torch.no_grad():
            scores = decoder(context)[0, -1, ids]
        values.append(float(scores.argmax() == row["label"]))
    assert result.values["acc"] == values
    assert sum(values) < NUM_DEPTH_ITEMS / 2


def tasks_of_suite(suite: str, data: Path, **options: Any) -> tuple[str, ...]:
    settings = EvaluationSettings(suite=suite, num_items=20, **options)
    return make_suite(settings, data, context_length=32, make_progress=Progress()).tasks


def test_a_task_of_the_data_can_be_named_by_itself(tmp_path):
    data = depth_data(tmp_path, "phop_2", "chain_2")
    assert tasks_of_suite("heldout", data) == ("phop_2", "chain_2")
    assert tasks_of_suite("chain_2", data) == ("chain_2",)
    assert tasks_of_suite("chain_2, heldout", data) == ("chain_2", "phop_2")
    settings = EvaluationSettings(suite="chain_2")
    assert lm_eval_task_fingerprints(settings, needs_accuracy=True) == {}
    with refused(UserError, "accuracy"):
        lm_eval_task_fingerprints(EvaluationSettings(suite="bits_per_byte"), needs_accuracy=True)
    folder = heldout_suite(data, 20, 32)
    single = Suite(tasks=("chain_2",), suite_folder=str(folder), fingerprints={})
    assert list(load_suite(single).tasks) == ["chain_2"]


def test_tasks_that_the_data_cannot_give_are_errors_before_any_work(tmp_path):
    bits = {"sweep.kind": "search", "search.objective": "bits_per_byte"}
    depth = {"data.source": "depth", "data.depth.tasks": ("phop_2",)}
    text = {}
    for options, reason in (
        ({**depth, "evaluation.suite": "phop_4"}, "names phop_4, which .* they can make phop_2$"),
        ({**depth, "evaluation.suite": "heldout,lastword"}, "names lastword, which the data cann"),
        ({**text, "evaluation.suite": "phop_2"}, "phop_2, which .* make lastword, bits_per_byte"),
        ({**depth, **bits}, "gives bits per byte on these data; set it to accuracy"),
        ({**text, **bits, "evaluation.suite": "lastword"}, "suite=lastword gives bits per byte on"),
    ):
        sizes = {"data.depth.length": 16, "model.context_length": 16}
        with pytest.raises(UserError, match=reason):
            plan_sweep(resolve_settings({}, options={**sizes, **options}), workspace=tmp_path)
    assert not list(tmp_path.iterdir())
    with refused(UserError, "phop_4"):
        tasks_of_suite("phop_4", depth_data(tmp_path, "phop_2"))


def test_a_text_that_is_no_symbol_is_an_error(tmp_path, tiny_model):
    file = depth_data(tmp_path, "phop_2") / "tokenizer.json"
    exported = export(Decoder(ModelConfig.from_dict(tiny_model)), tmp_path / "exported", file)
    for tokenizer in (ModelTokenizer(file), ModelTokenizer(exported)):
        for prompt in ("<|0|><|3|>", " <|0|> <|3|>\n"):
            assert tokenizer.encode_document(prompt) == (0, 1, 4)
        with refused(UserError, "<|0"):
            tokenizer.encode_document("<|0|>?")


def test_pythons_text_is_held_out_also_from_data_that_have_it(tiny_tokens, tmp_path):
    usual = python_passages(tiny_tokens)
    assert 20 <= len(usual) <= 60
    assert 30_000 < sum(len(passage.encode()) for passage in usual) < 50_000
    assert usual == python_passages(tiny_tokens)
    # Text that is cut into passages holds out other documents than whole text.
    space = Workspace(tmp_path)
    cut = DataSettings(source="python", vocab_size=400, passage_characters=2000)
    tokens = prepare(cut, space)
    held_out = list(open_tokens(tokens).validation_texts())
    passages = python_passages(tokens)
    assert passages
    assert all(any(passage in text for text in held_out) for passage in passages)
    assert passages != usual


def test_pythons_text_is_a_task_of_every_suite(tiny_tokens, tmp_path):
    folder = tmp_path / "suite"
    rows = [{"context": "a", "choices": ["b", "c"], "label": 0}]
    HeldoutItems(tasks={"phop_1": rows}, chances={"phop_1": "half"}).write(folder / "suite.json")
    suite = Suite(
        suite_folder=str(folder), tokens_folder=str(tiny_tokens), unaveraged=(PYTHON_BITS_TASK,),
        python_text="its hash", fingerprints={},
    )  # fmt: skip
    loaded = load_suite(suite)
    assert list(loaded.tasks) == ["phop_1", PYTHON_BITS_TASK]
    passages = python_passages(tiny_tokens)
    task = loaded.tasks[PYTHON_BITS_TASK]
    assert [document["text"] for document in task.eval_docs] == passages
    reader: Any = HandMade(lambda _: "")
    result = run_task(PYTHON_BITS_TASK, task, reader).result
    assert result.metrics["bits_per_byte"] == pytest.approx(1 / math.log(2))
    assert result.accuracy_metric is None
