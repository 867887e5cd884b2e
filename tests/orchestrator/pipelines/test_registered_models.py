"""What `pick` registers works in a process that does not know this package."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from documented import ROOT, blocks
from sample_trials import sample_trial
from terminal import run_in_terminal

from iiet.schedule import IterationSchedule
from orchestrator.evaluation.answers import Sampling
from orchestrator.models.folder import TOKENIZER
from orchestrator.models.open import load_model
from orchestrator.models.tokenizer import end_of_text_id, load_tokenizer
from orchestrator.pipelines.generating import TextGenerator
from orchestrator.pipelines.models import pick
from orchestrator.reporting.results import StoredSweep
from orchestrator.workspace.layout import Workspace, open_workspace

pytestmark = pytest.mark.slow

TEXTS = ["abc def", "ghi"]
READ = """
import json, sys, warnings
warnings.simplefilter("ignore")
import mlflow

def answers(name, *params):
    model = mlflow.pyfunc.load_model(f"models:/{name}")
    found = [model.predict(TEXTS, params=given).to_dict("list") for given in params]
    signature = model.metadata.signature
    return model, found, sorted(signature.params.to_dict(), key=str)

TEXTS = json.loads(sys.argv[1])
short = {"max_new_tokens": 5}
model, found, _ = answers(
    "iiet-2x16@best", short, {"output": "logprob"}, {"output": "logprob", "schedule": "0,0"},
    {**short, "schedule": "1,0"}, {**short, "draft": "0,0"},
)
refused = []
for text, given in json.loads(sys.argv[2]):
    try:
        model.predict([text], params=given)
    except mlflow.exceptions.MlflowException as error:
        refused.append(str(error))
example = model.predict(model.input_example, params=short)
assert list(example.columns) == ["text"], example
drawn = model.predict(5 * ["abc"], params={"temperature": 5.0})["text"]
long = [model.predict([n * "abc def "])["text"][0] for n in (49, 50)]
_, plain, _ = answers("vanilla-2x16@cheapest", short, {"output": "logprob"})

from transformers import AutoModelForCausalLM, AutoTokenizer
folder = mlflow.artifacts.download_artifacts("models:/iiet-2x16@best")
other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
logits = other(input_ids=tokenizer("abc", return_tensors="pt").input_ids).logits.flatten().tolist()
assert not {"iiet", "orchestrator"} & {name.partition(".")[0] for name in sys.modules}
print(json.dumps([found, refused, len(set(drawn)), long, plain, logits]))
"""


@dataclass(frozen=True)
class Picked:
    """A workspace with two registered models."""

    workspace: Workspace
    full: Path
    plain: Path

    def environment(self, folder: Path) -> dict[str, str]:
        """Return the environment of a process that has MLflow, and not this package's path."""
        kept = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        store = {"MLFLOW_TRACKING_URI": f"sqlite:///{self.workspace.database}"}
        return {**kept, **store, "PATH": path, "HF_MODULES_CACHE": str(folder / "modules")}


@pytest.fixture
def picked(tmp_path, save_tiny) -> Picked:
    workspace = open_workspace(tmp_path / "workspace")

    def checkpoint(name: str, **changed: Any) -> Path:
        return save_tiny(workspace.runs / name, **changed)

    full, plain = checkpoint("full"), checkpoint("plain", method="vanilla", schedule=None)
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
    return Picked(workspace, full, plain)


def continuations(checkpoint: Path, schedule: str | None = None) -> list[str]:
    wanted = None if schedule is None else IterationSchedule.parse(schedule, num_layers=2)
    generator = TextGenerator(checkpoint, schedule=wanted)
    sampling = Sampling(max_new_tokens=5, temperature=0.0)
    return ["".join(generator.stream(text, sampling)) for text in TEXTS]


def log_probability(checkpoint: Path, text: str, schedule: str | None = None) -> float:
    """Return the probability that the decoder gives to each token in turn, as one logarithm."""
    wanted = None if schedule is None else IterationSchedule.parse(schedule, num_layers=2)
    decoder = load_model(checkpoint, schedule=wanted)
    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    seen, total = [end_of_text_id(tokenizer)], 0.0
    for token in tokenizer.encode(text).ids:
        with torch.no_grad():
            probabilities = decoder(torch.tensor([seen]))[0, -1].double().softmax(-1)
        total += math.log(probabilities[token])
        seen.append(token)
    return total


