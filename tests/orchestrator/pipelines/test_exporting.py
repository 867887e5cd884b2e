"""An exported folder stands on its own: the stock lm_eval gives the numbers of our `evaluate`."""

from __future__ import annotations

import hashlib
import json
import os
import random
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_without
from huggingface_hub import ModelCard as HubCard
from installed_package import install, on_path
from lm_eval_tasks import write_task
from one_evaluation import evaluate_model
from refusals import refused
from safetensors.torch import load_file
from stored_texts import assert_as_stored

from iiet.decoder import Decoder
from iiet.iiad.pruning import InfluenceTable
from iiet.model.config import ModelConfig
from iiet.model.schedule import IterationSchedule
from orchestrator.models.folder import MANIFEST, weights_key, weights_precision
from orchestrator.models.load import load_model
from orchestrator.pipelines.models import (
    CARD,
    export,
    export_checkpoint,
    import_model,
)
from orchestrator.records.evaluation import EvaluationResult, TaskResult
from orchestrator.reporting.model_card import REQUIREMENTS, ModelCard
from orchestrator.settings import EvaluationSettings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError

STOCK = """
import functools, sys

snippet = open("README.md").read().split("```python")[1].split("```")[0]
exec(snippet)  # Whoever reads the card runs this, and should meet no question.

import lm_eval.evaluator, lm_eval.tasks
from lm_eval.__main__ import cli_evaluate

# To read all tasks that come with it takes longer than everything else.
lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
cli_evaluate()
"""


@pytest.fixture
def checkpoint(tmp_path, save_tiny) -> Path:
    return save_tiny(tmp_path / "run", initializer_std=0.3, context_length=64)


def exported(checkpoint: Path, folder: Path, evaluation: EvaluationResult | None = None) -> Path:
    decoder = load_model(checkpoint)
    weights = {"weights": weights_key(checkpoint)}
    card = ModelCard(name="tiny", config=decoder.config, provenance=weights, evaluation=evaluation)
    return export_checkpoint(checkpoint, folder, decoder=decoder, card=card)


def test_every_file_has_the_mode_of_the_umask(tmp_path, save_tiny):
    before = os.umask(0o027)
    try:
        checkpoint = save_tiny(tmp_path / "run")
        folder = exported(checkpoint, tmp_path / "model")
    finally:
        os.umask(before)
    modes = {
        file.relative_to(tmp_path): oct(file.stat().st_mode & 0o777)
        for part in (checkpoint, folder)
        for file in part.iterdir()
    }
    assert modes == dict.fromkeys(modes, "0o640")


@pytest.mark.slow
def test_stock_lm_eval_gives_our_numbers(checkpoint, workspace, tmp_path):
    draw = random.Random(1)

    def words(count: int) -> str:
        return " ".join("".join(draw.choice("abcdefgh") for _ in range(4)) for _ in range(count))

    rows = [
        {"context": words(3), "endings": [" " + words(n) for n in (1, 2, 1)], "label": number % 3}
        for number in range(40)
    ]
    tasks = write_task(tmp_path / "tasks", "choices", rows)
    write_task(tasks, "rolling", [{"text": words(30)} for _ in range(5)])
    settings = EvaluationSettings(suite="choices,rolling", include_path=str(tasks))
    ours = evaluate_model(checkpoint, settings, workspace)
    folder = exported(checkpoint, tmp_path / "a model", ours)
    options = {
        "--model": "hf",
        "--model_args": f"pretrained={folder},trust_remote_code=True",
        "--tasks": "choices,rolling",
        "--include_path": str(tasks),
        "--output_path": str(tmp_path / "found"),
        "--device": "cpu",
    }
    words = (word for option in options.items() for word in option)
    printed = run_without(("iiet", "orchestrator"), STOCK, *words, folder=folder)
    assert "[y/N]" not in printed
    file = next((tmp_path / "found").rglob("results_*.json"))
    theirs = json.loads(file.read_text())["results"]
    for task, metrics in ours.metrics_by_task.items():
        for name, value in metrics.items():
            if not name.endswith("_stderr"):
                assert theirs[task][f"{name},none"] == pytest.approx(value, rel=1e-5), (task, name)
    assert theirs["choices"]["acc_stderr,none"] == pytest.approx(
        ours.metrics_by_task["choices"]["acc_stderr"], rel=1e-5
    )
    card = (folder / CARD).read_text()
    assert f"| choices | acc | {ours.metrics_by_task['choices']['acc']:.4f} |" in card


