"""A command that joins a cluster finds good nodes, and refuses others: nodes of one machine.

Nodes that cannot be used are real ones: one has other code, one lives in a mount namespace in which
the workspace is an empty file system.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pretended_cluster import run_driver

ROOT = Path(__file__).resolve().parents[2]
SECRET = "abcdefgh-not-a-real-token"

DRIVER = """
import json, os, pathlib, subprocess, sys, time
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 32)
import orchestrator.cluster  # sets what Ray reads when it is imported
import ray
from ray.cluster_utils import Cluster

from orchestrator.cluster.ray import ray_cluster
from orchestrator.settings import ClusterSettings
from orchestrator.workspace.errors import RunFailed, UserError

folder = pathlib.Path(sys.argv[1])
other_code, secret, may_mount = sys.argv[2:]
small = {"object_store_memory": 80 * 2**20, "num_cpus": 1}
head = {**small, "num_cpus": 0, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
# Variables of the command; the nodes are started without them.
new = {"HF_TOKEN": secret, "NCCL_A": "1", "NOT_NAMED": "1", "IIET_PRETENDED_GPUS": "1"}


def look():
    error = str(RunFailed("the hub refused " + os.environ["HF_TOKEN"]))
    return [os.environ.get(name) for name in (*new, "NCCL_B")], error


def join():
    settings = ClusterSettings(address=cluster.address, env=("NCCL_*", "HF_TOKEN", "NCCL_B=2"))
    os.environ.update(new)
    try:
        with ray_cluster(settings, folder=folder):
            ids = [n["NodeID"] for n in ray.nodes() if n["Alive"] and "CPU" in n["Resources"]]
            pinned = [ray.remote(label_selector={"ray.io/node-id": id})(look) for id in ids]
            return ray.get([task.remote() for task in pinned])
    except UserError as error:
        return str(error)
    finally:
        for name in new:
            os.environ.pop(name)


def wait_for(num_nodes):
    while len(cluster.global_state._live_node_ids()) != num_nodes:
        time.sleep(0.2)


report = {}
try:
    report["no nodes yet"] = join()
    cluster.add_node(**small)
    program = "import sys; from orchestrator.cluster.ray import ray_cluster; " + (
        "from orchestrator.settings import ClusterSettings; "
        "ray_cluster(ClusterSettings(address=sys.argv[1])).__enter__()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, cluster.address],
        env={**os.environ, "RAY_AUTH_TOKEN": "b" * 32}, capture_output=True, text=True,
    )
    report["token"] = done.stderr
    node = cluster.add_node(**small)
    report["good"] = join()
    report["left over"] = [path.name for path in folder.iterdir()]
    cluster.remove_node(node)
    wait_for(2)
    options = ["--address", cluster.address, "--steps", "2", "--verbose"]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli", "pretrain", "-w", str(folder), *options],
        env={**os.environ, **new}, capture_output=True, text=True,
    )
    report["command"] = [done.returncode, done.stdout + done.stderr]
    node = cluster.add_node(**small, env_vars={"PYTHONPATH": other_code})
    report["code"] = join()
    cluster.remove_node(node)
    wait_for(2)
    if may_mount:
        start = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--address", cluster.address,
            "--num-cpus=1", "--object-store-memory=83886080", "--block",
        ]
        script = 'mount -t tmpfs none "$0" && exec "$@"'
        elsewhere = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script, str(folder), *start],
            stdout=subprocess.DEVNULL,
        )
        wait_for(3)
        report["workspace"] = join()
        elsewhere.terminate()
        elsewhere.wait()
finally:
    cluster.shutdown()
print(json.dumps(report))
"""


@pytest.mark.long
def test_a_command_finds_its_variables_on_good_nodes_and_refuses_others(tmp_path):
    other_code = tmp_path / "code"
    space = tmp_path / "space"
    for package in ("iiet", "orchestrator"):
        shutil.copytree(ROOT / package, other_code / package)
    with (other_code / "iiet" / "cost.py").open("a", encoding="utf-8") as file:
        file.write("# another version\n")
    space.mkdir()
    may_mount = subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0
    words = str(space), str(other_code), SECRET, "mount" if may_mount else ""
    variables = {"PYTHONPATH": str(ROOT)}
    printed = run_driver(DRIVER, *words, timeout=400, in_scratch=True, variables=variables)
    report: dict[str, Any] = json.loads(printed.splitlines()[-1])

    assert report["no nodes yet"] == [], "a cluster whose nodes come later is joined"
    assert report["good"] == [[[SECRET, "1", None, "1", "2"], "the hub refused ***"]] * 2
    assert report["left over"] == []
    assert "RAY_AUTH_MODE=token" in report["token"]
    # Mount namespaces need permissions that a process may lack.
    elsewhere = report.get("workspace", "does not see what this machine writes in --workspace")
    assert "does not see what this machine writes in" in elsewhere
    assert "--workspace" in elsewhere
    assert "the code of iiet-orch: " in report["code"]
    assert "install the same on all nodes" in report["code"]
    code, output = report["command"]
    assert code == 0, output
    assert SECRET not in output
    files = [path for path in space.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
