"""How many nodes a command gets, and how large ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator.cluster.deployment import Deployment
from orchestrator.pipelines.manifests import COMMAND_BYTES, plan_deployment
from orchestrator.pipelines.training_dry_runs import plan_pretrain
from orchestrator.settings import read_settings


def plan(*changes: str, config: str | None = None, **nodes: Any) -> Deployment:
    options: dict[str, Any] = {"gpus_per_node": 8, "cpus_per_node": 64}
    settings = read_settings(config, list(changes))
    workspace = Path("/shared/iiet")
    return plan_deployment(["pretrain"], settings, workspace=workspace, **options | nodes)


@pytest.mark.parametrize(
    ("num_gpus", "gpus_per_node", "nodes"),
    [(1, 8, (1, 1)), (8, 8, (1, 8)), (32, 8, (4, 8)), (6, 2, (3, 2))],
)
def test_gpus_are_spread_over_whole_nodes(
    num_gpus: int, gpus_per_node: int, nodes: tuple[int, int]
) -> None:
    size = "training.num_tokens_per_step=49152"  # Shared evenly by all of these.
    found = plan(f"cluster.num_gpus={num_gpus}", size, gpus_per_node=gpus_per_node)
    assert (found.num_nodes, found.gpus_per_node) == nodes


def test_workers_on_cpus_share_a_node() -> None:
    found = plan("cluster.num_workers=2")
    assert (found.num_nodes, found.gpus_per_node) == (1, 0)
    workers = plan_pretrain(read_settings(None, ["cluster.num_workers=2"]), workspace=".").training
    assert found.memory_bytes == COMMAND_BYTES + 2 * workers.worker_bytes


def test_the_command_waits_for_nodes_that_start_later() -> None:
    assert plan().words == ("iiet-orch", "pretrain")
    assert plan("cluster.num_gpus=1").words[-1] == "cluster.wait_for_gpus=true"


def test_memory_grows_with_the_model_and_with_the_gpus_of_a_node() -> None:
    small, more, larger = (
        plan(f"cluster.num_gpus={gpus}", f"model.preset={preset}", config="paper-340m").memory_bytes
        for preset, gpus in (("55m", 1), ("55m", 8), ("340m", 8))
    )
    assert 2**30 < small < more < larger < 200 * 2**30
