"""An exported folder works without this package and gives the same results.

The check runs in its own process, which cannot import `iiet`, with the loaders of transformers and
lm-eval and an empty cache for remote code.
"""

import ast
import json

import pytest
import torch
from exported_folder import found_by
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from iiet.config import ModelConfig
from iiet.decoder import Decoder
from iiet.export import export_pretrained, flat_sources
from iiet.schedule import IterationSchedule

END = "<|endoftext|>"
WORDS = [END, "the", "cat", "sat", "on", "a", "mat", "dog"]

IN_A_CLEAN_PROCESS = """
import json, sys

sys.modules["iiet"] = None  # Any import of the package fails from here on.
folder, copy = sys.argv[1:]
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

expected = load_file(folder + "/expected.safetensors")
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    logits = model(expected["ids"]).logits
    model.save_pretrained(copy)
    again = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
    logits_of_copy = again(expected["ids"]).logits
    options = dict(max_new_tokens=9, do_sample=False, min_new_tokens=9)
    cached = model.generate(expected["ids"], **options)
    uncached = model.generate(expected["ids"], use_cache=False, **options)
try:
    options = dict(trust_remote_code=True, attn_implementation="eager")
    refused = AutoModelForCausalLM.from_pretrained(folder, **options)
except ValueError as error:
    refused = str(error)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
lm = HFLM(pretrained=folder, trust_remote_code=True, device="cpu", logits_cache=False)
request = Instance(
    request_type="loglikelihood", doc={}, arguments=("the cat", " sat on a mat"), idx=0
)
print(json.dumps({
    "module": type(model).__module__.split(".")[0],
    "difference": (logits - expected["logits"]).abs().max().item(),
    "difference_of_copy": (logits_of_copy - logits).abs().max().item(),
    "cached_equals_uncached": torch.equal(cached, uncached),
    "generated": cached.shape[1],
    "words": tokenizer("the cat").input_ids,
    "end": [tokenizer.eos_token, model.generation_config.eos_token_id],
    "score": lm.loglikelihood([request], disable_tqdm=True)[0][0],
    "corrections": model.config.corrections,
    "refused": refused.split(":")[0],
}))
"""


@pytest.fixture
def decoder():
    config = ModelConfig(
        vocab_size=len(WORDS),
        dim=16,
        num_layers=3,
        num_heads=2,
        num_kv_heads=2,
        ffn_dim=24,
        context_length=32,
        schedule=IterationSchedule((2, 0, 1)),
        initializer_std=0.4,
    )
    torch.manual_seed(0)
    return Decoder(config).eval()


@pytest.fixture
def tokenizer_file(tmp_path):
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.mark.slow
def test_an_exported_folder_works_without_this_package(decoder, tokenizer_file, tmp_path):
    folder = export_pretrained(decoder, tmp_path / "a model-1.0", tokenizer_file)
    ids = torch.tensor([[1, 2, 3, 4], [5, 7, 3, 4]])
    with torch.no_grad():
        save_file({"ids": ids, "logits": decoder(ids)}, folder / "expected.safetensors")
        log_p = decoder(torch.tensor([[1, 2, 3, 4, 5, 6]])).log_softmax(-1)[0]
    found = found_by(IN_A_CLEAN_PROCESS, folder, tmp_path)
    score = sum(log_p[1 + i, word].item() for i, word in enumerate([3, 4, 5, 6]))
    assert found == {
        "module": "transformers_modules",
        "difference": pytest.approx(0.0, abs=1e-6),
        "difference_of_copy": 0.0,
        "cached_equals_uncached": True,
        "generated": 13,
        "words": [1, 2],
        "end": [END, 0],
        "score": pytest.approx(score, abs=1e-4),
        "corrections": [2, 0, 1],
        "refused": "attn_implementation='eager' cannot be served",
    }


def test_the_sources_are_complete_flat_and_free_of_the_package():
    sources = flat_sources("iiet")
    assert {"iiet_huggingface", "iiet_decoder", "iiet_methods", "iiet_methods_base"} <= set(sources)
    needed = {"iiet_losses", "iiet_influence", "iiet_export"}
    assert not needed & set(sources)  # Training and measuring are not exported.
    for source in sources.values():
        assert {module for module in imported_by(source) if "iiet" in module} <= {
            f".{name}" for name in sources
        }


def imported_by(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def test_a_folder_without_tokenizer_has_the_model_alone(decoder, tmp_path):
    folder = export_pretrained(decoder, tmp_path / "new" / "folder")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "iiet_huggingface.py"} <= names
    assert "tokenizer.json" not in names
    config = json.loads((folder / "config.json").read_text())
    assert config["corrections"] == [2, 0, 1]
    assert config["auto_map"]["AutoModelForCausalLM"] == "iiet_huggingface.IIETForCausalLM"


def test_a_tokenizer_without_the_token_is_refused_before_anything_is_written(
    decoder, tokenizer_file, tmp_path
):
    with pytest.raises(ValueError, match="no token '</s>'"):
        export_pretrained(decoder, tmp_path / "new", tokenizer_file, end_of_text="</s>")
    assert not (tmp_path / "new").exists()
