"""A decoder in a folder: loading returns what was saved, and errors name what does not fit."""

import json
import math
import subprocess
import sys

import pytest
import torch
from model_cases import make_model, tokens
from refusals import refused
from safetensors.torch import load_file, save_file

from iiet import Decoder, next_token_loss
from iiet.hf.weights import lazy_tensors, write_files

IDS = tokens(2, 8)


def decoder_of():
    return make_model(dtype=torch.float32)


def dtypes_of(decoder):
    return {name: tensor.dtype for name, tensor in decoder.state_dict().items()}


def test_a_dtype_casts_all_but_the_methods_own_weights_and_that_of_the_file_is_kept(tmp_path):
    decoder = decoder_of()
    decoder.save_pretrained(tmp_path)
    assert set(dtypes_of(Decoder.from_pretrained(tmp_path, torch.float64)).values()) == {
        torch.float64
    }
    dtypes = dtypes_of(decoder.bfloat16())
    method_names = set(decoder.method_parameters())
    assert dtypes_of(Decoder.from_pretrained(tmp_path, torch.bfloat16)) == dtypes
    assert {dtypes[name] for name in method_names} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in method_names} == {torch.bfloat16}
    decoder.save_pretrained(tmp_path)
    loaded = Decoder.from_pretrained(tmp_path)
    assert dtypes_of(loaded) == dtypes
    assert torch.equal(loaded(IDS), decoder(IDS))


def test_a_loaded_decoder_can_be_trained_and_saved_over_itself(tmp_path):
    decoder_of().save_pretrained(tmp_path)
    decoder = Decoder.from_pretrained(tmp_path)
    weights_before = load_file(tmp_path / "model.safetensors")
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    next_token_loss(decoder(IDS), IDS).backward()
    optimizer.step()
    on_disk = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(on_disk[name], value) for name, value in weights_before.items())
    decoder.save_pretrained(tmp_path)
    reloaded = Decoder.from_pretrained(tmp_path)
    assert torch.equal(reloaded(IDS), decoder(IDS))
    assert not torch.equal(
        reloaded.model.embed_tokens.weight, weights_before["model.embed_tokens.weight"]
    )


@pytest.mark.slow
def test_loading_and_generating_import_few_libraries(tmp_path):
    """PyTorch's compiler alone, `torch._dynamo`, would take a second."""
    decoder_of().save_pretrained(tmp_path)
    script = (
        "import sys, torch, iiet; assert 'safetensors' not in sys.modules; "
        "decoder = iiet.Decoder.from_pretrained(sys.argv[1]); "
        "decoder.save_pretrained(sys.argv[1]); "
        "decoder.generate(torch.ones(1, 2, dtype=torch.long), max_new_tokens=2); "
        "print({'transformers', 'orchestrator', 'torch._dynamo'} & set(sys.modules))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "set()"


def test_a_file_has_the_bytes_that_the_library_writes(tmp_path):
    """The library needs all tensors at once, and this program writes one after the other."""
    decoder = decoder_of()
    weights = {name: tensor.contiguous() for name, tensor in decoder.state_dict().items()}
    weights |= {
        "a.half": torch.randn(3, 5).bfloat16(),
        "z.half": torch.randn(7).half(),
        "a number": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "places": torch.arange(3),
        "double": torch.randn(2, dtype=torch.float64),
        "größe": torch.ones(1),
    }
    write_files(tmp_path, {}, weights)
    save_file(weights, tmp_path / "expected")
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_large_weights_are_in_several_files_with_an_index(tmp_path):
    decoder = decoder_of()
    decoder.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    limit = max(tensor.nbytes for tensor in decoder.state_dict().values()) + 100
    write_files(tmp_path, values, decoder.state_dict(), max_file_bytes=limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < limit + 5000 for file in files)  # A head has some kilobytes.
    stored = {name: file.name for file in files for name in load_file(file)}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == stored
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in decoder.state_dict().values())
    loaded = Decoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS), decoder(IDS))
    weights = load_file(files[0])
    save_file({name: tensor * math.nan for name, tensor in weights.items()}, files[0])
    with refused(ValueError, files[0], *weights):
        Decoder.from_pretrained(tmp_path)
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(ValueError, "model.safetensors.index.json", "names no files"):
        Decoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(("most_bytes", "num_files"), [(32, 1), (31, 2)])
def test_a_file_holds_as_many_bytes_as_it_may(tmp_path, most_bytes, num_files):
    weights = {"a": torch.zeros(4), "b": torch.zeros(4)}  # 16 bytes each.
    write_files(tmp_path, {}, weights, max_file_bytes=most_bytes)
    assert len([*tmp_path.glob("*.safetensors")]) == num_files


def test_a_lazy_tensor_reads_what_is_asked_for(tmp_path):
    weights = {"a": torch.randn(6, 3), "bad": torch.tensor([1.0, float("nan")])}
    save_file(weights, tmp_path / "file.safetensors")
    tensors = lazy_tensors([tmp_path / "file.safetensors"])
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in weights.items()
    }
    assert torch.equal(tensors["a"][...], weights["a"])
    assert torch.equal(tensors["a"][2:4], weights["a"][2:4])
    assert tensors["a"][6:8].shape == (0, 3)
    with refused(ValueError, "bad", "NaN"):
        tensors["bad"][...]
