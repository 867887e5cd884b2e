"""Parts of text are tokenized on all nodes of a cluster, to the tokens of one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from pretended_cluster import run_driver
from pretended_ray import idle_ray
from sample_texts import lines_of

from orchestrator.cluster.task import part_runner
from orchestrator.data.store import open_tokens, verify_data
from orchestrator.data.tokenize import write_text
from orchestrator.planning.machine import Node
from orchestrator.settings import ClusterSettings, DataSettings
from orchestrator.terminal.progress import Progress

TEXTS = [f"Document {i} tells that {i * 7} birds flew over the sea." for i in range(300)]

DRIVER = """
import json, os, sys, time
from pathlib import Path
import orchestrator.cluster  # sets what Ray reads when it is imported
from ray.cluster_utils import Cluster
from orchestrator.cluster import nodes as checks, task
from orchestrator.data import text
from orchestrator.pipelines.training import prepare
from orchestrator.settings import resolve_settings
from orchestrator.terminal.progress import Progress
from orchestrator.workspace.errors import UserError

folder = Path(sys.argv[1])
files = sys.argv[2]
small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
nodes = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
for _ in range(2):
    nodes.add_node(**small)
os.environ["RAY_ADDRESS"] = nodes.address
text.PART_BYTES = 2000
checks.ANSWER_SECONDS = 200.0  # A busy machine starts the nodes' processes slowly.

plain = task.with_reported

def on_three_nodes(work):
    # The first parts wait for each other: each node has one CPU, so they are on three nodes.
    import ray
    (folder / "nodes" / ray.get_runtime_context().get_node_id()).touch()
    while len([*(folder / "nodes").iterdir()]) < 3:
        time.sleep(0.05)
    if getattr(work.func, "__name__", "") == "write":
        (folder / "parts" / str(work.args[0])).touch(exist_ok=False)
        if work.args[0] == 6 and not (folder / "failed").exists():
            (folder / "failed").touch()
            (folder / "parts" / "6").unlink()
            from orchestrator.workspace.errors import UserError
            raise UserError("part 6 cannot be read")
    return plain(work)

class Notes(Progress):
    def note(self, text):
        notes.append(text)

notes = []
task.with_reported = on_three_nodes
for name in ("nodes", "parts"):
    (folder / name).mkdir()
data = {"source": "files", "files": [files], "vocab_size": 300, "validation_fraction": 0.2}
settings = resolve_settings({"data": data})
try:
    prepare(settings, workspace=folder)
except UserError as error:
    refused = str(error)
# What has ended is kept, and what was cut off is not there.
tokenized = [path.name for path in folder.glob("tokens/*/tokenized/[0-9]*")]
for number in (folder / "parts").iterdir():
    if f"{int(number.name):06}" not in tokenized:
        number.unlink()
tokens = prepare(settings, workspace=folder, progress=Notes())
report = {"tokens": str(tokens), "refused": refused, "kept": len(tokenized), "notes": notes}
print(json.dumps(report))
nodes.shutdown()
"""


def write_texts(folder: Path) -> str:
    """Write texts, of which some come again in another file; return the pattern of the files."""
    for number in range(3):
        texts = TEXTS[number * 90 : number * 90 + 120]
        (folder / f"{number}.jsonl").write_text(lines_of(texts))
    return str(folder / "*.jsonl")


@pytest.mark.long
def test_three_nodes_write_the_tokens_of_one_process(tmp_path):
    files = write_texts(tmp_path)
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    patient = {"RAY_raylet_start_wait_time_s": "120"}  # A busy machine starts nodes slowly.
    output = run_driver(DRIVER, str(workspace), files, timeout=400, variables=patient)
    report = json.loads(output.splitlines()[-1])
    assert report["refused"] == "part 6 cannot be read"
    assert report["kept"] > 0
    assert report["notes"][0].startswith("resuming after ")
    store = open_tokens(Path(report["tokens"]))
    verify_data(store.folder, always=True)
    assert len(store.manifest.train_files) > 6
    settings = DataSettings(source="files", files=(files,), vocab_size=300, validation_fraction=0.2)
    alone = open_tokens(write_text(settings, tmp_path / "alone", "key", Progress()))
    assert len(alone.manifest.train_files) == 1
    assert store.fingerprint == alone.fingerprint
    assert store.train[:].tobytes() == alone.train[:].tobytes()
    for name in ("validation.bin", "validation.jsonl", "tokenizer.json"):
        assert (store.folder / name).read_bytes() == (alone.folder / name).read_bytes()


def test_a_task_on_a_node_reports_the_sums_of_its_tokens_and_of_its_bytes(monkeypatch):
    idle_ray(monkeypatch, Node(2))

    class Answered(Future[Any]):
        def future(self) -> Future[Any]:
            return self

    def start(function: Callable[[Any], Any]) -> SimpleNamespace:
        def remote(work: Any) -> Answered:
            answer = Answered()
            answer.set_result(function(work))
            return answer

        return SimpleNamespace(remote=remote)

    def write(report: Callable[[int, int], None]) -> str:
        report(3, 1000)
        report(4, 2000)
        return "written"

    monkeypatch.setattr(ray, "remote", lambda **_: start)
    reports: list[tuple[int, int]] = []
    open_runner = part_runner(ClusterSettings(address="10.0.0.1:6379"))
    assert open_runner
    with open_runner() as runner:
        future = runner.submit_reporting(write, lambda *report: reports.append(report))
        assert future.result() == "written"
    assert reports == [(7, 3000)]


def test_one_machine_tokenizes_without_ray():
    assert part_runner(ClusterSettings()) is None
    assert part_runner(ClusterSettings(address="10.0.0.1:6379")) is not None
