"""Whole sweeps on a cluster of pretended GPUs, whose head has none.

The commands run where initializing CUDA is an error: trials, and all that needs a device, reserve a
GPU by Ray. One trial fits on one GPU, so two run side by side.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import settings_options
from pretended_cluster import pretended_cluster
from small_size import SMALL

from orchestrator.records.trial import SweepTrials

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("gpus")]  # One workspace for all.

COMMAND = """
import sys
import torch

def refuse():
    raise AssertionError("this process initializes CUDA")

torch.cuda.is_available = lambda: True
torch.cuda._lazy_init = refuse
from orchestrator.cli import main
sys.exit(main(sys.argv[1:]))
"""

ASSIGNMENTS = [
    *SMALL, "data.source=python", "data.tokenizer=train", "model.preset=tiny",
    "cluster.num_gpus=2", "sweep.iterations=[2]", "evaluation.limit=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with pretended_cluster() as variables:
        yield variables


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("gpus")


def run(command: str, workspace: Path, environment: dict[str, str], *more: str) -> str:
    """Run a command with CUDA forbidden, and return its log."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", COMMAND, command, "--workspace", str(workspace)),
            *settings_options(ASSIGNMENTS, command),
            *more,
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    [log] = (workspace / "logs").glob(f"*-{command}-*.log")
    return log.read_text()


def tasks(log: str) -> list[str]:
    """Return the modules of the functions that were tasks on one GPU each."""
    modules = re.findall(r"orchestrator\.(\S+)\.\w+ runs on GPU [01] of \S+, process \d+", log)
    assert len(modules) == log.count(" runs on ")
    return list(modules)


def precisions(workspace: Path) -> set[str]:
    """Return the precisions of all trials: of training, and of measuring."""
    plans = [SweepTrials.read(path) for path in workspace.glob("sweeps/*/plan.json")]
    trials = [trial for plan in plans if plan for trial in plan.trials]
    trained = {trial.job.recipe.precision for trial in trials if trial.job}
    return trained | {trial.suite.precision for trial in trials}


def test_models_are_trained_and_measured_on_reserved_gpus(workspace, environment):
    log = run("sweep-iterations", workspace, environment)
    assert "jobs_at_once=2, workers=1, cpus=2, gpus=1.0" in log
    assert tasks(log) == ["sweeping.costs"]

    log = run("sweep-threshold", workspace, environment)
    assert "jobs_at_once=2, workers=1, cpus=2, gpus=1.0" in log
    assert tasks(log) == ["pipelines.influence", "sweeping.costs"]
    assert precisions(workspace) == {"bf16"}


@pytest.mark.parametrize(
    ("command", "options", "module"),
    [
        ("evaluate", ("--set", "evaluation.limit=4"), "pipelines.evaluating"),
        ("influence", ("--metric", "relative"), "pipelines.influence"),
    ],
)
def test_a_model_is_measured_on_a_reserved_gpu(workspace, environment, command, options, module):
    assert tasks(run(command, workspace, environment, *options)) == [module]
