"""Model folders of transformers: recognized, scored as lm-eval's own class scores them, refused in
one sentence where something is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from kept_progress import KeptProgress
from lm_eval_tasks import KINDS, logged_responses, write_task
from one_evaluation import evaluate_model as evaluate
from refusals import refused
from safetensors.torch import load_file, save_file
from sample_texts import add_opening

from orchestrator.evaluation.tasks import load_suite, suppress_output
from orchestrator.models.load import load_model
from orchestrator.models.open import OpenedModel, open_model
from orchestrator.pipelines.models import export_checkpoint, import_model
from orchestrator.records.evaluation import Suite
from orchestrator.records.trial import Trial
from orchestrator.reporting.model_card import ModelCard
from orchestrator.settings import EvaluationSettings
from orchestrator.sweeping.trial import measure_trial
from orchestrator.terminal.progress import Progress
from orchestrator.training.checkpoint import save_checkpoint
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace

TASKS: dict[str, dict[str, Any]] = {
    "choices": {},
    "splits": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{parts[0]}}",
        "doc_to_target": "{{parts[1]}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "opening": {
        "output_type": "loglikelihood",
        "doc_to_text": "",
        "doc_to_target": "context",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {"doc_to_target": "{{context * 12}}", "metric_list": [{"metric": "bits_per_byte"}]},
}
ROWS = [
    {"context": f"a {word} and the {word} had", "endings": [f"{word} gone", "end", "fed a dog"],
     "label": 0, "parts": parts}
    for word in ("bag", "fog", "hen", "pig", "cab", "deed")
    # One text, cut in two places: a cache of logits by text alone confuses them.
    for parts in ([f"a {word} and", " the bag had"], [f"a {word}", " and the bag had"])
]  # fmt: skip


def scored(
    model: Path | OpenedModel, settings: EvaluationSettings, workspace: Workspace, **options: Any
) -> dict[str, list[list[float]]]:
    """Return the log-likelihoods per task and item, as lm-eval's files hold them."""
    with TemporaryDirectory() as folder:
        evaluate(model, settings, workspace, log_samples=Path(folder), **options)
        (of_model,) = Path(folder).iterdir()
        return logged_responses(of_model)


def assert_alike(
    actual: dict[str, list[list[float]]],
    expected: dict[str, list[list[float]]],
    tolerance: float = 2e-3,
) -> None:
    for name, items in actual.items():
        for actual_scores, expected_scores in zip(items, expected[name], strict=True):
            assert actual_scores == pytest.approx(expected_scores, rel=1e-6, abs=tolerance), name


@pytest.fixture
def settings(tmp_path) -> EvaluationSettings:
    for name, changes in TASKS.items():
        kind = name if name in KINDS else "choices"
        folder = write_task(tmp_path / "tasks", name, ROWS, kind=kind, **changes)
    return EvaluationSettings(suite=",".join(TASKS), include_path=str(folder), batch_size=4)


def add_opening_token(folder: Path) -> None:
    """Let the folder's tokenizer put a token of its own before every text, as Llama's does."""
    add_opening(folder / "tokenizer.json")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<s>"}))


SCALED = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}


@pytest.fixture
def llama_of_kind(save_llama) -> Callable[[str], Path]:
    """A function that saves a Llama of a kind.

    Our decoder does not know the positions of the kind `transformers`.
    """
    return lambda kind: save_llama(**(SCALED if kind == "transformers" else {}))


