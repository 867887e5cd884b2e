"""An imported model is a checkpoint like any other, and reads text as its folder says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_progress import KeptProgress
from refusals import refused
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaForCausalLM

from iiet.decoder import Decoder
from iiet.exporting import export
from iiet.model.config import ModelConfig
from orchestrator.data.preparation import tokens_folder_of
from orchestrator.evaluation.answers import Sampling
from orchestrator.models.load import load_model
from orchestrator.models.open import open_model
from orchestrator.models.tokenizer import token_ids
from orchestrator.pipelines.generating import TextGenerator
from orchestrator.pipelines.models import import_model
from orchestrator.workspace.errors import UserError

FEW = Sampling(max_new_tokens=12)


# The model


def test_an_imported_model_is_the_same_model_and_found_again(
    tiny_model, tokenizer_path, tiny_tokens, workspace, tmp_path
):
    torch.manual_seed(0)
    decoder = Decoder(ModelConfig.from_dict(tiny_model)).eval()
    folder = export(decoder, tmp_path / "my model", tokenizer_path)
    first = import_model(folder, workspace=workspace)
    assert first.parent == workspace.runs / "my-model"
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(load_model(first)(tokens), decoder(tokens))
    second = import_model(folder, workspace=workspace, name="second")
    assert open_model(None, workspace).path == second
    assert import_model(folder, workspace=workspace) == first
    assert open_model(None, workspace).path == first, "also if it is found again"
    with torch.no_grad():
        decoder.model.norm.weight.mul_(2)
    export(decoder, folder, tokenizer_path)
    with refused(UserError, "my-model", "--name"):
        import_model(folder, workspace=workspace)
    # Its tokens are those of its tokenizer.
    with refused(UserError, "data.tokenizer="):
        tokens_folder_of(first, workspace)
    workspace.tokens.mkdir()
    (workspace.tokens / tiny_tokens.name).symlink_to(tiny_tokens)
    assert tokens_folder_of(first, workspace).resolve() == tiny_tokens.resolve()


def test_a_tokenizer_that_is_missing_or_too_large_is_named(
    tiny_model, tokenizer_path, workspace, tmp_path
):
    progress = KeptProgress()
    small = Decoder(ModelConfig.from_dict({**tiny_model, "vocab_size": 200}))
    folder = export(small, tmp_path / "model")
    with pytest.raises(UserError, match="the model only 200"):
        import_model(folder, workspace=workspace, tokenizer=tokenizer_path)
    assert not workspace.runs.exists()
    checkpoint = import_model(folder, workspace=workspace, progress=progress)
    assert "--tokenizer FILE" in progress.notes[0]
    assert load_model(checkpoint).config == small.config
    model = open_model(checkpoint)
    for read_text in (model.check_reads_text, lambda: TextGenerator(model)):
        with refused(UserError, "tokenizer.json"):
            read_text()
    assert len(model.key) == 2, "the weights and the configuration"


@pytest.mark.parametrize("of_run", [True, False])
def test_a_checkpoint_of_another_workspace_is_imported_unless_it_is_damaged(
    of_run, save_tiny, workspace, tmp_path
):
    folder = save_tiny(tmp_path / "elsewhere" / "a-run")
    source = folder.parent if of_run else folder
    checkpoint = import_model(source, workspace=workspace)
    assert checkpoint.parent == workspace.runs / "a-run"
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(load_model(checkpoint)(tokens), load_model(folder)(tokens))
    (folder / "tokenizer.json").write_text("{}")
    with refused(UserError, "tokenizer.json"):
        import_model(source, workspace=workspace, name="other")
    assert [run.name for run in workspace.runs.iterdir()] == ["a-run"]


# Its text


@pytest.fixture
def llama(make_folder) -> Path:
    return make_folder("llama")


def change(path: Path, **values: Any) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | values))


@pytest.mark.parametrize("place", ["config", "generation_config", "tokenizer"])
def test_generation_begins_and_ends_as_in_transformers(place, llama, workspace):
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer("a bag", return_tensors="pt").input_ids
    assert ids[0, 0] == 300
    model.generation_config.eos_token_id = None
    greedy = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.size(1) :].tolist()
    end = next(t for t in greedy[2:] if t not in greedy[:2])
    for name in ("config", "generation_config"):
        change(llama / f"{name}.json", eos_token_id=[319, end] if name == place else 319)
    if place == "tokenizer":
        change(llama / "tokenizer_config.json", eos_token=tokenizer.convert_ids_to_tokens(end))
    writer = TextGenerator(open_model(import_model(llama, workspace=workspace)))
    written = "".join(writer.stream("a bag", FEW))
    expected = tokenizer.decode(greedy[: greedy.index(end)], skip_special_tokens=True)
    assert written == expected.rstrip("\ufffd")


def test_a_chat_is_written_by_the_models_template(llama, workspace):
    writer = TextGenerator(open_model(import_model(llama, workspace=workspace)))
    chat_text = writer.texts_to_continue(["a bag"], chat=True)[0]
    assert chat_text == "<s>user: a bag\n"
    ids = list(writer.tokenizer.encode_document(chat_text))
    assert ids.count(300) == 1
    assert ids == list(writer.tokenizer.encode_document("user: a bag\n"))
    assert (
        writer.continue_all([chat_text, chat_text], FEW)
        == ["".join(writer.stream(chat_text, FEW))] * 2
    )
    template = llama / "chat_template.jinja"
    template.write_text("{{ raise_exception('only in French') }}")
    french = TextGenerator(open_model(import_model(llama, workspace=workspace, name="french")))
    with pytest.raises(UserError, match="only in French"):
        french.texts_to_continue(["a bag"], chat=True)
    template.unlink()
    plain = TextGenerator(open_model(import_model(llama, workspace=workspace, name="plain")))
    with pytest.raises(UserError, match="no chat template"):
        plain.texts_to_continue(["a bag"], chat=True)
    templates = [{"name": name, "template": name} for name in ("default", "rag")]
    change(llama / "tokenizer_config.json", chat_template=templates)
    named = TextGenerator(
        open_model(import_model(llama, workspace=workspace, name="named"))
    ).tokenizer
    question = [{"role": "user", "content": "?"}]
    assert named.chat(question, "rag") == "rag"
    with refused(UserError, "tools", "default, rag"):
        named.chat(question, "tools")


def test_code_in_the_folder_of_a_tokenizer_does_not_run(llama, workspace):
    own_tokenizer_config = {
        "tokenizer_class": "Own",
        "auto_map": {"AutoTokenizer": [None, "own.Own"]},
    }
    change(llama / "tokenizer_config.json", **own_tokenizer_config)
    (llama / "own.py").write_text("raise SystemExit('code of the folder ran')\n")
    writer = TextGenerator(open_model(import_model(llama, workspace=workspace)))
    assert writer.tokenizer.encode_document("a bag")[0] == 300


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", {"eos_token_id": "</s>"}, "eos_token_id in .*config.json.* got '</s>'"),
        ("generation_config.json", {"eos_token_id": [1, None]}, r"got \[1, None\]"),
        ("generation_config.json", [], "generation_config.json is damaged"),
        ("tokenizer_config.json", [], "tokenizer_config.json is damaged"),
    ],
)
def test_what_makes_no_sense_is_named(name, content, words, llama, workspace):
    if content:
        change(llama / name, **content)
    else:
        (llama / name).write_text("[]")
    with pytest.raises(UserError, match=words):
        import_model(llama, workspace=workspace)
    assert not workspace.runs.exists()


@pytest.mark.parametrize(("first", "end"), [(-1, [-1]), (320, -1), (None, 1000)])
def test_a_number_of_no_token_means_none(first, end, llama, workspace):
    change(llama / "config.json", bos_token_id=first, eos_token_id=end)
    (llama / "generation_config.json").unlink()
    (llama / "tokenizer_config.json").unlink()
    (llama / "chat_template.jinja").unlink()
    checkpoint = import_model(llama, workspace=workspace)
    ids = [token_ids(checkpoint, f"{name}_token_id") for name in ("bos", "eos", "pad")]
    assert ids == [[], [0], [301]]


def test_an_empty_prompt_begins_with_the_opening_token_also_where_that_is_the_first(
    llama, workspace
):
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.save(str(llama / "tokenizer.json"))
    change(llama / "tokenizer_config.json", bos_token=tokenizer.id_to_token(0))
    writer = TextGenerator(open_model(import_model(llama, workspace=workspace)))
    assert writer.tokenizer.encode_document("") == (0,)