def test_an_earlier_export_is_replaced_and_nothing_else(checkpoint, tmp_path):
    folder = exported(checkpoint, tmp_path / "out")
    # The manifest is one that sha256sum reads.
    lines = [line.split("  ") for line in (folder / MANIFEST).read_text().splitlines()]
    assert {name for _, name in lines} == {p.name for p in folder.iterdir()} - {MANIFEST}
    for digest, name in lines:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    exported(checkpoint, folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    with refused(UserError, "export"):
        exported(checkpoint, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]
    for name in ("notes.md", "results/table.csv", CARD):
        users_file = folder / name
        users_file.parent.mkdir(exist_ok=True)
        users_file.write_text("an afternoon's work")
        with refused(UserError, name.split("/")[0]):
            exported(checkpoint, folder)
        assert users_file.read_text() == "an afternoon's work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out", "run"]


def test_an_export_of_another_model_is_replaced_only_if_asked_to(
    checkpoint, save_tiny, workspace, tmp_path
):
    other = save_tiny(tmp_path / "other", initializer_std=0.1)
    options: dict[str, Any] = {"workspace": workspace, "to": tmp_path / "out", "measure": False}
    for _ in range(2):
        export(checkpoint, **options)
    for other_model in ({"model": other}, {"model": checkpoint, "schedule": "1,0"}):
        with refused(UserError, "out", "--force", "--to"):
            export(**options, **other_model)
    assert load_model(tmp_path / "out").config == load_model(checkpoint).config
    export(other, force=True, **options)
    assert load_model(tmp_path / "out").config == load_model(other).config
    (tmp_path / "out" / "README.md").unlink()  # Nothing says then whose weights these are.
    with refused(UserError, "out"):
        export(other, **options)


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(
    checkpoint, workspace, tmp_path
):
    class Silent(Progress):
        def note(self, text: str) -> None:
            pytest.fail(f"it was measured: {text}")

    (tmp_path / "a file").touch()
    before = sorted(tmp_path.rglob("*"))
    options: dict[str, Any] = {"workspace": workspace, "model": checkpoint, "progress": Silent()}
    for to in ("/proc/x/y", "a file/x", 300 * "x"):
        with refused(UserError, "--to"):
            export(to=tmp_path / to, **options)
    with pytest.raises(UserError, match="--schedule"):
        export(schedule="1,1,1", **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_method_without_code_for_transformers_is_refused(tmp_path, tiny_model):
    code = "from iiet.methods import METHODS\n\nclass Local(METHODS['iiet']):\n    pass\n"
    site = tmp_path / "site"
    install(site, {"methods_here": code}, {"iiet.methods": {"local": "methods_here:Local"}})
    with on_path(site):
        decoder = Decoder(ModelConfig.from_dict({**tiny_model, "method": "local"}))
        card = ModelCard(name="local", config=decoder.config)
        with refused(UserError, "'local'", "modeling_file"):
            export_checkpoint(tmp_path / "none", tmp_path / "out", decoder=decoder, card=card)
    assert list(tmp_path.iterdir()) == [site]


# The type of the weights, and the schedule


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_folder_has_the_schedule_and_the_type_that_were_asked_for(
    checkpoint, workspace, tmp_path
):
    options: dict[str, Any] = {"workspace": workspace, "model": checkpoint, "measure": False}
    unchanged = export(to=tmp_path / "own", **options)
    rounded = export(to=tmp_path / "cheap", schedule="1,0", dtype="bf16", **options)
    assert {weights.dtype for weights in stored(unchanged).values()} == {torch.float32}
    for name, weights in stored(rounded).items():
        assert torch.equal(weights, stored(unchanged)[name].to(weights.dtype)), name
    assert weights_precision(rounded) == "bf16"
    assert json.loads((rounded / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(rounded).config.corrections == (1, 0)
    assert "bf16" in (rounded / CARD).read_text()


def test_a_plain_model_is_exported_without_a_schedule(save_tiny, workspace, tmp_path):
    plain = save_tiny(tmp_path / "plain", method="vanilla", schedule=None)
    folder = export(to=tmp_path / "own", model=plain, workspace=workspace, measure=False)
    assert "no corrections" in (folder / CARD).read_text()
    assert load_model(folder).config.schedule is None


def test_an_import_is_exported_in_the_type_of_its_files(save_llama, workspace, tmp_path):
    source = save_llama(dtype="bfloat16")
    checkpoint = import_model(source, workspace=workspace)
    options: dict[str, Any] = {"workspace": workspace, "model": checkpoint, "measure": False}
    for name, weights in stored(export(to=tmp_path / "again", **options)).items():
        assert torch.equal(weights, stored(source)[name]), name
    wide = stored(export(to=tmp_path / "wide", dtype="fp32", **options))
    assert {weights.dtype for weights in wide.values()} == {torch.float32}


def test_weights_that_a_type_cannot_hold_are_refused(save_tiny, workspace, tmp_path):
    large = save_tiny(tmp_path / "large", initializer_std=1e5)
    with pytest.raises(UserError, match="--dtype fp16"):
        export(large, workspace=workspace, measure=False, dtype="fp16", to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The card


def test_cards_read_as_stored(tiny_model, tmp_path):
    config = ModelConfig.from_dict(tiny_model)
    family = [config.corrections, IterationSchedule((1, 0)), IterationSchedule((0, 0))]
    result = TaskResult(name="choices", version="1", metrics={"acc": 0.5})
    plain = ModelCard(name="tiny", config=config)
    measured = replace(plain, evaluation=EvaluationResult(results={"choices": result}))
    cards = {
        "elastic weights": replace(plain, served=family),
        "measured weights": measured,
        "rounded weights": replace(measured, dtype="bf16", is_rounded=True),
        "a student": ModelCard(
            name="student",
            config=replace(config, schedule=IterationSchedule((1, 0))),
            full=config,
            influence=InfluenceTable("cosine", ((0.3, 0.1), (0.2,)), ((0.0, 0.0), (0.0,)), 64),
            provenance={"teacher": "abc", "recipe": {"num_steps": 7}, "checksums": {"x": "y"}},
            base_model="owner/plain",
            license="apache-2.0",
            datasets=["owner/texts"],
        ),
    }
    parts = {name: card.to_markdown().splitlines() for name, card in cards.items()}
    assert_as_stored("card.txt", parts, tmp_path)


def test_the_hub_reads_the_quality_of_a_card(tiny_model):
    metrics = {"acc": 0.5, "acc_stderr": 0.1}
    result = TaskResult(name="choices", version="1", metrics=metrics)
    evaluation = EvaluationResult(results={"choices": result})
    card = ModelCard(name="tiny", config=ModelConfig.from_dict(tiny_model), evaluation=evaluation)
    metadata = HubCard(card.to_markdown()).data
    assert metadata.license is None, "nobody said one"
    [read] = metadata.eval_results
    assert (read.dataset_name, read.metric_type, read.metric_value) == ("choices", "acc", 0.5)


def test_the_card_names_the_versions_that_this_project_declares():
    file = Path(__file__).parents[3] / "pyproject.toml"
    declared = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    assert set(REQUIREMENTS) <= set(declared)
