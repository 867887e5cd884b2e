"""docs/troubleshooting.md quotes the program: each command of the page is run, and prints the text.

Texts without a command need a GPU, a training or a signal; the code that prints them is called.
"""

from __future__ import annotations

import errno
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from documented import FENCE, ROOT

from orchestrator import cli
from orchestrator.cluster.nodes import check_shared_memory
from orchestrator.evaluation.transformers_model import load_transformers_model
from orchestrator.pipelines.sweeps import raise_failures
from orchestrator.pipelines.syncing import sync
from orchestrator.planning.estimate import out_of_memory_explained
from orchestrator.records.tracked_run import TrackedRun
from orchestrator.terminal.stop import interruption_text
from orchestrator.tracking import NOTE_TAG, open_tracking
from orchestrator.training.devices import World, check_precision
from orchestrator.training.trainer import run_job
from orchestrator.workspace.errors import Interrupted
from orchestrator.workspace.layout import open_workspace

TEXT = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ENTRIES = dict(re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", TEXT, flags=re.DOTALL | re.MULTILINE))
GIB = 2**30
CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB of "
    "which 1.50 GiB is free. Including non-PyTorch memory, this process has 77.6 GiB memory in use."
)


def block_of(entry: str, language: str) -> str:
    """Return the only block of a language in an entry, or an empty text."""
    found = [block for _, name, block in FENCE.findall(ENTRIES[entry]) if name == language]
    assert len(found) <= 1
    return found[0] if found else ""


COMMANDS = {entry: line for entry in ENTRIES if (line := block_of(entry, "bash").strip())}


def assert_printed(entry: str, output: str) -> None:
    """Compare without spaces, because terminals break lines; `…` stands for any text."""
    parts = re.split("…", "".join(block_of(entry, "text").split()))
    assert any(len(part) > 10 for part in parts)
    assert re.search(".*?".join(map(re.escape, parts)), "".join(output.split())), output


def without_space(_: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full when tokens are written."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("orchestrator.pipelines.training.prepare", fail)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


PREPARED: dict[str, Callable[[Path, pytest.MonkeyPatch], Any]] = {
    "The workspace is of another version": lambda folder, _: write(
        folder / "iiet-workspace/workspace.json", '{"recipe_version": 1}'
    ),
    "A file of the workspace is damaged": lambda folder, _: write(
        folder / "iiet-workspace/runs/broken/step_00000010/config.json", "{"
    ),
    "The disk is full": without_space,
    "A folder has no text": lambda folder, _: (folder / "my-texts").mkdir(),
    "The field with the text has another name": lambda folder, _: write(
        folder / "articles.jsonl", json.dumps({"title": "A", "body": "B"}) + "\n"
    ),
    "There is too little text": lambda folder, _: write(folder / "short.txt", "Only this. " * 20),
    "The hub is not reachable": lambda _, patch: patch.setenv("HF_HUB_OFFLINE", "1"),
    "A model does not fit into memory": lambda _, patch: patch.setattr(
        "orchestrator.planning.machine.free_memory", lambda: 4 * GIB
    ),
    "MLflow does not answer": lambda _, patch: patch.setenv(
        "MLFLOW_TRACKING_URI", "http://127.0.0.1:1"
    ),
}
"""What makes a command fail, where an empty folder does not."""
OWN_PROCESS = {"Ray does not answer"}
"""A process of the tests may have joined a Ray already."""


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=[pytest.mark.slow] if entry in OWN_PROCESS else [])
        for entry in COMMANDS
    ],
)
def test_a_command_prints_the_text(
    entry: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if entry.startswith("No GPU") and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    for variable in ("IIET_WORKSPACE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    PREPARED.get(entry, lambda *_: None)(tmp_path, monkeypatch)
    words = shlex.split(COMMANDS[entry])[1:]
    if entry in OWN_PROCESS:
        command = [sys.executable, "-m", "orchestrator.cli", *words]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
        code, printed = ended.returncode, ended.stderr
    else:
        code = cli.main(words)
        printed = capsys.readouterr().err
    assert code == (1 if entry in ("The disk is full", "MLflow does not answer") else 2)
    assert_printed(entry, printed)


def raise_interrupted() -> None:
    raise Interrupted(interruption_text("saved at step 40"))


def needs_code(folder: Path, tokens: Path) -> None:
    """Load a model whose class is in a file beside it."""
    write(folder / "tokenizer.json", (tokens / "tokenizer.json").read_text())
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    write(folder / "tokenizer_config.json", json.dumps(described))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    write(folder / "config.json", json.dumps({"model_type": "own", "auto_map": auto_map}))
    load_transformers_model(folder, device="cpu", batch_size=1)


def diverge(job: Callable[..., Any]) -> None:
    run_job(job(num_steps=20, learning_rate=1e30, warmup_steps=0))


def run_out_of_memory(job: Callable[..., Any]) -> None:
    with out_of_memory_explained(job(), World(device="cuda:0")):
        raise torch.OutOfMemoryError(CUDA_MESSAGE)


def sync_after_a_move(folder: Path) -> None:
    tracking = open_tracking(open_workspace(folder))
    run = TrackedRun(key="k", kind="pretrain", name="teacher")
    tracking.publish(run)
    run_id = tracking.run_id(run)
    assert run_id
    tracking.store.connect().set_tag(run_id, NOTE_TAG, "the one to use")
    sync(workspace=folder.rename(folder.with_name("elsewhere")))


RAISED: dict[str, Callable[[Callable[..., Any], Path, Path], Any]] = {
    "A training runs out of GPU memory": lambda job, *_: run_out_of_memory(job),
    "A GPU has no bfloat16": lambda *_: check_precision(
        "bf16", "cuda:0", section="training", capability=lambda _: (7, 5)
    ),
    "Shared memory of a container is too small": lambda *_: check_shared_memory(
        200 * 2**20, 64 * 2**20
    ),
    "The loss is not finite": lambda job, *_: diverge(job),
    "Ctrl-C": lambda *_: raise_interrupted(),
    "Some trials failed": lambda *_: raise_failures({"2,1": "it diverged", "1,0": "it diverged"}),
    "MLflow's database was copied or moved": lambda _, folder, *__: sync_after_a_move(folder),
    "A model needs its own code": lambda _, folder, tokens: needs_code(folder, tokens),
}
"""What raises the error of an entry without a command."""


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry not in COMMANDS])
def test_the_code_raises_the_text(
    entry: str,
    tiny_job: Callable[..., Any],
    tiny_tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", raising=False)
    with pytest.raises((ValueError, RuntimeError, Interrupted)) as caught:
        RAISED[entry](tiny_job, tmp_path / "model", tiny_tokens)
    assert_printed(entry, str(caught.value))
