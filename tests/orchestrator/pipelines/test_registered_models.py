"""A model that `pick` registered loads with transformers, in a process without this package."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_without
from documented import ROOT, blocks
from sample_trials import sample_trial
from terminal import run_in_terminal

from orchestrator.evaluation.answers import Sampling
from orchestrator.models.folder import MANIFEST, TOKENIZER
from orchestrator.models.load import load_model
from orchestrator.models.open import open_model
from orchestrator.models.tokenizer import load_tokenizer
from orchestrator.pipelines.generating import TextGenerator
from orchestrator.pipelines.models import pick
from orchestrator.reporting.results import StoredSweep
from orchestrator.workspace.layout import Workspace, open_workspace
from orchestrator.workspace.provenance import file_digest

pytestmark = pytest.mark.slow

PROMPT = "abc def"
READ = """
import json, sys
import mlflow
from transformers import AutoModelForCausalLM, AutoTokenizer

read = {}
for name in sys.argv[2:]:
    folder = mlflow.artifacts.download_artifacts(f"models:/{name}")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    tokens = tokenizer(sys.argv[1], return_tensors="pt")
    logits = model(**tokens).logits.flatten().tolist()
    output = model.generate(**tokens, max_new_tokens=5, do_sample=False)[0]
    added = output[tokens.input_ids.shape[1] :]
    text = tokenizer.decode(added, skip_special_tokens=True)
    read[name] = {"folder": folder, "logits": logits, "text": text}
print(json.dumps(read))
"""
Environment = Callable[[Path], Mapping[str, str]]


@pytest.fixture
def checkpoints(tmp_path, save_tiny) -> dict[str, Path]:
    """The checkpoints of two models in a workspace, by the names that they are registered by."""
    workspace = open_workspace(tmp_path / "workspace")

    def checkpoint(name: str, **changed: Any) -> Path:
        return save_tiny(workspace.runs / name, **changed)

    full = checkpoint("full")
    plain = checkpoint("plain", method="vanilla", schedule=None)
    results = (
        sample_trial(
            key="full", schedule=(2, 1), cost={"evaluations": 5}, quality={"accuracy": 0.5},
            checkpoint=str(full),
        ),
        sample_trial(
            key="plain", method="vanilla", schedule=(0, 0), cost={"evaluations": 2},
            quality={"accuracy": 0.4}, checkpoint=str(plain),
        ),
    )  # fmt: skip
    StoredSweep(name="two", key="two-key", results=results).store(workspace)
    for rule in ("best", "cheapest"):
        pick(workspace=workspace, **{rule: True})
    return {"iiet-2x16@best": full, "vanilla-2x16@cheapest": plain}


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """The environment of a process that has the store, and not this package's path."""
    without_path = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    database = Workspace(tmp_path / "workspace").database
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{database}"}
    return {**without_path, **store}


def test_a_clean_process_loads_registered_models_with_transformers(
    checkpoints, environment, tmp_path
):
    hidden = ("iiet", "orchestrator")
    printed = run_without(
        hidden, READ, PROMPT, *checkpoints, folder=tmp_path, environment=environment
    )
    answers = json.loads(printed.splitlines()[-1])
    for name, checkpoint in checkpoints.items():
        ids = load_tokenizer(checkpoint / TOKENIZER).encode(PROMPT).ids
        with torch.no_grad():
            expected = load_model(checkpoint)(torch.tensor([ids])).flatten()
        torch.testing.assert_close(torch.tensor(answers[name]["logits"]), expected)
        sampling = Sampling(max_new_tokens=5, temperature=0.0)
        assert answers[name]["text"] == "".join(
            TextGenerator(open_model(checkpoint)).stream(PROMPT, sampling)
        )
        folder = Path(answers[name]["folder"])
        digests = [line.split("  ") for line in (folder / MANIFEST).read_text().splitlines()]
        assert digests
        assert all(file_digest(folder / file) == digest for digest, file in digests)


@pytest.mark.long
def test_the_python_of_the_page_asks_nothing(checkpoints, environment, tmp_path):
    (snippet,) = blocks(ROOT / "docs" / "models.md", "python")
    for written, used in (
        ("iiet-tiny", "iiet-2x16"),
        ("sqlite:///iiet-workspace", f"sqlite:///{tmp_path / 'workspace'}"),
        ("The function returns", "abc"),  # The model's context is short.
        ("max_new_tokens=40", "max_new_tokens=5"),
    ):
        assert written in snippet
        snippet = snippet.replace(written, used)
    command = [sys.executable, "-c", snippet]
    code, printed = run_in_terminal(command, tmp_path, environment)
    assert code == 0, printed
