"""Depth tasks in lm-eval: right answers, scored as the likeliest symbol of the alphabet."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.model import LM

from iiet import Decoder, ModelConfig
from orchestrator.data.preparation import prepare
from orchestrator.evaluation.adapter import DecoderModel, run_task
from orchestrator.evaluation.heldout import HeldoutSuite, build_heldout
from orchestrator.evaluation.selection import lm_eval_task_fingerprints, select_tasks
from orchestrator.evaluation.suite import Suite, load_suite
from orchestrator.evaluation.tasks import TaskSelection
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.pipelines.sweeps import plan_sweep
from orchestrator.records.evaluation import EvaluationResult
from orchestrator.settings import EvaluationSettings, Settings, resolve_settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace

NUM_ITEMS = 150


def depth_settings(*tasks: str, **options: Any) -> Settings:
    tree = {"data.source": "depth", "data.depth.tasks": tasks, "data.depth.length": 16}
    return resolve_settings({}, options={**tree, **options})


def prepared(folder: Path, *tasks: str) -> Path:
    return prepare(depth_settings(*tasks).data, Workspace(folder))


def built(data: Path) -> HeldoutSuite:
    return build_heldout(data, num_items=NUM_ITEMS, context_length=32)


def hops(context: str, count: int) -> str:
    """Solve p-hop induction by search, from the text alone."""
    symbols = re.findall(r"<\|\d+\|>", context)
    place = len(symbols) - 1
    for _ in range(count):
        place = 1 + max(i for i in range(place) if symbols[i] == symbols[place])
    return symbols[place]


class HandMade(LM):
    """Gives all probability to the continuation that a function of the context returns."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self.answer = answer

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:  # type: ignore[override]
        hits = [self.answer(request.args[0]) == request.args[1] for request in requests]
        return [(0.0 if hit else -10.0, hit) for hit in hits]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:  # type: ignore[override]
        raise AssertionError("there is no text")

    def generate_until(self, requests: list[Any]) -> list[str]:  # type: ignore[override]
        raise AssertionError("nothing is generated")


def run_model(suite: Suite, model: LM) -> EvaluationResult:
    return EvaluationResult(
        results={n: run_task(n, t, model).result for n, t in suite.tasks.items()}
    )


def test_a_perfect_model_has_all_items_right_and_a_guess_is_at_chance(tmp_path: Path) -> None:
    data = built(prepared(tmp_path, "phop_2", "phop_3"))
    suite = load_suite(TaskSelection(heldout=data.folder))
    perfect = run_model(suite, HandMade(lambda text: hops(text, int(text[7]))))
    assert perfect.accuracies["phop_2"][0] == perfect.accuracies["phop_3"][0] == 1.0
    draw = random.Random(0)
    guess = run_model(suite, HandMade(lambda _: f"<|{draw.randrange(4)}|>"))
    constant = run_model(suite, HandMade(lambda _: "<|2|>"))
    repeats = {
        "phop_2": ("last symbol", HandMade(lambda text: text[text.rindex("<") :])),
        "phop_3": ("symbol before the last", HandMade(lambda text: f"<{text.split('<')[-2]}")),
    }
    for name, (what, model) in repeats.items():
        repeated = 100 * run_model(suite, model).accuracies[name][0]
        assert data.chances[name] == f"25.0%, or {repeated:.1f}% by repeating the {what}"
        assert guess.accuracies[name][0] < 0.45
        mean, error = constant.accuracies[name]
        assert abs(mean - 0.25) < 4 * error
    assert "bits_per_byte" not in constant.quality()
    assert constant.quality()["accuracy"] == pytest.approx(constant.accuracy)


@pytest.mark.parametrize("name", ["phop_2", "chain_3", "s5_4"])
def test_accuracy_is_that_of_the_likeliest_symbol(tmp_path: Path, name: str) -> None:
    data = prepared(tmp_path, name)
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
    suite = built(data)
    loaded = load_suite(TaskSelection(heldout=suite.folder))
    result = run_task(name, loaded.tasks[name], DecoderModel(decoder, tokenizer)).result
    lines = (suite.folder / f"{name}.jsonl").read_text().splitlines()
    values = []
    for row in map(json.loads, lines):
        context = torch.tensor([tokenizer.encode(row["context"], add_special_tokens=False)])
        ids = [tokenizer.tokenizer.token_to_id(choice) for choice in row["choices"]]
        with torch.no_grad():
            scores = decoder(context)[0, -1, ids]
        values.append(float(scores.argmax() == row["label"]))
    assert result.values["acc"] == values
    assert sum(values) < NUM_ITEMS / 2


def chosen(suite: str, data: Path, **options: Any) -> tuple[str, ...]:
    settings = EvaluationSettings(suite=suite, num_items=20, **options)
    return select_tasks(settings, data, context_length=32, make=Progress()).names


def test_a_task_of_the_data_can_be_named_by_itself(tmp_path: Path) -> None:
    data = prepared(tmp_path, "phop_2", "chain_2")
    assert chosen("heldout", data) == ("phop_2", "chain_2")
    assert chosen("chain_2", data) == ("chain_2",)
    assert chosen("chain_2, heldout", data) == ("chain_2", "phop_2")
    settings = EvaluationSettings(suite="chain_2")
    assert lm_eval_task_fingerprints(settings, needs_accuracy=True) == {}
    with pytest.raises(UserError, match="a sweep's front needs an accuracy"):
        lm_eval_task_fingerprints(EvaluationSettings(suite="bits_per_byte"), needs_accuracy=True)
    folder = build_heldout(data, num_items=20, context_length=32).folder
    asked = TaskSelection(names=("chain_2",), heldout=folder)
    assert list(load_suite(asked, planned=()).tasks) == ["chain_2"]


def test_tasks_that_the_data_cannot_give_are_errors_before_any_work(tmp_path: Path) -> None:
    bits = {"sweep.kind": "search", "search.objective": "bits_per_byte"}
    depth, text = {"data.source": "depth", "data.depth.tasks": ("phop_2",)}, {}
    for options, reason in (
        ({**depth, "evaluation.suite": "phop_4"}, "names phop_4, which .* they can make phop_2$"),
        ({**depth, "evaluation.suite": "heldout,lastword"}, "names lastword, which the data cann"),
        ({**text, "evaluation.suite": "phop_2"}, "phop_2, which .* make lastword, bits_per_byte"),
        ({**depth, **bits}, "gives bits per byte on these data; set it to accuracy"),
    ):
        sizes = {"data.depth.length": 16, "model.context_length": 16}
        with pytest.raises(UserError, match=reason):
            plan_sweep(resolve_settings({}, options={**sizes, **options}), workspace=tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="names phop_4, which the data cannot make"):
        chosen("phop_4", prepared(tmp_path, "phop_2"))


def test_a_text_that_is_no_symbol_is_an_error(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer(prepared(tmp_path, "phop_2") / "tokenizer.json")
    for prompt in ("<|0|><|3|>", " <|0|> <|3|>\n"):
        assert tokenizer.encode_document(prompt) == (0, 1, 4)
    with pytest.raises(UserError, match=r"cannot read .*; it reads symbols such as <\|0"):
        tokenizer.encode_document("<|0|>?")
