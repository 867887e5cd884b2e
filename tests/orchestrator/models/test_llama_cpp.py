"""A vanilla or looped model, written as a GGUF file, is the same model when read back, and gives
the same tokens in llama.cpp; what llama.cpp cannot compute is refused.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from refusals import refused
from tokenizers import Tokenizer, models

from iiet.decoder import Decoder
from orchestrator import cli
from orchestrator.models.gguf import read_gguf, write_gguf
from orchestrator.models.load import load_model
from orchestrator.models.tokenizer import ModelTokenizer
from orchestrator.workspace.errors import UserError

SIZES: dict[str, Any] = {
    "dim": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 96,
    "context_length": 128, "initializer_std": 0.2, "rope_theta": 777.0,
}  # fmt: skip
TEXT = "a bag and the fog had\n\n12  dogs in 2024, don't you é 好"


def export_gguf(checkpoint: Path, file: Path, *options: str) -> Path:
    command = ["export", str(checkpoint), "--format", "gguf", "--to", str(file), *options]
    assert cli.main([*command, "--workspace", str(checkpoint.parents[1])]) == 0
    return file


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_vanilla_model_that_was_written_is_read_back(tied, tmp_path, save_tiny):
    checkpoint = save_tiny(
        tmp_path / "run", method="vanilla", schedule=None, tie_embeddings=tied, **SIZES
    )
    texts = tmp_path / "texts"
    texts.mkdir()
    loaded = read_gguf(export_gguf(checkpoint, tmp_path / "model.gguf"), texts)
    ours = load_model(checkpoint)
    rounded = {"rms_norm_eps": ours.config.rms_norm_eps, "initializer_std": 0.2}
    assert loaded.config.rms_norm_eps == pytest.approx(ours.config.rms_norm_eps, rel=1e-6)
    assert replace(loaded.config, **rounded) == ours.config
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in ours.state_dict().items())
    written_tokenizer = ModelTokenizer(texts)
    run_tokenizer = ModelTokenizer(checkpoint)
    for text in (TEXT, "ab<|endoftext|>c"):
        assert written_tokenizer.encode_document(text) == run_tokenizer.encode_document(text)
    assert (written_tokenizer.prefix_id, written_tokenizer.end_ids) == (
        run_tokenizer.prefix_id,
        run_tokenizer.end_ids,
    )


def test_the_file_of_a_looped_model_says_how_often_its_layers_run(tmp_path, save_tiny, capfd):
    checkpoint = save_tiny(tmp_path / "run", method="looped", schedule=[2] * 3, **SIZES)
    file = tmp_path / "model.gguf"
    for options, architecture, loops in (([], "nanbeige", 3), (["--schedule", "0"], "llama", None)):
        export_gguf(checkpoint, file, *options, "--force")
        fields = {n: f.contents() for n, f in gguf.GGUFReader(file).fields.items()}
        assert fields["general.architecture"] == architecture
        assert fields.get("nanbeige.num_loops") == loops
    assert capfd.readouterr().out.count(str(file)) == 2
    where = ["--workspace", str(tmp_path)]
    options = ["--format", "gguf", *where]
    assert cli.main(["export", str(checkpoint), *options, "--to", str(file)]) == 2
    assert "--force" in capfd.readouterr().err
    assert cli.main(["export", str(checkpoint), *options, "--push-to-hub", "a/b"]) == 2
    assert "not a GGUF file" in capfd.readouterr().err


def test_what_llama_cpp_cannot_compute_is_refused(tmp_path, save_tiny, capfd):
    iiet = save_tiny(tmp_path / "iiet")
    words = save_tiny(tmp_path / "words", method="vanilla", schedule=None)
    folder = tmp_path / "symbols"
    shutil.copytree(words, folder)
    (folder / "provenance.json").unlink()
    Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1})).save(str(folder / "tokenizer.json"))
    file = tmp_path / "model.gguf"
    command = ["export", str(iiet), "--format", "gguf", "--to", str(file)]
    assert cli.main([*command, "--workspace", str(tmp_path)]) == 2
    sentence = "no counterpart of what a method computes beside the layers"
    assert sentence in " ".join(capfd.readouterr().err.split())
    with refused(UserError, "depth task"):
        write_gguf(file, load_model(words), folder)
    assert not file.exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "schedule"), [("vanilla", None), ("looped", [1] * 3), ("looped", [3] * 3)]
)
def test_llama_cpp_gives_the_same_tokens(method, schedule, tmp_path, save_tiny):
    llama_cpp = pytest.importorskip("xllamacpp")
    checkpoint = save_tiny(tmp_path / "run", method=method, schedule=schedule, **SIZES)
    parameters = llama_cpp.CommonParams()
    parameters.model.path = str(export_gguf(checkpoint, tmp_path / "model.gguf"))
    parameters.n_ctx = 128
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.cache_type_k = parameters.cache_type_v = llama_cpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = llama_cpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama_cpp.Server(parameters)
    differences: list[float] = []
    decoder = load_model(checkpoint)
    tokenizer = ModelTokenizer(checkpoint)
    # Its answer leaves out tokens that are part of a character; and none shall end the text.
    texts = [tokenizer.decode([number], skip_special_tokens=False) for number in range(300)]
    banned = [number for number, text in enumerate(texts) if not text.isascii() or len(text) > 9]
    question = {"temperature": 0.0, "n_predict": 24, "n_probs": 8, "cache_prompt": False}
    question["logit_bias"] = [[number, False] for number in banned]
    for prompt in (TEXT, "the cab", "1, 2, 3,"):
        ids = list(tokenizer.encode_document(prompt))
        answer = server.handle_completions({"prompt": prompt, **question})
        assert answer["usage"]["prompt_tokens"] == len(ids), "the text is cut as here"
        steps = answer["choices"][0]["logprobs"]["content"]
        assert len(steps) == 24
        for step in steps:
            expected = log_probabilities(decoder, ids)
            for candidate in step["top_logprobs"]:
                differences.append(abs(candidate["logprob"] - float(expected[candidate["id"]])))
            expected[banned] = -torch.inf
            assert step["id"] == expected.argmax()
            ids.append(step["id"])
    print(f"largest difference of {len(differences)} log-probabilities: {max(differences):.2g}")
    assert max(differences) < 0.01


def log_probabilities(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return decoder(torch.tensor([ids]))[0, -1].log_softmax(-1)
