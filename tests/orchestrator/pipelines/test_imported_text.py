"""What a model's folder says about text comes along: where texts begin and end, how a chat is
written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from iiet.modeling_iiet import IIETConfig
from orchestrator.data.store import open_tokens
from orchestrator.models.folder import TEXT_FILES, read_text_files
from orchestrator.models.loading import load_model
from orchestrator.pipelines.generating import Sampling, TextGenerator
from orchestrator.pipelines.models import export_checkpoint, import_model
from orchestrator.reporting.model_card import ModelCard
from orchestrator.workspace.errors import UserError
from orchestrator.workspace.layout import Workspace, open_workspace

CHAT = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
FEW = Sampling(max_new_tokens=12)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return open_workspace(tmp_path / "workspace")


@pytest.fixture
def llama(tmp_path: Path, tiny_tokens: Path) -> Path:
    """A chat model whose tokenizer puts <s> before every text and whose texts end at <|end|>."""
    folder = tmp_path / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.3, bos_token_id=300, eos_token_id=[301, 7], pad_token_id=301,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(open_tokens(tiny_tokens).tokenizer_path))
    tokenizer.add_special_tokens(["<s>", "<|end|>"])
    first = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[first]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "<|end|>"})
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))


def exported(checkpoint: Path, folder: Path) -> Path:
    decoder = load_model(checkpoint)
    card = ModelCard(name="tiny", config=decoder.config)
    return export_checkpoint(checkpoint, folder, decoder=decoder, card=card)


def test_ids_and_chat_template_are_kept_in_checkpoint_and_export(
    llama: Path, workspace: Workspace, tmp_path: Path
) -> None:
    checkpoint = import_model(llama, workspace=workspace)
    assert set(read_text_files(checkpoint)) == set(TEXT_FILES) - {"special_tokens_map.json"}
    folder = exported(checkpoint, tmp_path / "out")
    config = IIETConfig.from_pretrained(folder)
    ids = (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert ids == (300, [301, 7], 301)
    name = "generation_config.json"
    assert json.loads((folder / name).read_text()) == json.loads((llama / name).read_text())
    theirs, ours = (AutoTokenizer.from_pretrained(path) for path in (llama, folder))
    assert ours.bos_token == theirs.bos_token == "<s>"
    assert ours.eos_token == theirs.eos_token == "<|end|>"
    assert ours("a bag").input_ids == theirs("a bag").input_ids
    messages = [{"role": "user", "content": "a bag"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(messages, **options) == "<s>user: a bag\n"
    # And back again.
    again = import_model(folder, workspace=workspace, name="again")
    assert read_text_files(again) == read_text_files(checkpoint)


@pytest.mark.parametrize("place", ["config", "generation_config", "tokenizer"])
def test_generation_begins_and_ends_as_in_transformers(
    place: str, llama: Path, workspace: Workspace
) -> None:
    model = LlamaForCausalLM.from_pretrained(llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer("a bag", return_tensors="pt").input_ids
    assert ids[0, 0] == 300
    model.generation_config.eos_token_id = None
    greedy = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.size(1) :].tolist()
    end = next(t for t in greedy[2:] if t not in greedy[:2])
    config = json.loads((llama / "config.json").read_text())
    ends = {name: [319, end] if name == place else 319 for name in ("config", "generation_config")}
    write(llama / "config.json", {**config, "eos_token_id": ends["config"]})
    write(llama / "generation_config.json", {"eos_token_id": ends["generation_config"]})
    if place == "tokenizer":
        name = tokenizer.convert_ids_to_tokens(end)
        write(llama / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": name})
    written = "".join(TextGenerator(import_model(llama, workspace=workspace)).stream("a bag", FEW))
    expected = tokenizer.decode(greedy[: greedy.index(end)], skip_special_tokens=True)
    assert written == expected.rstrip("\ufffd")


def test_a_chat_is_written_by_the_models_template(llama: Path, workspace: Workspace) -> None:
    writer = TextGenerator(import_model(llama, workspace=workspace))
    asked = writer.chat("a bag")
    assert asked == "<s>user: a bag\n"
    ids = list(writer.text.encode_document(asked))
    assert ids.count(300) == 1
    assert ids == list(writer.text.encode_document("user: a bag\n"))
    assert writer.continue_all([asked, asked], FEW) == ["".join(writer.stream(asked, FEW))] * 2
    (llama / "chat_template.jinja").unlink()
    plain = TextGenerator(import_model(llama, workspace=workspace, name="plain"))
    with pytest.raises(UserError, match="no chat template"):
        plain.chat("a bag")
    (llama / "chat_template.jinja").write_text("{{ raise_exception('only in French') }}")
    french = TextGenerator(import_model(llama, workspace=workspace, name="french"))
    with pytest.raises(UserError, match="only in French"):
        french.chat("a bag")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", {"eos_token_id": "</s>"}, "eos_token_id in .*config.json.* got '</s>'"),
        ("generation_config.json", {"eos_token_id": [1, None]}, r"got \[1, None\]"),
        ("generation_config.json", ["no mapping"], "holds no mapping"),
        ("tokenizer_config.json", ["no mapping"], "holds no mapping"),
    ],
)
def test_what_makes_no_sense_is_named(
    name: str, content: Any, words: str, llama: Path, workspace: Workspace
) -> None:
    if name == "config.json":
        content = json.loads((llama / name).read_text()) | content
    write(llama / name, content)
    with pytest.raises(UserError, match=words):
        import_model(llama, workspace=workspace)
    assert not workspace.runs.exists()


@pytest.mark.parametrize(("first", "end"), [(-1, [-1]), (320, -1), (None, 1000)])
def test_a_number_of_no_token_means_none(
    first: int | None, end: Any, llama: Path, workspace: Workspace
) -> None:
    config = json.loads((llama / "config.json").read_text())
    write(llama / "config.json", config | {"bos_token_id": first, "eos_token_id": end})
    (llama / "generation_config.json").unlink()
    (llama / "tokenizer_config.json").unlink()
    token_ids = json.loads(
        read_text_files(import_model(llama, workspace=workspace))["token_ids.json"]
    )
    assert token_ids == {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 301}


def test_an_empty_prompt_begins_with_the_opening_token_also_where_that_is_the_first(
    llama: Path, workspace: Workspace
) -> None:
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    first = tokenizer.id_to_token(0)
    tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokenizer.save(str(llama / "tokenizer.json"))
    write(llama / "tokenizer_config.json", {"bos_token": first, "eos_token": "<|end|>"})
    assert TextGenerator(import_model(llama, workspace=workspace)).text.encode_document("") == (0,)


def test_code_in_the_folder_of_a_tokenizer_does_not_run(llama: Path, workspace: Workspace) -> None:
    config = json.loads((llama / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    write(llama / "tokenizer_config.json", {**config, **own})
    (llama / "own.py").write_text("raise SystemExit('code of the folder ran')\n")
    writer = TextGenerator(import_model(llama, workspace=workspace))
    assert writer.text.encode_document("a bag")[0] == 300
