"""Plain models of transformers through import, every other command, and export: the same model."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval_tasks import write_choices
from plain_models import CASES, random_model, random_values
from sample_texts import lines_of
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from iiet.hf.plain_models import MODEL_TYPES
from orchestrator import cli
from orchestrator.data.store import open_tokens
from orchestrator.models.folder import weights_key
from orchestrator.models.load import load_model
from orchestrator.models.open import open_model
from orchestrator.pipelines.models import export_checkpoint, import_model
from orchestrator.reporting.model_card import ModelCard

GENERATION = "generation_config.json"
WORDS = ("bag", "fog", "hen", "pig", "cab", "deed")


# Of each type one, and one with biases; `tests/iiet/test_plain_models.py` has all cases.
QUICK = ("llama3", "llama biases", "mistral window", "qwen2", "qwen3 yarn", "smollm3 windows")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES]
)
def test_imported_and_exported_it_is_the_model_of_transformers(
    case, make_folder, workspace, tmp_path
):
    source = make_folder(case)
    checkpoint = import_model(source, workspace=workspace)
    decoder = load_model(checkpoint)
    card = ModelCard(name=case, config=decoder.config)
    folder = export_checkpoint(checkpoint, tmp_path / "out", decoder=decoder, card=card)
    assert "trust_remote_code" not in (folder / "README.md").read_text()
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, folder)]
    assert type(models[0]) is type(models[1])
    tokens = torch.arange(280, 320).view(2, 20)  # Rows beyond the tokenizer's, too.
    with torch.no_grad():
        expected, again = (model(tokens).logits for model in models)
        torch.testing.assert_close(decoder(tokens), expected, rtol=0, atol=1e-5)
    assert torch.equal(again, expected)
    ids = [
        (config.bos_token_id, config.eos_token_id)
        for model in models for config in (model.config, model.generation_config)
    ]  # fmt: skip
    assert ids == 4 * [(300, [301, 7])]
    generation = [json.loads((path / GENERATION).read_text()) for path in (source, folder)]
    assert generation[0] == generation[1]
    theirs, ours = (AutoTokenizer.from_pretrained(path) for path in (source, folder))
    messages = [{"role": "user", "content": "a bag"}]
    texts = [fast.apply_chat_template(messages, tokenize=False) for fast in (theirs, ours)]
    assert texts == 2 * ["<s>user: a bag\n"]
    assert ours("a bag").input_ids == theirs("a bag").input_ids
    # The folder is opened like any other, and imported again.
    assert open_model(folder).config == decoder.config
    second = import_model(folder, workspace=workspace, name="second")
    weights = [weights_key(path) for path in (checkpoint, second)]
    assert weights[0] == weights[1]


@pytest.mark.long
@pytest.mark.parametrize("number", range(12))
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@torch.no_grad()
def test_a_random_model_of_the_type_is_read_as_it_is(model_type, number, tmp_path):
    seed = random.randrange(2**31)
    values = random_values(model_type, random.Random(seed))
    drawn_model = f"seed {seed}: {values}"
    theirs = random_model(model_type, seed, **values)
    theirs.save_pretrained(tmp_path)
    decoder = load_model(tmp_path)
    tokens = torch.randint(values["vocab_size"], (2, 40))
    mask = torch.ones_like(tokens)
    mask[0, : random.randrange(1, 20)] = 0
    expected = theirs(tokens, attention_mask=mask).logits[mask.bool()]
    in_one_pass = decoder(tokens, attention_mask=mask)[mask.bool()]
    cache = decoder.new_cache(batch_size=2, max_tokens=40)
    steps = [decoder(tokens[:, :20], cache=cache, attention_mask=mask[:, :20])]
    steps += [decoder(step, cache=cache) for step in tokens[:, 20:].split(1, dim=1)]
    for logits in (in_one_pass, torch.cat(steps, 1)[mask.bool()]):
        torch.testing.assert_close(
            logits, expected, rtol=0, atol=1e-5, msg=lambda text: f"{text}\n{drawn_model}"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_several_files_becomes_float32(dtype, make_folder, workspace):
    source = make_folder("qwen3", dtype, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    for folder in (source, import_model(source, workspace=workspace)):
        weights = load_model(folder).state_dict()
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights.items())


@pytest.fixture
def answer(workspace) -> Callable[..., dict[str, Any]]:
    """A function that runs a command in the workspace and returns the JSON that it prints."""

    def run(*words: str) -> dict[str, Any]:
        with redirect_stdout(StringIO()) as printed:
            assert cli.main([*words, "--json", "--workspace", str(workspace.root)]) == 0
        return dict(json.loads(printed.getvalue()))

    return run


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen2 windows", "smollm3 windows"])
def test_every_command_works_on_an_import(case, make_folder, answer, tmp_path):
    source = make_folder(case)
    theirs = AutoModelForCausalLM.from_pretrained(source).eval()
    checkpoint = answer("import", str(source), "--name", "full")["checkpoint"]

    tasks = write_choices(tmp_path / "tasks", "bags", WORDS)
    evaluated = answer("evaluate", "full", "--suite=bags", f"--include-path={tasks}")
    assert evaluated["models"][0]["tasks"]["bags"]["num_items"] == len(WORDS)
    conditions = ["--batch-sizes=1", "--contexts=8", "--new-tokens=4", "--repetitions=1"]
    (cost,) = answer("benchmark", "full", *conditions)["costs"]
    assert cost["tokens_per_second"] > 0

    generated = answer("generate", "full", "--chat", "--prompt=a bag", "-n", "6")
    tokenizer = AutoTokenizer.from_pretrained(source)
    messages = [{"role": "user", "content": "a bag"}]
    prompt = tokenizer.apply_chat_template(messages, return_tensors="pt").input_ids
    tokens = theirs.generate(prompt, max_new_tokens=6, do_sample=False)[0, prompt.shape[1] :]
    ends = theirs.generation_config.eos_token_id
    text = tokenizer.decode([token for token in tokens.tolist() if token not in ends])
    # A last character whose bytes are not complete is not printed.
    assert generated["texts"][0]["text"] == text.rstrip("\N{REPLACEMENT CHARACTER}")

    answer("export", "full", f"--to={tmp_path / 'exported'}", "--no-measure")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    assert type(exported) is type(theirs)
    with torch.no_grad():
        assert torch.equal(exported(prompt).logits, theirs(prompt).logits)

    texts = tmp_path / "texts.jsonl"
    texts.write_text(lines_of(f"the {word} and a {word} had a fog. " * 30 for word in WORDS))
    options = [f"--set=data.tokenizer={checkpoint}", "--set=data.validation_fraction=0.4"]
    prepared = open_tokens(Path(answer("prepare", str(texts), *options)["tokens"]))
    calibration = "--set=influence.num_tokens=128"
    measured = answer("influence", "full", calibration, "--metric=cosine")
    assert measured["num_tokens"] == 128
    batches = prepared.validation_batches(context_length=64, num_tokens=128, batch_size=2)
    with torch.no_grad():
        states = theirs(next(batches).input_ids, output_hidden_states=True).hidden_states
    turns = [
        float(1 - functional.cosine_similarity(before.double(), after.double(), dim=-1).mean())
        for before, after in pairwise(states[:-1])  # The last one is behind the final norm.
    ]
    assert measured["layers"][:-1] == pytest.approx(turns, abs=1e-5)

    training = "--set=distillation.training."
    sizes = [f"{training}num_tokens_per_step=128", f"{training}num_validation_tokens=128"]
    student_options = [
        "--schedule=0,x,0,0",
        "--steps=2",
        "--local",
        "--name=small",
        *sizes,
    ]
    (student,) = answer("distill", "full", *student_options)["students"]
    decoder = load_model(Path(student["checkpoint"]))
    assert decoder.config.num_layers == 3
    full_embedding = load_model(Path(checkpoint)).model.embed_tokens.weight
    assert not torch.equal(decoder.model.embed_tokens.weight, full_embedding)
    answer("export", "small", f"--to={tmp_path / 'small'}", "--no-measure")
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    with torch.no_grad():
        torch.testing.assert_close(decoder(prompt), smaller(prompt).logits, rtol=0, atol=1e-5)
