"""A GGUF file is imported with tokenizer and chat template, and is then a model like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import tiny_llama, tokenizer_values, write_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestrator import cli
from orchestrator.data.store import open_tokens
from orchestrator.models.folder import load_provenance
from orchestrator.models.loading import load_model
from orchestrator.pipelines import generating
from orchestrator.pipelines.generating import Sampling, TextGenerator
from orchestrator.pipelines.models import export_checkpoint, import_model
from orchestrator.reporting.model_card import ModelCard
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace

FEW = Sampling(max_new_tokens=12)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "workspace")


@pytest.fixture
def tokenizer(tiny_tokens: Path) -> Path:
    return open_tokens(tiny_tokens).tokenizer_path


@pytest.fixture
def file(tmp_path: Path, tokenizer: Path) -> Path:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "Tiny-Chat.Q8_0.gguf"
    return write_llama(path, tiny_llama(), kind="Q8_0", tokenizer=tokenizer)


def test_it_becomes_a_run_that_is_found_again(file: Path, workspace: Workspace) -> None:
    checkpoint = import_model(file, workspace=workspace)
    assert checkpoint.parent == workspace.runs / "Tiny-Chat.Q8_0"
    imported = load_provenance(checkpoint)["imported"]
    assert (imported["from"], imported["read as"]) == (file.name, "a GGUF file")
    assert import_model(file, workspace=workspace) == checkpoint
    write_llama(file, tiny_llama(rms_norm_eps=1e-3))
    with pytest.raises(UserError, match="--tokenizer FILE"):
        import_model(file, workspace=workspace)
    with pytest.raises(UserError, match="--name"):
        import_model(file, workspace=workspace, tokenizer=checkpoint / "tokenizer.json")


@pytest.mark.slow
def test_answers_are_those_of_transformers(
    file: Path, workspace: Workspace, tmp_path: Path
) -> None:
    stock = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    checkpoint = import_model(file, workspace=workspace)
    folder = export_checkpoint(
        checkpoint,
        tmp_path / "exported",
        decoder=load_model(checkpoint),
        card=ModelCard(name="tiny", config=load_model(checkpoint).config),
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "in 12"}, {"role": "user", "content": "a bag"}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    greedy = stock.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.size(1) :]
    expected = tokenizer.decode(greedy, skip_special_tokens=True)
    options: dict[str, Any] = {"workspace": workspace, "sampling": FEW, "chat": True}
    options["system"] = "in 12"
    streamed = "".join(generating.generate_stream("a bag", **options))
    assert streamed == expected.rstrip("\ufffd")
    assert generating.generate(["a bag"], **options) == [streamed]
    exported = json.loads((folder / "config.json").read_text())
    assert exported["eos_token_id"] == tokenizer.eos_token_id
    tokens = torch.arange(40).view(1, 40)
    with torch.no_grad():
        again = load_model(import_model(folder, workspace=workspace))
        torch.testing.assert_close(again(tokens), stock(tokens).logits, rtol=0, atol=1e-4)


def test_a_system_message_needs_a_chat(file: Path, workspace: Workspace) -> None:
    import_model(file, workspace=workspace)
    with pytest.raises(UserError, match=r"message 'short' is for a chat.*--chat"):
        generating.generate(["a bag"], workspace=workspace, system="short")


def test_a_sentencepiece_tokenizer_begins_texts_as_llama_does(
    tmp_path: Path, workspace: Workspace
) -> None:
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "▁ab"]
    values = {
        "model": "llama",
        "tokens": tokens + [f"<0x{number:02X}>" for number in range(256)],
        "scores": [0.0] * 6 + [-2.0, -1.0, -3.0] + [0.0] * 256,
        "token_type": [2, 3, 3] + [1] * 6 + [6] * 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    metadata = {f"tokenizer.ggml.{name}": value for name, value in values.items()}
    path = write_llama(tmp_path / "spm.gguf", tiny_llama(), metadata=metadata)
    text = TextGenerator(import_model(path, workspace=workspace)).text
    ids = text.encode_document("ab b")
    assert ids == (1, 8, 3, 5)
    assert text.decode(ids) == "ab b"
    assert text.decode(text.encode_document("é")) == "é", "by its bytes"


def test_other_commands_say_that_a_file_is_imported_first(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for command in (["evaluate"], ["benchmark"], ["generate", "--prompt", "a"]):
        code = cli.main([*command, str(file), "--workspace", str(tmp_path / "workspace")])
        assert code == 2
        assert f"`iiet-orch import {file}`" in " ".join(capfd.readouterr().err.split())


@pytest.mark.slow
def test_it_can_be_trained_further_on_other_text(
    file: Path, workspace: Workspace, tmp_path: Path
) -> None:
    """The command is that of a control experiment: the model itself, without a teacher."""
    checkpoint = import_model(file, workspace=workspace, name="tiny")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"a bag and the fog had {n} dogs and pigs " * 5 for n in range(60)))
    where = ["--workspace", str(workspace.root)]
    tokenizer = f"data.tokenizer={checkpoint / 'tokenizer.json'}"
    assert cli.main(["prepare", str(text), "--set", tokenizer, *where]) == 0
    recipe = {
        "num_steps": 6, "num_tokens_per_step": 256, "num_validation_tokens": 256,
        "learning_rate": 1e-3,
    }  # fmt: skip
    changes = [f"--set=distillation.training.{name}={value}" for name, value in recipe.items()]
    command = ["distill", "tiny", "-r", "0", "--control", "cross_entropy", "--local", *changes]
    assert cli.main([*command, *where]) == 0
    (trained,) = workspace.trials.glob("*/step_00000006")
    before, after = TextGenerator(checkpoint), TextGenerator(trained)
    assert after.chat("a bag") == before.chat("a bag")
    ids = torch.tensor([before.text.encode_document("a bag and the fog had 7 dogs and pigs")])

    def loss(writer: TextGenerator) -> float:
        with torch.no_grad():
            logits = writer.decoder(ids)[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()

    assert loss(after) < loss(before)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("other", "is no GGUF file"),
        ("cut", "damaged, not complete"),
        ("bert", "architecture 'bert'; only 'llama'"),
        ("no tokenizer", "has no tokenizer (tokenizer.ggml.tokens); give"),
        ("unknown rule", "by the rule 'mystery'"),
        ("large tokenizer", "has 320 entries, the model only 300"),
        ("folder", "name the GGUF file in it: "),
    ],
)
def test_bad_input_is_one_sentence(
    harm: str,
    words: str,
    file: Path,
    tokenizer: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path, llama = tmp_path / "bad.gguf", tiny_llama()
    if harm == "other":
        path.write_bytes(tokenizer.read_bytes())
    elif harm == "cut":
        path.write_bytes(file.read_bytes()[:-5000])
    elif harm == "bert":
        write_llama(path, llama, metadata={"general.architecture": "bert"})
    elif harm == "no tokenizer":
        write_llama(path, llama)
    elif harm == "unknown rule":
        other = {"tokenizer.ggml.pre": "mystery"}
        write_llama(path, llama, tokenizer=tokenizer, metadata=other)
    elif harm == "large tokenizer":
        values = tokenizer_values(tokenizer, 320)
        write_llama(path, tiny_llama(vocab_size=300), metadata=values)
    else:
        path = file.parent
    code = cli.main(["import", str(path), "--workspace", str(tmp_path / "workspace")])
    printed = " ".join(capfd.readouterr().err.split())
    assert code == 2
    assert words in printed
    assert "Traceback" not in printed
    assert not [*(tmp_path / "workspace").glob("runs/*")]