def by_lm_eval(
    folder: Path, settings: EvaluationSettings, **options: Any
) -> dict[str, list[list[float]]]:
    """Log-likelihoods per task and item by lm-eval's class, called as its documentation says."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    suite = load_suite(Suite(tasks=tuple(TASKS), include_folder=str(settings.include_path)))
    with suppress_output():
        model = HFLM(
            pretrained=str(folder), device="cpu", batch_size=3, logits_cache=False, **options
        )
        output = evaluator.evaluate(
            lm=model, task_dict={"tasks": suite.tasks}, bootstrap_iters=0, log_samples=True
        )
    return {
        name: [
            [r[0][0] if isinstance(r[0], tuple | list) else r[0] for r in sample["resps"]]
            for sample in samples
        ]
        for name, samples in output["samples"].items()
    }


@pytest.mark.slow
def test_a_model_that_transformers_runs_scores_as_with_lm_evals_own_class_in_each_precision(
    settings, workspace, llama_of_kind
):
    folder = llama_of_kind("transformers")
    assert open_model(folder).config is None
    weights = load_file(folder / "model.safetensors")
    halves = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    ours = {
        precision: scored(folder, settings.model_copy(update={"precision": precision}), workspace)
        for precision in ("fp32", "bf16", None)
    }
    assert_alike(ours["fp32"], by_lm_eval(folder, settings, dtype="float32"), 1e-4)
    assert ours[None] == ours["fp32"], "on a CPU"
    with pytest.raises(AssertionError):
        assert_alike(ours["fp32"], ours["bf16"], 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["opens every text", "names a first token"])
def test_a_llama_its_import_and_its_export_score_as_with_lm_evals_own_class(
    kind, settings, workspace, tokenizer_path, save_llama, tmp_path
):
    folder = save_llama()
    add_opening_token(folder)
    if kind == "names a first token":  # Such a tokenizer puts it before texts without context only.
        shutil.copy(tokenizer_path, folder / "tokenizer.json")
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "a"}))
    assert open_model(folder).config is not None, "a decoder runs it"
    theirs = by_lm_eval(folder, settings)
    checkpoint = import_model(folder, workspace=workspace)
    decoder = load_model(checkpoint)
    card = ModelCard(name="tiny", config=decoder.config)
    exported = export_checkpoint(checkpoint, tmp_path / "exported", decoder=decoder, card=card)
    for place in (folder, checkpoint, exported):
        ours = evaluate(place, settings, workspace)
        assert_alike(scored(place, settings, workspace), theirs)
    # A sweep measures students by the tokenizer of the model that they were made from, also where
    # their own folders do not say that it opens a text.
    student = save_checkpoint(
        workspace.trials / "k",
        1,
        config=decoder.config,
        weights=decoder.state_dict(),
        training_state={},
        tokenizer_path=checkpoint / "tokenizer.json",
        provenance={"tokens": tokenizer_path.parent.name},
    )
    suite = Suite(
        tokens_folder=str(tokenizer_path.parent),
        tasks=tuple(TASKS),
        include_folder=settings.include_path or "",
        batch_size=4,
        vocabulary_folder=str(checkpoint),
    )
    trial = Trial(
        key="k", role="trial", model=decoder.config, suite=suite, checkpoint=str(student),
        folder=str(workspace.trials / "k"),
    )  # fmt: skip
    quality = measure_trial(trial, "cpu", Progress()).numbers
    assert quality["quality/accuracy"] == pytest.approx(ours.accuracy)
    expected = pytest.approx(ours.quality()["bits_per_byte"], rel=1e-6)
    assert quality["quality/bits_per_byte"] == expected


@pytest.fixture
def folder(save_llama) -> Path:
    return save_llama()


def test_held_out_tasks_of_a_folder_come_from_the_newest_tokens(folder, workspace, tiny_tokens):
    with pytest.raises(UserError, match="iiet-orch prepare"):
        evaluate(folder, EvaluationSettings(), workspace)
    (workspace.tokens / "older").mkdir(parents=True)
    older = shutil.copy(tiny_tokens / "manifest.json", workspace.tokens / "older")
    os.utime(older, (1, 1))
    shutil.copytree(tiny_tokens, workspace.tokens / "newer")
    progress = KeptProgress()
    # These tokens are read: the made-up text is too poor, and the others would be damaged.
    with refused(UserError, "held-out documents", "no test items"):
        evaluate(folder, EvaluationSettings(), workspace, progress=progress)
    assert progress.notes[0].endswith("the tokens newer")


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def with_code(folder: Path, code: str = "raise SystemExit('code of the folder ran')\n") -> None:
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    change(folder, model_type="own", architectures=["Own"], auto_map=auto_map)
    (folder / "own.py").write_text(code)


def test_what_is_missing_is_named(folder, settings, workspace):
    weights = folder / "model.safetensors"
    complete_file = weights.read_bytes()
    tensors = load_file(weights)

    def refused(complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            evaluate(folder, settings, workspace)
        assert not list(workspace.evaluations.glob("*"))

    weights.write_bytes(complete_file[:-100])
    refused("cannot read .*model.safetensors")
    weights.unlink()
    refused("no weights beside it")
    save_file(
        {name: w for name, w in tensors.items() if not name.endswith("q_proj.weight")},
        weights,
        metadata={"format": "pt"},
    )
    change(folder, **SCALED)
    refused("q_proj.weight and 1 more missing")
    weights.write_bytes(complete_file)
    with_code(folder)
    refused("--trust-remote-code runs it")
    change(folder, model_type="llama", auto_map=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused("cannot load a tokenizer")


@pytest.mark.parametrize("kind", ["decoder", "transformers"])
def test_progress_is_told_within_a_task(kind, settings, workspace, llama_of_kind):
    folder = llama_of_kind(kind)
    progress = KeptProgress()
    evaluate(folder, settings, workspace, progress=progress)
    assert progress.done == sorted(progress.done)
    assert progress.done[-1] == 12 * len(TASKS)
    assert any(0 < num_done < 12 for num_done in progress.done), progress.done
    assert all(isinstance(num_done, int) for num_done in progress.done), progress.done


@pytest.mark.slow
def test_trusted_code_of_a_folder_runs(folder, settings, workspace, monkeypatch, tmp_path):
    from transformers import dynamic_module_utils

    modules = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr("sys.path", [*sys.path, str(modules)])
    plain = scored(folder, settings, workspace)
    with_code(
        folder,
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class Config(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n",
    )
    model = open_model(folder)
    assert (model.architecture, model.config) == ("own", None)
    assert_alike(plain, scored(folder, settings, workspace, trust_remote_code=True))