def test_a_clean_process_loads_and_reads_registered_models(picked, tmp_path):
    asked: list[tuple[str, dict[str, Any], str]] = [
        ("a", {"max_new_tokens": 0}, "at least 1; got 0"),
        ("a", {"output": "loss"}, "text or logprob; got 'loss'"),
        ("a", {"output": "logprob", "draft": "0,0"}, "needs"),
        ("a", {"temperature": -1.0}, "0 or more; got -1.0"),
        ("a", {"schedule": "1,1,1"}, "each of 2 layers"),
        ("a", {"schedule": "3..0"}, "schedule must be"),
        (50 * "abc ", {"output": "logprob"}, "at most 16 tokens"),
    ]
    calls = json.dumps([call[:2] for call in asked])
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(TEXTS), calls],
        capture_output=True, text=True, cwd=tmp_path, env=picked.environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found, refused, num_drawn, long, plain, logits = json.loads(done.stdout.splitlines()[-1])
    texts = {"text": continuations(picked.full)}
    scores = [log_probability(picked.full, text) for text in TEXTS]
    cheaper = [log_probability(picked.full, text, "0,0") for text in TEXTS]
    assert found[0] == found[4] == texts, "a draft changes no token"
    assert found[1]["logprob"] == pytest.approx(scores, rel=1e-5)
    assert found[2]["logprob"] == pytest.approx(cheaper, rel=1e-5)
    assert found[3] == {"text": continuations(picked.full, "1,0")}
    assert num_drawn > 1
    assert long[0] == long[1], "a prompt that is too long loses its start"
    assert len(refused) == len(asked)
    for message, (_, _, expected) in zip(refused, asked, strict=True):
        assert expected in message
    assert plain[0] == {"text": continuations(picked.plain)}
    scores = [log_probability(picked.plain, text) for text in TEXTS]
    assert plain[1]["logprob"] == pytest.approx(scores, rel=1e-5)
    ids = load_tokenizer(picked.full / TOKENIZER).encode("abc").ids
    with torch.no_grad():
        expected = load_model(picked.full)(torch.tensor([ids])).flatten()
    torch.testing.assert_close(torch.tensor(logits), expected)


@pytest.mark.long
def test_the_python_of_the_page_asks_nothing(picked, tmp_path):
    (snippet,) = blocks(ROOT / "docs" / "models.md", "python")
    for written, used in (
        ("iiet-tiny", "iiet-2x16"),
        ("1,1,1,0,0,0", "1,0"),
        ("sqlite:///iiet-workspace", f"sqlite:///{picked.workspace.root}"),
        ("The function returns", "abc"),  # The model's context is short.
    ):
        assert written in snippet
        snippet = snippet.replace(written, used)
    command = [sys.executable, "-c", snippet]
    code, printed = run_in_terminal(command, tmp_path, picked.environment(tmp_path))
    assert code == 0, printed


@pytest.fixture
def server(picked, tmp_path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (
        f"mlflow models serve -m models:/iiet-2x16@best --env-manager local -h 127.0.0.1 -p {port}"
    )
    process = subprocess.Popen(
        [Path(sys.executable).parent / "mlflow", *command.split()[1:]],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        env=picked.environment(tmp_path), start_new_session=True,
    )  # fmt: skip
    try:
        # It says that its start is complete before it listens.
        while True:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate()


def post(address: str, body: dict[str, Any]) -> tuple[int, Any]:
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.long
def test_mlflow_serves_a_registered_model(picked, server):
    expected = [{"text": text} for text in continuations(picked.full)]
    params = {"max_new_tokens": 5}
    assert post(server, {"inputs": TEXTS, "params": params}) == (200, {"predictions": expected})
    table = {"columns": ["prompt"], "data": [[text] for text in TEXTS]}
    body = {"dataframe_split": table, "params": params}
    assert post(server, body) == (200, {"predictions": expected})
    status, found = post(server, {"inputs": TEXTS, "params": {"output": "logprob"}})
    assert status == 200
    scores = [log_probability(picked.full, text) for text in TEXTS]
    assert [row["logprob"] for row in found["predictions"]] == pytest.approx(scores, rel=1e-5)
    status, found = post(server, {"inputs": TEXTS, "params": {"schedule": "1,1,1"}})
    assert status == 400
    assert "is for 3 layers" in found["message"]
